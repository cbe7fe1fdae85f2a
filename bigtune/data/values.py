"""What a raw row may hold: every check ends in the value that was asked for, or in a `BadRow` that says why not."""

import json
import math
from collections.abc import Mapping
from typing import Any

BOM = b"\xef\xbb\xbf"
MAX_DEPTH = 64  # of what is handed on as it is: tool calls and tools


class BadRow(Exception):
    """One row cannot be used. `reason` is what it is counted under, `detail` what its own message adds."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)  # both, so that it can be pickled
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return self.reason + self.detail


def decode_line(line: bytes) -> Any:
    """The value of a row of JSON.

    Raises:
        BadRow: it is no UTF-8 or no JSON.
    """
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow("not UTF-8", f" (byte {error.start + 1} of the row)") from None
    except json.JSONDecodeError as error:
        whole = "; a row is one line, unless the file is an array" if line.strip() in (b"{", b"[") else ""
        raise BadRow("broken JSON", f" ({error.msg}, column {error.colno}{whole})") from None
    except RecursionError:
        raise BadRow("broken JSON", " (nested too deeply)") from None
    except ValueError:  # the one kind left: Python bounds the digits of an integer
        raise BadRow("broken JSON", " (an integer of thousands of digits)") from None


def present(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row without its null values: columns of a table are null where a row of another file has no key."""
    return {key: value for key, value in row.items() if value is not None}


def string_at(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise wrong_type(key, value, "a string")
    return value


def list_at(row: Mapping[str, Any], key: str, what: str = "objects") -> list[Any]:
    """A list, or the JSON text of one, which is how tables without nested columns carry it; absent is empty."""
    value = row.get(key)
    if value is None or value == "":
        return []
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, list):
        raise BadRow("wrong type of value", f": '{key}' is no list of {what}")
    return value


def objects_at(row: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    if key not in row:
        return []
    values = list_at(row, key)
    if not all(isinstance(value, dict) for value in values):
        raise BadRow("wrong type of value", f": '{key}' is no list of objects")
    return values


def wrong_type(key: str, value: Any, wanted: str) -> BadRow:
    return BadRow("wrong type of value", f": '{key}' is {kind_of(value)}, not {wanted}")


def check_text(*texts: str) -> None:
    """Refuse what no one means: NUL bytes, and half surrogate pairs, which JSON can spell and UTF-8 cannot.

    Raises:
        BadRow: one of the texts holds either.
    """
    for text in texts:
        if "\0" in text:
            raise BadRow("NUL byte", f" (character {text.index(chr(0)) + 1} of a text)")
        if not text.isascii():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                raise BadRow("broken Unicode", " (a lone surrogate, \\ud800 to \\udfff)") from None


def check_plain(value: Any, key: str, depth: int = 0) -> None:
    """Refuse what templates or JSON files do not take, in a value that is handed on as it is.

    Raises:
        BadRow: it holds NaN, a broken text, a type that JSON does not know, or is nested without end.
    """
    if depth > MAX_DEPTH:
        raise BadRow("nested too deeply", f" ('{key}', more than {MAX_DEPTH} levels)")
    if isinstance(value, str):
        check_text(value)
    elif isinstance(value, list):
        for part in value:
            check_plain(part, key, depth + 1)
    elif isinstance(value, dict):
        for name, part in value.items():
            check_plain(name, key, depth + 1)
            check_plain(part, key, depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise BadRow("wrong type of value", f": '{key}' holds {value}, which is no number")
    elif value is not None and not isinstance(value, bool | int | float):
        raise BadRow("wrong type of value", f": '{key}' holds {kind_of(value)}")


def kind_of(value: Any) -> str:
    """The JSON name of a value's type; a missing key reads as null."""
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        bytes: "binary data",
        type(None): "missing or null",
    }
    return names.get(type(value), f"a {type(value).__name__}")


def shown(value: object) -> str:
    """A value as an error message quotes it: on one line, and short."""
    if not isinstance(value, str):
        return kind_of(value)
    text = repr(value[:60])
    return text if len(value) <= 60 and len(text) <= 70 else text[:67] + "…"
