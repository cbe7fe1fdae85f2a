"""`run_distributed(function, world_size, …)`: a function on real ranks, joined by gloo, that live on.

Workers are forked once for each world size, by a process that has imported torch and DeepSpeed, and used again by every
test of the session, so that a test pays for what it does and not for starting Python.

Importing this module hides the GPUs of a machine that has some: tests run on the CPU, so that they say the
same everywhere, and those of CUDA ask for it with `cuda=True`.
"""

import atexit
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import ensure_running
from multiprocessing.process import BaseProcess
from typing import Any
from unittest import mock

GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

Pool = list[tuple[BaseProcess, Connection]]
_pools: dict[tuple[int, bool], Pool] = {}


class WorkerFailed(AssertionError):
    """A rank raised; the message holds its traceback."""


def run_distributed(
    function: Callable[..., Any], world_size: int = 2, *arguments: Any, seconds: float = 300, cuda: bool = False
) -> list[Any]:
    """Call `function(*arguments)` on every rank at once.

    Args:
        function: of a module, so that workers can import it; it finds its place in `World.from_environment()`.
        seconds: after which the ranks are given up as hung.
        cuda: on a GPU each, instead of the CPU.

    Returns:
        The ranks' results, in order.

    Raises:
        WorkerFailed: a rank raised or hung. The workers of that world size are ended, since the others may
            wait in a collective; the next call spawns new ones.
    """
    pool = _pools.get((world_size, cuda)) or _spawn(world_size, cuda)
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
        _end((world_size, cuda))
        raise WorkerFailed("\n".join(problems))
    return results


def _spawn(world_size: int, cuda: bool) -> Pool:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context = multiprocessing.get_context("spawn") if cuda else _server()
    pool: Pool = []
    for rank in range(world_size):
        here, there = context.Pipe()
        # No daemon: it may have children, which tokenize. It ends when the pipe does.
        process = context.Process(target=_serve, args=(there, rank, world_size, port, cuda, GPUS))
        process.start()
        there.close()
        pool.append((process, here))
    _pools[world_size, cuda] = pool
    return pool


@cache
def _server() -> ForkServerContext:
    """Of a process that has imported once what takes long, and forks the workers."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bigtune.train.loop", "deepspeed", "transformers.models.llama.modeling_llama"])
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu"):
        ensure_running()
    return context


def _serve(connection: Connection, rank: int, world_size: int, port: int, cuda: bool, gpus: str | None) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cuda" if cuda else "cpu",
    }  # fmt: skip
    if cuda and gpus is None:
        del os.environ["CUDA_VISIBLE_DEVICES"]
    elif cuda:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus or ""
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


def _end(key: tuple[int, bool]) -> None:
    for process, connection in _pools.pop(key):
        connection.close()
        process.kill()  # a rank that waits in a collective does not read its pipe


@atexit.register
def _end_all() -> None:
    for key in list(_pools):
        _end(key)
