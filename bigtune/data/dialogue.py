"""The turns of one raw row: who speaks, what is said and called, and whether the order makes sense."""

import itertools
import json
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from bigtune.data.conversation import Message
from bigtune.data.values import BadRow, check_plain, check_text, objects_at, present, shown, string_at, wrong_type

# Names that data sets have for the four roles.
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatbot", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response", "function"), "tool"),
    "function_call": "assistant",  # whose value is the call, as JSON
}
# Empty is the beginning; that an assistant does not begin is said in its own words.
MAY_FOLLOW = {
    "system": ("",),
    "user": ("", "system", "assistant", "tool"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
KEPT = ("name", "tool_call_id", "reasoning_content", "thinking")  # strings that chat templates know


def message_of(turn: Mapping[str, Any], roles: Mapping[str, str], keys: tuple[str, str]) -> Message:
    """One turn, with its role under the first key and what is said under the second.

    Raises:
        BadRow: the role is unknown, or a value has the wrong type.
    """
    turn = present(turn)
    name = string_at(turn, keys[0])
    role = roles.get(name)
    if role is None:
        raise BadRow("unknown role", f" {shown(name)} (known: {', '.join(roles)}; name others in the source's roles)")
    extra: dict[str, Any] = {key: string_at(turn, key) for key in KEPT if key in turn}
    calls = [_call(call) for call in objects_at(turn, "tool_calls")]
    if "function_call" in turn:
        calls.append(_call(turn["function_call"]))
    if name == "function_call" and role == "assistant":
        calls += _spoken_calls(string_at(turn, keys[1]))
        content = ""
    else:
        content = _content(turn, keys[1], optional=bool(calls))
    if calls:
        extra["tool_calls"] = calls
    check_text(content)
    for key, value in extra.items():
        check_plain(value, key)
    return Message(role, content, _weight(turn), extra)


def check_turns(messages: Sequence[Message]) -> None:
    """Refuse what no one would say.

    Raises:
        BadRow: no turns, turns out of order, nothing to learn, or an assistant that says and calls nothing.
    """
    if not messages:
        raise BadRow("empty conversation")
    answers = [message for message in messages if message.role == "assistant"]
    if not answers and not any(message.weight for message in messages):
        raise BadRow("no assistant turn")
    _check_order(messages)
    if not all(answer.content.strip() or "tool_calls" in answer.extra for answer in answers):
        raise BadRow("empty answer")


def _check_order(messages: Sequence[Message]) -> None:
    said = [message.role for message in messages]
    begun = said[1:] if said[0] == "system" else said
    if begun and begun[0] == "assistant":
        raise BadRow("assistant turn first", "" if begun is said else " after the system turn")
    for number, (before, role) in enumerate(itertools.pairwise(["", *said]), start=1):
        if before not in MAY_FOLLOW[role]:
            place = f"after {before}" if before else "first"
            raise BadRow("roles out of order", f" (turn {number}: {role} {place})")


def _content(turn: Mapping[str, Any], key: str, optional: bool) -> str:
    """A string, or the texts of a list of parts end to end; may be missing beside a tool call."""
    value = turn.get(key)
    if value is None and optional:
        return ""
    if not isinstance(value, list):
        return string_at(turn, key)
    texts = []
    for part in value:
        if not isinstance(part, dict):
            raise BadRow("wrong type of value", f": '{key}' is no list of parts")
        if part.get("type") != "text":
            raise BadRow("content that is not text", f" (a part of type {shown(part.get('type'))})")
        texts.append(string_at(part, "text"))
    return "".join(texts)


def _weight(turn: Mapping[str, Any]) -> float | None:
    """What the turn says of its part in the loss: `weight`, and none of it where `train` is false."""
    train, weight = turn.get("train"), turn.get("weight")
    if train is None and weight is None:
        return None
    if not isinstance(train, bool | None):
        raise wrong_type("train", train, "a boolean")
    if weight is None:
        weight = 1.0
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise wrong_type("weight", weight, "a number")
    try:
        kept = struct.unpack("f", struct.pack("f", float(weight)))[0]  # in 32 bits, as documents keep it
    except OverflowError:
        kept = math.inf
    if not 0 <= kept < math.inf or (weight and not kept):  # NaN is neither
        raise BadRow("wrong type of value", f": 'weight' is {weight}, not 0 or a positive number of 32 bits")
    return 0.0 if train is False else float(kept)


def _spoken_calls(text: str) -> list[dict[str, Any]]:
    """The calls of a turn that is nothing but JSON: one, or a list."""
    value = _decoded(text)
    return [_call(call) for call in (value if isinstance(value, list) else [value])]


def _call(call: Any) -> dict[str, Any]:
    """A tool call in the form that chat templates take, its arguments an object."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow("broken tool call", " (no function with a name)")
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        arguments = _decoded(arguments)
    if arguments is None or arguments == "":
        arguments = {}
    if not isinstance(arguments, dict):
        raise BadRow("broken tool call", f" (the arguments of {shown(function['name'])} are no object)")
    made: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if function is not call and call.get("id") is not None:
        made["id"] = string_at(call, "id")
    return made


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise BadRow("broken tool call", " (not JSON)") from None
