"""One tree of errors that a user can mend. The command line prints each as one line, without a traceback.

A message says what is wrong, where (file, row, key, rank) and what to do. Anything else that is raised is
a bug of bigtune's own and keeps its traceback.
"""

from collections.abc import Mapping


class BigtuneError(Exception):
    """Base of every error that the user, not a developer, can mend."""


class ConfigError(BigtuneError):
    """The run file, an override or a DeepSpeed preset is wrong."""


class DataError(BigtuneError):
    """A source, a row, or a document store is wrong."""


class ModelError(BigtuneError):
    """A model folder cannot be read, or holds a model that bigtune cannot train exactly."""


class CheckpointError(BigtuneError):
    """A checkpoint cannot be written, read, or does not fit the run."""


class TrainError(BigtuneError):
    """Training cannot go on: what it computes is not finite, a step hangs, ranks differ, or memory runs out."""


class LostError(BigtuneError):
    """Other ranks, or what started this one, are gone: the cause is theirs."""


class LaunchError(BigtuneError):
    """Workers cannot be started as asked, or one of them failed."""


class UnfitError(LaunchError):
    """Hosts that a run cannot have, each with the reason: it may go on without them."""

    def __init__(self, bad: Mapping[str, str]) -> None:
        super().__init__("\n".join(f"{name}: {why}" for name, why in bad.items()))
        self.bad = dict(bad)


def counted(reasons: Mapping[str, int]) -> str:
    """Counts by reason, as messages tell them: `3 × empty text; 1 × not UTF-8`."""
    return "; ".join(f"{count:,} × {reason}" for reason, count in reasons.items() if count)


def count_of(number: int, what: str) -> str:
    """`1 core`, `2 cores`."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
