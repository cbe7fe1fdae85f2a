"""A benchmark: case after case, each measured by itself and written down as it ends.

case ─▶ run file ─▶ trial (of max: trials) ─▶ figures ─▶ OUTPUT/bench.jsonl
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bigtune.bench.figures import Figures
from bigtune.bench.flops import exact_flops, palm_flops, utilization
from bigtune.bench.largest import Need, largest, predicted_gib
from bigtune.bench.machine import machine
from bigtune.bench.peaks import datasheet_tflops
from bigtune.bench.rate import Roof, measure_roof
from bigtune.bench.result import FILE, Result
from bigtune.bench.sweep import MICRO_BATCH, Case
from bigtune.bench.trial import Trial, is_ready, try_run
from bigtune.config import Checkpoint, Run
from bigtune.data.rows import Position
from bigtune.errors import BigtuneError
from bigtune.host import free_memory
from bigtune.launch.local import gpus
from bigtune.runfile import load_run
from bigtune.train.fit import open_rows
from bigtune.train.lock import RunLock

TRY_STEPS = 2
"""Of a try of a micro batch: the second has all that lasts, the optimizer's states too."""
OF_CUTTING = {"sequence_length", "on_long_document", "mixture", "min_supervised", "stream", "workers", "store"}
"""Keys of `data` on which documents do not depend."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """How a case is measured."""

    steps: int = 10
    warm_up: int = 3


class Session:
    """Measures cases in a folder of its own, which no other benchmark may use meanwhile."""

    def __init__(self, run_file: Path, overrides: Sequence[str], wishes: Wishes, output: Path) -> None:
        self._run_file, self._overrides, self._wishes, self._output = run_file, overrides, wishes, output
        self._host: dict[str, Any] = {}
        self._roofs: dict[tuple[Any, ...], Roof] = {}
        self._needs: dict[str, dict[int, Need]] = {}  # by settings but for the micro batch
        self._measured: list[Result] = []

    def measure(self, cases: Sequence[Case]) -> Iterator[Result]:
        """Measure all, each when it is asked for.

        Raises:
            BigtuneError: the run file is wrong as it is, or the output folder cannot be written.
        """
        load_run(self._run_file, self._overrides)
        with RunLock(self._output):
            self._host = {"machine": machine(), "load_average": round(os.getloadavg()[0], 2)}
            for number, case in enumerate(cases, 1):
                folder = self._output / f"case-{number:02d}"
                try:
                    result = self._search(case, folder) if case.searches else self._one(case, folder)
                except BigtuneError as error:
                    result = Result(case, str(error))
                result = replace(
                    result, scaling_efficiency=scaling_efficiency(result, self._measured),
                    date=datetime.now(UTC).isoformat(timespec="seconds"), **self._host,
                )  # fmt: skip
                self._measured.append(result)
                with (self._output / FILE).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(result.to_json()) + "\n")
                yield result

    def _search(self, case: Case, folder: Path) -> Result:
        """A case with the largest micro batch that fits, one that a try and the whole measurement did."""
        tries: dict[int, Trial] = {}

        def fits(micro_batch: int) -> bool:
            if micro_batch not in tries:
                place = folder.with_name(f"{folder.name}-micro_batch-{micro_batch}")
                tries[micro_batch] = self._try(case, self._run_of(case, place, TRY_STEPS, micro_batch))
            trial = tries[micro_batch]
            if trial.reason and not trial.out_of_memory:
                raise BigtuneError(trial.reason)
            return not trial.reason

        # A rank has no more rows than these; a larger micro batch would be the same one.
        rows = -(-load_run(self._run_file, [*self._overrides, *case.overrides]).train.global_batch // case.ranks)
        best = largest(rows, fits)
        while best:
            result = self._one(case, folder, best)
            if not result.reason or not (trial := Trial(result.reason)).out_of_memory:
                break
            tries[best] = trial
            best = largest(best - 1, fits)
        else:
            result = Result(case, f"no micro batch fits; of 1: {tries[1].reason}")
        told = [{"micro_batch": size, "reason": trial.reason} for size, trial in sorted(tries.items())]
        return replace(result, tries=told)

    def _one(self, case: Case, folder: Path, micro_batch: int | None = None) -> Result:
        """A case with a given micro batch."""
        run = self._run_of(case, folder, self._wishes.warm_up + self._wishes.steps, micro_batch)
        trial = self._try(case, run)
        result = Result(
            case, trial.reason, micro_batch=run.train.micro_batch, precision=trial.precision or None,
            busy_by_others=trial.busy_by_others, run=run.model_dump(mode="json"),
        )  # fmt: skip
        if trial.reason:
            return result
        figures = Figures.of(trial.lines, self._wishes.warm_up, case.ranks, trial.first_step_seconds)
        return replace(result, figures=figures, **self._operations(run, case.ranks, trial.precision, figures))

    def _try(self, case: Case, run: Run) -> Trial:
        """A trial, unless it would surely not fit into the memory that there is; on a GPU a failure harms nobody."""
        micro_batch = run.train.micro_batch
        needs = self._needs.setdefault(_name_without(case, MICRO_BATCH), {})
        needed, free = predicted_gib(needs, micro_batch), free_memory() / 2**30
        if needed is not None and needed > free and not gpus():
            return Trial(
                f"out of memory, not tried: by what micro_batch {max(needs)} took, {micro_batch} needs "
                f"{needed:.1f} GiB, and {free:.1f} GiB are free"
            )
        trial = try_run(run, case.ranks)
        if not trial.reason:
            peak = max(line["peak_memory_gib"] for line in trial.lines)
            activations = trial.lines[0].get("memory_gib", {}).get("activations", 0.0)
            needs[micro_batch] = Need(case.ranks * peak, case.ranks * activations)
        return trial

    def _run_of(self, case: Case, folder: Path, steps: int, micro_batch: int | None = None) -> Run:
        """The run of a case, with its own folder and the documents that it shares with others."""
        changes = [*self._overrides, *case.overrides, "train.epochs=null", f"train.steps={steps}"]
        run = load_run(self._run_file, changes + [f"{MICRO_BATCH}={micro_batch}"] * (micro_batch is not None))
        data = run.data if run.data.stream else run.data.model_copy(update={"store": self._store_of(run)})
        return run.model_copy(update={"data": data, "output": folder, "checkpoint": Checkpoint(enabled=False)})

    def _store_of(self, run: Run) -> Path:
        """The run's own documents where they are prepared as they would be now; else those of the cases like it."""
        if is_ready(run):
            return run.store
        facts = [run.model.model_dump(mode="json"), run.data.model_dump(mode="json", exclude=OF_CUTTING)]
        facts += [source.model_dump(mode="json") for source in run.held_out]
        name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
        return self._output / "data" / name

    def _operations(self, run: Run, ranks: int, precision: str, figures: Figures) -> dict[str, Any]:
        """What the measured steps computed, a second, beside what the devices could."""
        try:
            roof, squares = self._roof(run, ranks, precision), self._squares(run)
        except BigtuneError as error:
            return {"note": str(error)}
        tokens, supervised = (sum(map(int, figures.steps[key])) for key in ("tokens", "supervised_tokens"))
        counts = {
            "palm": palm_flops(roof.shape, tokens, run.data.sequence_length),
            "exact": exact_flops(roof.shape, tokens, supervised, squares, frozen=run.adapter is not None),
        }
        tflops = {name: count / sum(figures.steps["seconds"]) / 1e12 for name, count in counts.items()}
        sheet = datasheet_tflops(self._host["machine"]["gpu"], precision)
        roofs = {"measured": roof.tflops, "datasheet": sheet * ranks if sheet else None}
        return {"tflops": tflops, "roof_tflops": roofs, "mfu": utilization(tflops, roofs)}

    def _roof(self, run: Run, ranks: int, precision: str) -> Roof:
        key = (run.model.path, ranks, precision)
        if key not in self._roofs:
            self._roofs[key] = measure_roof(run.model.path, ranks, precision, run.model.trust_remote_code)
        return self._roofs[key]

    def _squares(self, run: Run) -> int:
        """The sum of the squared lengths of the measured steps' documents."""
        batch, warm_up = run.train.global_batch, self._wishes.warm_up
        with closing(open_rows(run)) as rows:
            _, begin = rows.take(Position(), warm_up * batch)
            return sum(row.work for row in rows.take(begin, self._wishes.steps * batch)[0])


def _name_without(case: Case, key: str) -> str:
    return Case({name: value for name, value in case.settings.items() if name != key}, case.ranks).name


def scaling_efficiency(result: Result, before: Sequence[Result]) -> float | None:
    """Tokens a second a rank, relative to the same settings on the fewest ranks that were measured before; None where
    there are none."""
    same = [other for other in before if other.figures and other.case.settings == result.case.settings]
    if not result.figures or not same:
        return None
    fewest = min(same, key=lambda other: other.case.ranks)
    assert fewest.figures is not None
    return result.figures.tokens_per_second_a_device / fewest.figures.tokens_per_second_a_device
