"""`bigtune chat`: a conversation in a terminal, or one answer."""

import re
import sys
from contextlib import suppress
from pathlib import Path

from bigtune.errors import BigtuneError
from bigtune.evaluate.chat import Chat
from bigtune.visible import visible

HELP = """/reset          forget what was said
/system TEXT    begin anew with another system prompt
/save FILE      append the conversation to a file, as a row of instruction data
/quit           or Ctrl-D; Ctrl-C ends an answer"""


def answer(chat: Chat, prompt: str) -> None:
    """One answer, on standard output alone."""
    chat.ask(prompt, _show)
    print()


def converse(chat: Chat, name: str) -> None:
    """Until the user leaves."""
    with suppress(ImportError):  # editing and history of lines, where Python has it
        import readline  # noqa: F401
    told = f"{name} · {chat.format.name} template · /help"
    print(told, file=sys.stderr)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print(file=sys.stderr)
            continue
        if line == "/quit":
            return
        try:
            if line.startswith("/"):
                print(_obey(chat, line), file=sys.stderr)
            elif line:
                chat.ask(line, _show)
                print()
        except BigtuneError as error:
            print(f"Error: {error}", file=sys.stderr)


def _obey(chat: Chat, line: str) -> str:
    """Do what a line that begins with / asks; what came of it."""
    command, _, rest = line.partition(" ")
    rest = rest.strip()
    if command == "/reset":
        chat.reset()
        return "forgotten"
    if command == "/system":
        chat.reset(rest)
        return "begun anew"
    if command == "/save" and rest:
        chat.save(Path(rest))
        return f"{len(chat.messages)} turns are in {rest}"
    return HELP


def _show(piece: str) -> None:
    """Without what would upset a terminal; line ends and tabs are meant."""
    print(re.sub(r"[^\n\t]+", lambda found: visible(found[0]), piece), end="", flush=True)
