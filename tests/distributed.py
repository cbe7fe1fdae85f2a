"""`run_distributed(function, world_size, …)`: a function on real ranks, joined by gloo, that live on.

Workers are spawned once for each world size and used again by every test of the session, so that a test
pays for what it does and not for starting Python, torch and DeepSpeed.
"""

import atexit
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

_pools: dict[int, list[tuple[BaseProcess, Connection]]] = {}


class WorkerFailed(AssertionError):
    """A rank raised; the message holds its traceback."""


def run_distributed(
    function: Callable[..., Any], world_size: int = 2, *arguments: Any, seconds: float = 300
) -> list[Any]:
    """Call `function(*arguments)` on every rank at once.

    Args:
        function: of a module, so that workers can import it; it finds its place in `World.from_environment()`.
        seconds: after which the ranks are given up as hung.

    Returns:
        The ranks' results, in order.

    Raises:
        WorkerFailed: a rank raised or hung. The workers of that world size are ended, since the others may
            wait in a collective; the next call spawns new ones.
    """
    pool = _pools.get(world_size) or _spawn(world_size)
    for _, connection in pool:
        connection.send((function, arguments))
    results: list[Any] = []
    problems: list[str] = []
    for rank, (_, connection) in enumerate(pool):
        if problems and not connection.poll(2):  # the others may hang
            continue
        if not connection.poll(seconds):
            problems.append(f"rank {rank} gave no answer in {seconds:.0f} s")
            continue
        try:
            ok, value = connection.recv()
        except EOFError:
            ok, value = False, "it died"
        (results if ok else problems).append(value if ok else f"rank {rank}: {value}")
    if problems:
        _end(world_size)
        raise WorkerFailed("\n".join(problems))
    return results


def _spawn(world_size: int) -> list[tuple[BaseProcess, Connection]]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    pool: list[tuple[BaseProcess, Connection]] = []
    for rank in range(world_size):
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(there, rank, world_size, port), daemon=True)
        process.start()
        there.close()
        pool.append((process, here))
    _pools[world_size] = pool
    return pool


def _serve(connection: Connection, rank: int, world_size: int, port: int) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    from bigtune.dist import World
    from bigtune.train.engine import connect

    connect(World.from_environment())
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, function(*arguments)))
        except BaseException:
            connection.send((False, traceback.format_exc()))


def _end(world_size: int) -> None:
    for process, connection in _pools.pop(world_size):
        connection.close()
        process.kill()  # a rank that waits in a collective does not read its pipe


@atexit.register
def _end_all() -> None:
    for world_size in list(_pools):
        _end(world_size)
