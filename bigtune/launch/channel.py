"""What a launcher and its agents say to each other: a JSON object a line, both ways, an empty one to show life.

Orders:
    setup    {folder, environment, deserted}: where processes run, what their environment has besides the agent's own,
             and the command that the agent becomes where its launcher falls silent
    start    [{name, command, environment, capture, log, error, step}]: the last three are files of a worker's words
    signal   a number, for every process
    end      {signal, grace}: the same, and SIGKILL after so many seconds

Events:
    hello    true: ready for orders
    failed   why it is not
    output   {name, text}: a line that a process printed
    exit     {name, code, error, step, tail}: a process has ended, a signal's number negative; what those files say, of
             the log its end, where it failed
    told     a signal that asked the agent itself to end
    leaves   why it ends all its processes unasked
"""

import json
from typing import Any

BEAT_SECONDS = 1.0
SILENT_SECONDS = 10.0
"""Without a sign of life, of either side, the other is taken for dead."""

Order = dict[str, Any]
Event = dict[str, Any]


def encode(message: dict[str, Any]) -> bytes:
    """One line."""
    return json.dumps(message).encode() + b"\n"


def decode(line: bytes) -> dict[str, Any]:
    """What a line says; nothing where it is none of ours, as what a login shell prints."""
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
