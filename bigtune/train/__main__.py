"""One worker: `deepspeed --num_accelerators 2 --module bigtune.train RUN.yaml`.

It needs nothing set by hand: it takes its cores, prepares the data if no one has, and ends with its parent.
Cores and threads are set before torch is imported; that is why imports stand where they are needed.
"""

import faulthandler
import os
import signal
import socket
import sys
import time
from contextlib import nullcontext, suppress
from typing import Any

BEGAN = time.monotonic()

import click  # noqa: E402

from bigtune.config import Run  # noqa: E402
from bigtune.dist import CHILD, World  # noqa: E402
from bigtune.errors import BigtuneError  # noqa: E402
from bigtune.process import STOPPED, USERS_ERROR, end_with_parent  # noqa: E402
from bigtune.runfile import load_run  # noqa: E402
from bigtune.train.console import WorkerConsole  # noqa: E402
from bigtune.train.cores import bind, keep_memory  # noqa: E402
from bigtune.train.rendezvous import meet, ranks_of_srun  # noqa: E402
from bigtune.train.signals import Requests  # noqa: E402


@click.command()
@click.argument("run_file")
@click.option("--set", "overrides", multiple=True, help="section.key=value; may be given again")
@click.option("--resume", default=None, help="latest, step-N or a path")
@click.option("--new-data", is_flag=True, help="go on with other documents, from the next epoch on")
@click.option("--local_rank", type=int, default=None, hidden=True, help="given by DeepSpeed's launcher")
def main(run_file: str, overrides: tuple[str, ...], resume: str | None, new_data: bool, local_rank: int | None) -> None:
    """Train RUN_FILE on this rank. Start it through a launcher."""
    requests = Requests()
    end_with_parent()
    if local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(local_rank))
    world = World()
    try:
        os.environ.update(ranks_of_srun())
        world = World.from_environment()
        bind(world)
        run = load_run(run_file, overrides)
        console = WorkerConsole(run.output, world)
        faulthandler.register(signal.SIGUSR2, all_threads=True, chain=True)  # stacks into the log, then the end
    except BigtuneError as error:
        here = f"{socket.gethostname()}: {error}"
        if world.local_rank == 0:  # once a host, which may lack a file that others have
            print(f"Error: {error}" if world.is_main else f"Error: {here}", file=sys.stderr, flush=True)
        if CHILD not in os.environ and world.world_size > world.local_size:  # no launcher ends what runs elsewhere
            with suppress(BigtuneError):
                meet(world, here)
        sys.exit(USERS_ERROR)
    code = 0
    try:
        code = _work(run, world, resume, new_data, requests, console)
    except BaseException as error:
        code = console.fail(error)
    with suppress(OSError):  # a full disk, which `fail` has told
        sys.stdout.flush()
        sys.stderr.flush()
    # At once. After an error the other ranks may wait in a collective; and Python's own end now and then meets
    # gloo's threads, which live as long as DeepSpeed's references to their group, and aborts a run that is done.
    os._exit(code)


def _work(
    run: Run, world: World, resume: str | None, new_data: bool, requests: Requests, console: WorkerConsole
) -> int:
    import torch

    from bigtune.data.prepare import prepare
    from bigtune.model.vocabulary import vocabulary_of
    from bigtune.train.lock import RunLock
    from bigtune.train.pulse import Pulse
    from bigtune.train.start import documents_of, find_start

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # spares a search and a warning
        keep_memory()
    store = meet(world)
    pulse = Pulse(world, console)
    pulse.join(store)  # before anything that takes long, or waits for others
    with RunLock(run.output) if world.is_main else nullcontext():
        if CHILD not in os.environ and not run.data.stream:  # the first rank works, the others wait
            keep = None if new_data else documents_of(find_start(run, resume, new_data))
            model_path = vocabulary_of(run.model, run.output).folder
            manifest = prepare(run.data, model_path, run.store, keep=keep, held_out=run.held_out)
            console.say(manifest.summary())
        done = _train(run, world, store, resume, new_data, requests, console)
        torch.distributed.barrier()  # whoever leaves before the end has the others ended
        pulse.leave()
        torch.distributed.destroy_process_group()
    return 0 if done else STOPPED


def _train(
    run: Run,
    world: World,
    store: Any,
    resume: str | None,
    new_data: bool,
    requests: Requests,
    console: WorkerConsole,
) -> bool:
    from bigtune.train.ds_config import read_preset
    from bigtune.train.engine import connect
    from bigtune.train.loop import train
    from bigtune.train.ops import ensure_ops, load_ops, needed_ops

    ops = needed_ops(read_preset(run.deepspeed), run.optim)
    cpu_adam = ensure_ops(ops, console.say)
    if cpu_adam:
        load_ops(ops)
    connect(world, store)
    return train(run, world, resume, requests, console, BEGAN, cpu_adam, new_data)


if __name__ == "__main__":
    main()
