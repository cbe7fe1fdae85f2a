"""The command line: each command parses, loads the run file, and calls one stage.

Stages are imported where they are called, so that `bigtune --help` needs no torch.
"""

import json
import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from bigtune import __version__
from bigtune.errors import BigtuneError, ConfigError
from bigtune.process import STOPPED


class _Group(click.Group):
    """Prints a user's mistake as one line; what is not one keeps its traceback."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except BigtuneError as error:
            _fail(error)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            sys.exit(STOPPED)


def _fail(error: BigtuneError) -> NoReturn:
    click.echo(f"Error: {error}", err=True)
    sys.exit(2 if isinstance(error, ConfigError) else 1)


def _example(*lines: str) -> str:
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in lines)


_overrides = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key, as in optim.learning_rate=1e-4."
)
_workers = click.option("--workers", type=click.IntRange(min=1), help="Threads. Default: one a core.")


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Tune pretrained language models on instruction data, exactly, on DeepSpeed ZeRO-3."""


@main.command(epilog=_example("bigtune prepare recipes/gsm8k.yaml"))
@click.argument("run_file")
@_overrides
def prepare(run_file: str, overrides: tuple[str, ...]) -> None:
    """Tokenize the sources of RUN_FILE into a document store. Does nothing if it is there already."""
    from bigtune import api
    from bigtune.runfile import load_run

    api.prepare(load_run(run_file, overrides))


@main.command(epilog=_example("bigtune inspect recipes/gsm8k.yaml --html runs/gsm8k/data.html"))
@click.argument("run_file")
@click.option("--samples", type=click.IntRange(min=0), default=3, show_default=True, help="Documents to read.")
@click.option("--rows", type=click.IntRange(min=0), default=1, show_default=True, help="Packed rows to read.")
@click.option("--ranks", type=click.IntRange(min=1), default=2, show_default=True, help="Ranks to deal batches to.")
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help="Write it as a web page instead.")
@click.option("--json", "as_json", is_flag=True, help="Print the statistics as JSON.")
@_overrides
def inspect(
    run_file: str, samples: int, rows: int, ranks: int, html: Path | None, as_json: bool, overrides: tuple[str, ...]
) -> None:
    """Show what RUN_FILE trains on: its documents as tokens, what is supervised, packed and left out."""
    from bigtune import api
    from bigtune.runfile import load_run

    if as_json and html is None:
        samples = rows = 0  # of which no statistics tell
    found = api.inspect(load_run(run_file, overrides), samples, rows, ranks)
    if html is not None:
        from bigtune.report.page import render_page, write_page

        write_page(render_page(found), html)
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=1))
    elif html is not None:
        click.echo(html)
    else:
        from rich.console import Console

        from bigtune.report.terminal import render

        console = Console(highlight=False)
        console.print(render(found, console.width))


@main.command(epilog=_example("bigtune train recipes/gsm8k.yaml --ranks 2 --set train.steps=20"))
@click.argument("run_file")
@click.option("--ranks", type=click.IntRange(min=1), help="Workers on this host. Default: its GPUs, or 1.")
@click.option("--resume", metavar="latest|step-N|PATH", help="Default: the latest checkpoint, if there is one.")
@click.option("--new-data", is_flag=True, help="Go on with documents that changed, from the next epoch on.")
@click.option("--oversubscribe", is_flag=True, help="Allow more ranks than cores.")
@_overrides
def train(
    run_file: str,
    ranks: int | None,
    resume: str | None,
    new_data: bool,
    oversubscribe: bool,
    overrides: tuple[str, ...],
) -> None:
    """Train RUN_FILE on this host's workers, each on cores or a GPU of its own.

    Goes on from the latest checkpoint of the output folder. Ctrl-C finishes the step and saves. The same by
    hand: deepspeed --num_accelerators N --module bigtune.train RUN_FILE.
    """
    from bigtune import api
    from bigtune.runfile import load_run

    if not api.train(load_run(run_file, overrides), ranks, resume, oversubscribe, new_data):
        sys.exit(STOPPED)


@main.command(epilog=_example("bigtune launch recipes/gsm8k.yaml --slurm --nodes 4 --time 12:00:00"))
@click.argument("run_file", type=click.Path(path_type=Path))
@click.option("--hostfile", type=click.Path(path_type=Path), help="Lines of NAME slots=N; reached by ssh.")
@click.option("--include", metavar="NAME[:SLOT,SLOT][@NAME…]", help="Only these hosts, or slots of them.")
@click.option("--exclude", metavar="NAME[:SLOT,SLOT][@NAME…]", help="All but these.")
@click.option("--ranks", type=click.IntRange(min=1), help="So many in all, on the first hosts. Default: all slots.")
@click.option("--launcher", type=click.Choice(["ssh", "pdsh"]), default="ssh", show_default=True)
@click.option("--ssh", "ssh_command", default="ssh", show_default=True, help="How to call it, as in 'ssh -p 2222'.")
@click.option("--slurm", is_flag=True, help="Submit a job; within one, use its hosts.")
@click.option("--nodes", type=click.IntRange(min=1), default=1, show_default=True, help="Of the job.")
@click.option("--ranks-per-node", type=click.IntRange(min=1), help="Default: a node's GPUs, or 1.")
@click.option("--partition", help="Of the job; as are those below.")
@click.option("--account")
@click.option("--time", "time_limit", help="As Slurm writes it: 12:00:00. The run saves and is queued again before.")
@click.option("--gpus-per-node", metavar="[TYPE:]N")
@click.option("--cpus-per-node", type=click.IntRange(min=1))
@click.option("--job-name", help="Default: the run file's.")
@click.option("--sbatch", "more", multiple=True, metavar="OPTION", help="Any option of sbatch: --sbatch=--qos=high.")
@click.option("--dry-run", is_flag=True, help="Print the job's script, or who would run where; start nothing.")
@click.option("--exclude-bad", is_flag=True, help="Go on without hosts that cannot be reached or used.")
@click.option("--logs", type=click.Choice(["main", "all"]), default="main", show_default=True, help="Ranks to show.")
@click.option("--resume", metavar="latest|step-N|PATH", help="Default: the latest checkpoint, if there is one.")
@click.option("--new-data", is_flag=True, help="Go on with documents that changed, from the next epoch on.")
@_overrides
def launch(run_file: Path, **options: Any) -> None:
    """Train RUN_FILE on several hosts: over ssh with --hostfile, or under Slurm with --slurm.

    All hosts are looked at first. If a worker or host fails, all others are ended, and the run goes on from its latest
    checkpoint on the hosts that are left (launch.max_restarts). Ctrl-C finishes the step and saves.
    """
    from bigtune.launch.command import launch as stage

    sys.exit(stage(run_file, **options))


@main.command(epilog=_example("bigtune bench recipes/gsm8k.yaml --sweep micro_batch=1,max deepspeed=zero2,zero3"))
@click.argument("run_file", required=False)
@click.argument("more", metavar="[KEY=V,V]...", nargs=-1)
@click.option("--sweep", multiple=True, metavar="KEY=V,V", help="Measure each value of a key; more may follow.")
@click.option("--ranks", metavar="N,N", help="Workers on this host. Default: its GPUs, or 1.")
@click.option("--steps", type=click.IntRange(min=3), default=10, show_default=True, help="That are measured.")
@click.option("--warm-up", type=click.IntRange(min=1), default=3, show_default=True, help="Steps that are left out.")
@click.option("--output", type=click.Path(path_type=Path), help="Default: runs/bench/ and the run file's name.")
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help="Write a web page with plots as well.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option(
    "--compare", type=click.Path(path_type=Path), nargs=2, metavar="A B", help="Say what changed between two results."
)
@_overrides
def bench(
    run_file: str | None,
    more: tuple[str, ...],
    sweep: tuple[str, ...],
    ranks: str | None,
    steps: int,
    warm_up: int,
    output: Path | None,
    html: Path | None,
    as_json: bool,
    compare: tuple[Path, Path] | None,
    overrides: tuple[str, ...],
) -> None:
    """Measure how fast RUN_FILE trains on this host: tokens a second, where a step's time goes, memory, ranks.

    Each case is a short training run of its own; one that fails stands in the table with its reason. A micro_batch of
    max is the largest that fits. Results are added to OUTPUT/bench.jsonl, one line a case.
    """
    from bigtune.bench import command

    if compare is not None:
        command.compare(*compare, as_json)
        return
    if run_file is None:
        raise click.UsageError("Missing argument 'RUN_FILE'.")
    shown = command.Shown(html, as_json)
    sys.exit(command.bench(Path(run_file), overrides, (*sweep, *more), ranks, (steps, warm_up), output, shown))


@main.command(epilog=_example("bigtune merge runs/gsm8k/checkpoints/step-60 --output models/gsm8k"))
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder of the merged model.")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    help="Default: the base model's own; float32 for --adapter.",
)
@click.option("--max-shard-size", default="5GB", show_default=True, help="Of one safetensors file.")
@click.option("--adapter", is_flag=True, help="Of a LoRA run, the adapter alone, as peft loads it.")
@click.option(
    "--base",
    type=click.Path(path_type=Path),
    help="The base model's folder, if it moved since a LoRA run, or has the config that DeepSpeed's checkpoint lacks.",
)
@_workers
def merge(
    checkpoint: Path,
    output: Path,
    dtype: str | None,
    max_shard_size: str,
    adapter: bool,
    base: Path | None,
    workers: int | None,
) -> None:
    """Merge CHECKPOINT into a Hugging Face model.

    CHECKPOINT is a step-N folder, or a run's output folder for its latest; or a ZeRO-3 checkpoint that DeepSpeed wrote.
    Interrupted, the same command goes on with the files that are not finished.
    """
    from bigtune import api

    click.echo(api.merge(checkpoint, output, dtype, max_shard_size, adapter, base, workers))


@main.command(epilog=_example("bigtune verify runs/gsm8k --json"))
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
@_workers
def verify(path: Path, as_json: bool, workers: int | None) -> None:
    """Read PATH against the checksums that were written with it, and name what is missing, cut or damaged.

    PATH is a step-N folder, a run's output folder for all its checkpoints, or a merged model. Exit code 1 says that it
    is not whole.
    """
    from bigtune import api

    found = api.verify(path, workers)
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=1))
    else:
        for problem in found.problems:
            click.echo(problem)
        for note in found.notes:
            click.echo(f"note: {note}")
        click.echo(found.summary())
    if not found.whole:
        sys.exit(1)


@main.command(epilog=_example("bigtune evaluate recipes/gsm8k.yaml --model models/gsm8k --json"))
@click.argument("run_file")
@click.option("--model", type=click.Path(path_type=Path), required=True, help="A Hugging Face model folder.")
@click.option("--base", type=click.Path(path_type=Path), help="Another, to compare with row by row.")
@click.option("--shots", default="", help="Examples before each question, in the run file's stead: 0,1,3 tries each.")
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
@_overrides
def evaluate(
    run_file: str, model: Path, base: Path | None, shots: str, as_json: bool, overrides: tuple[str, ...]
) -> None:
    """Score a model on the held-out rows of RUN_FILE: loss and metrics, by task."""
    from bigtune.evaluate.command import evaluate as stage
    from bigtune.runfile import load_run

    stage(load_run(run_file, overrides), model, base, shots, as_json)


@main.command(epilog=_example("bigtune chat models/gsm8k --temperature 0.7"))
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--prompt", help="Print one answer, and end.")
@click.option("--system", default="", help="A system prompt.")
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0: the likeliest.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=512, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--trust-remote-code", is_flag=True, help="Run code that lies in the model's folder.")
def chat(
    model: Path,
    prompt: str | None,
    system: str,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    seed: int,
    trust_remote_code: bool,
) -> None:
    """Talk with MODEL: a model's folder, an adapter's, a checkpoint's, or a run's for its latest checkpoint."""
    from bigtune import api
    from bigtune.evaluate import session
    from bigtune.evaluate.chat import Sampling

    sampling = Sampling(temperature, top_p, max_new_tokens)
    talk = api.chat(model, sampling, system, seed, trust_remote_code)
    if prompt is None:
        session.converse(talk, str(model))
    else:
        session.answer(talk, prompt)


@main.command(epilog=_example("bigtune demo --output runs/demo"))
@click.option("--output", type=click.Path(path_type=Path), default=Path("runs/demo"), show_default=True)
def demo(output: Path) -> None:
    """Pretrain, tune, merge and evaluate a small model on this host, in a few minutes, from data made here."""
    from bigtune.demo.story import tell

    tell(output)


if __name__ == "__main__":
    main()
