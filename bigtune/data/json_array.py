"""One JSON array → its values, one after the other, without ever holding the whole file.

Values stay undecoded, for another process to decode; here the decoder only finds where they end. It is tried on
the text read so far; what it says near the end of that text may only be for want of the rest, and it is then
asked again with more of it.
"""

import codecs
import json
import re
from collections.abc import Iterable, Iterator

from bigtune.data.sources import UnreadableFile

MARGIN = 32  # characters; a number, a literal or an escape that is cut off is reported within so many of the end

_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()
_DIGITS = json.JSONDecoder(parse_int=len)  # for values whose integers Python refuses to convert


def read_array(pieces: Iterable[bytes], path: str, max_row: int) -> Iterator[bytes]:
    """The values of the array, as they are written, UTF-8 or not.

    Raises:
        UnreadableFile: the array is broken or cut off, or one value has more than `max_row` characters.
    """
    window, row = _Window(_texts(pieces)), 0
    try:
        window.take("[")
        if window.peek() == "]":
            window.take("]")
        else:
            closed = False
            while not closed:
                row += 1
                yield window.value(max_row)
                closed = window.take(",]") == "]"
        row = 0
        window.take("")
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        where = f"row {row}: " if row else ""
        raise UnreadableFile(f"{path}: neither JSONL nor a whole JSON array ({where}{reason}); mend the file") from None


def _texts(pieces: Iterable[bytes]) -> Iterator[str]:
    """What is no UTF-8 becomes half surrogate pairs, each of which stands for one byte."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
    for piece in pieces:
        yield decoder.decode(piece)
    yield decoder.decode(b"", final=True)


class _Window:
    """The part of the text that is being decoded: grows at its end, and loses what is done with."""

    def __init__(self, texts: Iterator[str]) -> None:
        self._texts = texts
        self._text, self._at, self._whole = "", 0, False

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            found = _SPACE.match(self._text, self._at)
            self._at = found.end() if found else self._at
            if self._at < len(self._text):
                return self._text[self._at]
            if self._whole:
                return ""
            self._grow()

    def take(self, allowed: str) -> str:
        """Step over the next character, one of these, or make sure of the end where none is allowed."""
        found = self.peek()
        if found != allowed and (not found or found not in allowed):
            wanted = " or ".join(map(repr, allowed)) or "nothing more"
            raise ValueError(f"{wanted} should follow, not {repr(found) if found else 'the end of the file'}")
        self._at += len(found)
        return found

    def value(self, max_row: int) -> bytes:
        """The next value."""
        self.peek()
        while True:
            problem = ""
            try:
                end = _end_of(self._text, self._at)
            except json.JSONDecodeError as error:
                problem = error.msg
                end = len(self._text) if problem.startswith("Unterminated string") else error.pos
            if self._whole or end + MARGIN <= len(self._text):
                break
            if len(self._text) - self._at > max_row:
                raise ValueError(f"more than {max_row:,} characters")
            self._grow()
        if problem:
            raise ValueError(problem)
        start, self._at = self._at, end
        return self._text[start:end].encode("utf-8", "surrogateescape")

    def _grow(self) -> None:
        """To twice the length at least, so that a long value is tried few times."""
        parts = [self._text[self._at :]]
        missing = max(len(parts[0]), 1)
        while missing > 0 and not self._whole:
            part = next(self._texts, None)
            self._whole = part is None
            parts.append(part or "")
            missing -= len(parts[-1])
        self._text, self._at = "".join(parts), 0


def _end_of(text: str, at: int) -> int:
    try:
        return _DECODER.raw_decode(text, at)[1]
    except json.JSONDecodeError:
        raise
    except ValueError:  # the one kind left: Python bounds the digits of an integer
        return _DIGITS.raw_decode(text, at)[1]
