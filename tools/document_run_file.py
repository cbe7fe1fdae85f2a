"""Write docs/run-file.md from the sections of bigtune/config.py; a test holds the two together."""

import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from bigtune.config import Run, Source

HEAD = """# The run file

Every key, from `bigtune/config.py`. An unknown key, a wrong type, a bad range, or keys that contradict each other are
an error that names them. Relative paths are relative to the directory that a command is started in.

"""


def document() -> str:
    """The page as Markdown."""
    return HEAD + _table(Run) + "".join(_sections(Run))


def _sections(parent: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """A heading and a table for each section within another, in reading order; each kind of source once."""
    for name, field in parent.model_fields.items():
        section = _section(field.annotation)
        if section is not None and not (prefix == "evaluate." and section is Source):
            yield f"\n## {prefix}{name}\n{section.__doc__}\n\n{_table(section)}"
            yield from _sections(section, f"{prefix}{name}.")


def _table(section: type[BaseModel]) -> str:
    lines = ["| key | default | what |", "| --- | --- | --- |"]
    for name, field in section.model_fields.items():
        if _section(field.annotation) is None or field.description:  # other sections have tables of their own
            default = "required" if field.default is PydanticUndefined else f"`{_plain(field.default)}`"
            told = [part for part in (_allowed(field), field.description) if part]
            lines.append(f"| `{name}` | {default} | {'; '.join(told)} |")
    return "\n".join(lines) + "\n"


def _section(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_section, typing.get_args(annotation))), None)


def _plain(value: Any) -> str:
    return "none" if value is None else str(list(value) if isinstance(value, tuple) else value)


def _allowed(field: FieldInfo) -> str:
    """The choices, or the bounds."""
    if typing.get_origin(field.annotation) is typing.Literal:
        return " or ".join(f"`{choice}`" for choice in typing.get_args(field.annotation))
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    bounds = [
        (sign, getattr(limit, name)) for limit in field.metadata for name, sign in signs.items() if hasattr(limit, name)
    ]
    return " and ".join(f"{sign} {bound:,}" for sign, bound in bounds)


if __name__ == "__main__":
    Path("docs/run-file.md").write_text(document(), encoding="utf-8")
