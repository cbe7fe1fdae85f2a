"""Where a worker's words go: its own log file, and from rank 0 the terminal as well.

Anything that libraries write to a worker's standard streams goes to `logs/rank-N.log`, so that a terminal
shows one clean account of the run. `logs/rank-N.step` has the numbers of the rank's last step, `logs/rank-N.error` why
it failed.
"""

import errno
import json
import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path

from bigtune.dist import CHILD, World
from bigtune.errors import BigtuneError, LaunchError, LostError
from bigtune.plain import plain
from bigtune.process import LOST_OTHERS, USERS_ERROR
from bigtune.progress import Bar

SCREEN = "BIGTUNE_SCREEN"
"""Set to `all`, every rank speaks to the terminal, not the first alone."""
STEP_BYTES = 300
"""More than a step's line has: a longer one leaves nothing behind a shorter."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
LOST_RANK = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
"""What gloo and NCCL say of a rank that is gone; its own words, or its silence, are the cause."""


class WorkerConsole:
    """The streams of one worker."""

    def __init__(self, output: Path, world: World) -> None:
        """Send standard output and error to the log file, and keep the terminal at hand.

        Raises:
            LaunchError: the output folder cannot be written.
        """
        logs = output / "logs"
        self.world, self.output, self.failed = world, output, False
        self.error_file = logs / f"rank-{world.rank}.error"
        step_file = self.error_file.with_suffix(".step")
        try:
            logs.mkdir(parents=True, exist_ok=True)
            self.error_file.unlink(missing_ok=True)
            self._step_file = os.open(step_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            log = os.open(logs / f"rank-{world.rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise LaunchError(f"output: {output.absolute()} cannot be written: {error.strerror}") from None
        self.terminal = os.fdopen(os.dup(1), "w", buffering=1)
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(log, 1)
        os.dup2(log, 2)

    def say(self, text: str) -> None:
        """One line for the log, and from rank 0 for the terminal."""
        print(text, flush=True)
        if self.world.is_main or os.environ.get(SCREEN) == "all":
            print(text, file=self.terminal, flush=True)

    def keep_step(self, **line: float) -> None:
        """Keep what this rank's last step gave, for whoever looks into its end: `logs/rank-N.step`, one line."""
        with suppress(OSError):  # a full disk is told by what must be written
            os.pwrite(self._step_file, json.dumps(plain(line)).ljust(STEP_BYTES).encode() + b"\n", 0)

    def bar(self, stage: str) -> Bar | None:
        """A progress bar on rank 0's terminal."""
        return Bar(stage, self.terminal) if self.world.is_main else None

    def fail(self, error: BaseException) -> int:
        """Record why this worker ends: one line for what a user can mend, with the traceback for a bug of ours.

        Returns:
            The exit code that tells launchers whether the cause is here, and whether the same would fail again.
        """
        code, self.failed = _code(error), True
        if isinstance(error, BigtuneError):
            line = told = str(error)
        elif isinstance(error, OSError) and error.errno in NO_ROOM:
            line = told = f"{self.output}: {error.strerror}; make room, and the same command goes on from the last save"
        else:
            log = self.error_file.with_suffix(".log")
            line = f"{type(error).__name__}: {error} (a bug of bigtune; the traceback is in {log})"
            told = "".join(traceback.format_exception(error))
        with suppress(OSError):
            print(told, file=sys.stderr, flush=True)
            self.error_file.write_text(line + "\n", encoding="utf-8")
        if CHILD not in os.environ:
            print(f"Error: rank {self.world.rank}: {line}", file=self.terminal, flush=True)
        return code


def _code(error: BaseException) -> int:
    if isinstance(error, LostError) or any(words in str(error) for words in LOST_RANK):
        return LOST_OTHERS
    mended = isinstance(error, BigtuneError) or (isinstance(error, OSError) and error.errno in NO_ROOM)
    return USERS_ERROR if mended else 1
