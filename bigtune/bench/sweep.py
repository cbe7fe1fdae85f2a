"""Which cases are measured: the product of what `--sweep` and `--ranks` name.

micro_batch=1,2 deepspeed=zero2,zero3 --ranks 1,2    ▶    8 cases, ranks changing fastest
"""

import difflib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bigtune.config import Run
from bigtune.errors import ConfigError
from bigtune.runfile import dotted_keys, parse, to_line

MICRO_BATCH = "train.micro_batch"
LARGEST = "max"
"""As a value of `train.micro_batch`: the largest that fits."""
OWN = {
    "train.steps": "--steps and --warm-up say how many there are",
    "train.epochs": "--steps and --warm-up say how many steps there are",
    "output": "each case has a folder of its own in --output",
    "checkpoint": "no checkpoint is written",
}
"""What the benchmark sets itself, and why nothing else may."""


@dataclass(frozen=True, slots=True)
class Case:
    """What one run of a benchmark differs in from the run file. `settings` has full keys in the order of the sweep."""

    settings: Mapping[str, Any]
    ranks: int

    @property
    def overrides(self) -> list[str]:
        """As `--set` takes them, but for a micro batch that is to be found."""
        return [f"{key}={to_line(value)}" for key, value in self.settings.items() if not self.is_search_of(key)]

    @property
    def searches(self) -> bool:
        """Whether the micro batch is to be found."""
        return self.is_search_of(MICRO_BATCH)

    def is_search_of(self, key: str) -> bool:
        """Whether the value of a key is to be found."""
        return key == MICRO_BATCH and self.settings.get(key) == LARGEST

    @property
    def name(self) -> str:
        """For people: `train.micro_batch=2 deepspeed=zero3, ranks 1`."""
        told = " ".join(f"{key}={to_line(value)}" for key, value in self.settings.items())
        return f"{told or 'as the run file'}, ranks {self.ranks}"


def cases_of(sweep: Sequence[str], ranks: Sequence[int]) -> list[Case]:
    """All cases, in the order given.

    Args:
        sweep: each as `key=value,value`, the key in full or its unambiguous end.

    Raises:
        ConfigError: a key is unknown, ambiguous, given twice or the benchmark's own; or there is no value.
    """
    swept: dict[str, list[Any]] = {}
    for item in sweep:
        name, equals, values = item.partition("=")
        if not equals or not values.strip():
            raise ConfigError(f"--sweep {item}: write key=value,value")
        key = full_key(name.strip())
        if key in swept:
            raise ConfigError(f"--sweep {item}: {key} is given twice; name all its values at once")
        swept[key] = [parse(value, f"--sweep {key}") for value in _split(values)]
    return [
        Case(dict(zip(swept, values, strict=True)), count)
        for values in itertools.product(*swept.values())
        for count in sorted(set(ranks))  # the fewest first: the others are compared with them
    ]


def parse_ranks(text: str) -> list[int]:
    """`1,2,4` as numbers.

    Raises:
        ConfigError: one is no number from 1.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ConfigError(f"--ranks {text}: write numbers from 1, as in --ranks 1,2,4")
    return [int(part) for part in parts]


def full_key(name: str) -> str:
    """The key of the run file that a name means: itself, or the only key that ends in it.

    Raises:
        ConfigError: it means none, several, or one that the benchmark sets itself.
    """
    keys = list(dotted_keys(Run))
    found = [name] if re.sub(r"\.\d+(?=\.|$)", ".0", name) in keys else _ending(name, keys)
    if not found:
        ends = {end: key for key in keys if ".0." not in key for end in (key, key.rsplit(".", 1)[-1])}
        near = dict.fromkeys(ends[end] for end in difflib.get_close_matches(name, ends, n=3, cutoff=0.6))
        hint = f"; near are {', '.join(near)}" if near else "; docs/run-file.md lists all"
        raise ConfigError(f"--sweep {name}: no key of the run file{hint}")
    if len(found) > 1:
        raise ConfigError(f"--sweep {name}: may mean {', '.join(found)}; write the one that is meant")
    for own, why in OWN.items():
        if found[0] == own or found[0].startswith(f"{own}."):
            raise ConfigError(f"--sweep {found[0]}: bench sets it itself: {why}")
    return found[0]


def _ending(name: str, keys: Sequence[str]) -> list[str]:
    """Keys that end in a name; what is in a list is left out, for such a name does not say where."""
    return [key for key in keys if key.endswith(f".{name}") and ".0." not in key]


def _split(values: str) -> Iterator[str]:
    """At the commas that are in no bracket."""
    depth, start = 0, 0
    for at, sign in enumerate(values):
        depth += (sign in "[{") - (sign in "]}")
        if sign == "," and not depth:
            yield values[start:at]
            start = at + 1
    yield values[start:]
