"""One line of bench.jsonl: a case with its figures, or with the reason why it has none."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bigtune.bench.figures import Figures
from bigtune.bench.sweep import Case
from bigtune.errors import ConfigError

FILE = "bench.jsonl"
BUSY = 0.1
"""Share of the cores from which on other processes are warned of."""


@dataclass(frozen=True, slots=True)
class Result:
    """A case and what became of it."""

    case: Case
    reason: str = ""  # why it was not measured, in one line; empty where it was
    figures: Figures | None = None
    micro_batch: int | None = None
    precision: str | None = None
    tflops: Mapping[str, float] = field(default_factory=dict)  # of all ranks by formula, palm and exact
    roof_tflops: Mapping[str, float | None] = field(default_factory=dict)  # of all ranks: measured, and datasheet
    mfu: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # by formula, the share of each known roof
    note: str = ""  # why operations were not counted, if so
    scaling_efficiency: float | None = None  # to the fewest ranks of the same settings
    busy_by_others: float | None = None  # share of the cores, 0 to 1
    tries: Sequence[Mapping[str, Any]] = ()  # of the largest micro batch
    run: Mapping[str, Any] = field(default_factory=dict)  # the resolved run file
    machine: Mapping[str, Any] = field(default_factory=dict)
    load_average: float | None = None  # of one minute, before the benchmark
    date: str = ""  # UTC

    @property
    def key(self) -> str:
        """Equal for the same case of two benchmarks."""
        return self.case.name

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dump`."""
        tree = asdict(self)
        return {"settings": dict(self.case.settings), "ranks": self.case.ranks} | {
            key: value for key, value in tree.items() if key != "case"
        }

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> "Result":
        """Raises KeyError or TypeError where the tree is no result."""
        rest = {key: value for key, value in tree.items() if key not in ("settings", "ranks", "figures")}
        figures = Figures(**tree["figures"]) if tree["figures"] else None
        return cls(case=Case(tree["settings"], tree["ranks"]), figures=figures, **rest)


def results_folder(run_file: Path) -> Path:
    """Where the results of a run file are added to, unless another place is named."""
    return Path("runs/bench") / run_file.stem


def read_results(path: Path) -> dict[str, Result]:
    """The results of a file by their key; of a case that was measured again, the last.

    Raises:
        ConfigError: there is no such file, or what is in it are no results.
    """
    path = path / FILE if path.is_dir() else path
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--compare {path}: cannot be read ({error}); give a {FILE} of bigtune bench") from None
    results = {}
    for number, line in enumerate(lines, 1):
        try:
            result = Result.from_json(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(f"--compare {path}, line {number}: no result of bigtune bench") from None
        results[result.key] = result
    if not results:
        raise ConfigError(f"--compare {path}: is empty; give a {FILE} of bigtune bench")
    return results
