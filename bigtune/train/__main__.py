"""One worker: `deepspeed --num_accelerators 2 --module bigtune.train RUN.yaml`.

It needs nothing set by hand: it takes its cores, prepares the data if no one has, and ends with its parent.
Cores and threads are set before torch is imported; that is why imports stand where they are needed.
"""

import os
import sys
import time
from contextlib import suppress

BEGAN = time.monotonic()

import click  # noqa: E402
from filelock import FileLock, Timeout  # noqa: E402

from bigtune.config import Run  # noqa: E402
from bigtune.dist import CHILD, World  # noqa: E402
from bigtune.errors import BigtuneError, LaunchError  # noqa: E402
from bigtune.process import end_with_parent  # noqa: E402
from bigtune.runfile import load_run  # noqa: E402
from bigtune.train.console import WorkerConsole  # noqa: E402
from bigtune.train.cores import bind  # noqa: E402
from bigtune.train.signals import StopRequest  # noqa: E402


@click.command()
@click.argument("run_file")
@click.option("--set", "overrides", multiple=True, help="section.key=value; may be given again")
@click.option("--resume", default=None, help="latest, step-N or a path")
@click.option("--new-data", is_flag=True, help="go on with other documents, from the next epoch on")
@click.option("--local_rank", type=int, default=None, hidden=True, help="given by DeepSpeed's launcher")
def main(run_file: str, overrides: tuple[str, ...], resume: str | None, new_data: bool, local_rank: int | None) -> None:
    """Train RUN_FILE on this rank. Start it through a launcher."""
    stop = StopRequest()
    end_with_parent()
    if local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(local_rank))
    world = World.from_environment()
    bind(world)
    try:
        run = load_run(run_file, overrides)
        console = WorkerConsole(run.output, world)
    except BigtuneError as error:
        sys.exit(f"Error: {error}" if world.is_main else 1)
    code = 0
    try:
        _work(run, world, resume, new_data, stop, console)
    except BaseException as error:
        console.fail(error)
        code = 1
    with suppress(OSError):  # a full disk, which `fail` has told
        sys.stdout.flush()
        sys.stderr.flush()
    # At once. After an error the other ranks may wait in a collective; and Python's own end now and then meets
    # gloo's threads, which live as long as DeepSpeed's references to their group, and aborts a run that is done.
    os._exit(code)


def _work(
    run: Run, world: World, resume: str | None, new_data: bool, stop: StopRequest, console: WorkerConsole
) -> None:
    from bigtune.data.prepare import prepare
    from bigtune.model.vocabulary import vocabulary_of
    from bigtune.train.ds_config import read_preset
    from bigtune.train.ops import ensure_ops, load_ops, needed_ops
    from bigtune.train.start import documents_of, find_start

    lock = FileLock(run.output / "train.lock")  # the system frees it with this process
    try:
        if world.is_main:
            lock.acquire(timeout=0)
    except Timeout:
        raise LaunchError(f"output: another run is training in {run.output}; wait for it, or give another") from None
    start = find_start(run, resume, new_data)
    if CHILD not in os.environ and not run.data.stream:  # the first rank works, the others wait
        keep = None if new_data else documents_of(start)
        model_path = vocabulary_of(run.model, run.output).folder
        manifest = prepare(run.data, model_path, run.store, keep=keep, held_out=run.held_out)
        console.say(manifest.summary())
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # spares a search and a warning
    from bigtune.train.engine import connect
    from bigtune.train.loop import train

    ops = needed_ops(read_preset(run.deepspeed), run.optim)
    cpu_adam = ensure_ops(ops, console.say)
    if cpu_adam:
        load_ops(ops)
    connect(world)
    train(run, world, start, stop, console, BEGAN, cpu_adam, new_data)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
