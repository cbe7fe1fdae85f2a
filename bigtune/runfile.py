"""The run file, read and written: YAML ⇄ the sections of `config.py`. What is wrong with it is told in one line.

    RUN.yaml ──read──▶ mapping ──overrides──▶ mapping ──validate──▶ Run (frozen)

Relative paths in a run file are relative to the directory that the command is started in. This module
imports neither torch nor any stage, so that `bigtune --help` and a bad run file answer at once.
"""

import difflib
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from bigtune.config import Run
from bigtune.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-3 as a number (YAML 1.2) and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key.value}' is given twice", key.start_mark
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else "")
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that `_Loader` would read as something else."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+0123456789."),
    )


def parse(text: str, where: str) -> Any:
    """YAML as values.

    Raises:
        ConfigError: it is none; `where` says what it is of.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise ConfigError(f"{where}: not valid YAML: nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # the latter for what looks like a date and is none
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{where}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from None


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> Run:
    """Read a run file and apply overrides of the form `section.key=value`.

    Raises:
        ConfigError: the file is missing or no YAML, a key is unknown, a value has the wrong type or range.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such run file (looked in {Path.cwd()})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the run file cannot be read: {error}") from None
    tree = parse(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a run file is a mapping of sections (model, data, train, …)")
    for override in overrides:
        _apply(tree, override)
    return resolve(tree, str(path))


def resolve(tree: Mapping[str, Any], where: str = "run") -> Run:
    """Validate a mapping of sections.

    Raises:
        ConfigError: names every wrong key, the nearest valid one, and what is allowed.
    """
    try:
        return Run.model_validate(dict(tree))
    except ValidationError as error:
        # A list with a wrong item is said to be too short as well.
        inner = {problem["loc"][:depth] for problem in error.errors() for depth in range(len(problem["loc"]))}
        problems = [each for each in error.errors() if each["type"] != "too_short" or each["loc"] not in inner]
        raise ConfigError(f"{where}: " + "; ".join(map(_explain, problems))) from None


def to_yaml(run: Run) -> str:
    """The resolved run file, every default written out."""
    return yaml.dump(run.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def to_line(value: Any) -> str:
    """One value as YAML on one line, which `parse` reads back."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=float("inf"), allow_unicode=True)
    return text.removesuffix("...\n").strip()


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"--set {override}: write section.key=value")
    node: Any = tree
    for depth, part in enumerate(parts[:-1]):
        if isinstance(node, list):
            node = node[_index(node, part, override)]
        else:
            if node.get(part) is None:
                node[part] = {}  # a section that the file leaves out
            node = node[part]
        if not isinstance(node, dict | list):
            raise ConfigError(f"--set {override}: {'.'.join(parts[: depth + 1])} is a value, not a section")
    parsed = parse(value, f"--set {key}")
    if isinstance(node, list):
        node[_index(node, parts[-1], override)] = parsed
    else:
        node[parts[-1]] = parsed


def _index(node: list[Any], part: str, override: str) -> int:
    if part.isdigit() and int(part) < len(node):
        return int(part)
    raise ConfigError(f"--set {override}: '{part}' is no position in a list of {len(node)}")


def _explain(problem: Mapping[str, Any]) -> str:
    """One clause for one pydantic error."""
    where = problem["loc"]
    dotted = ".".join(map(str, where))
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key '{dotted}'{_nearest(where)}"
    if kind == "missing":
        return f"'{dotted}' is missing"
    given = repr(problem["input"])
    given = given if len(given) <= 60 else given[:57] + "..."
    if kind == "literal_error":
        return f"'{dotted}' is {given}; allowed: {context['expected']}"
    if kind == "value_error":
        return f"'{dotted}': {context['error']}" if where else str(context["error"])
    return f"'{dotted}' is {given}; {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _nearest(where: Sequence[str | int]) -> str:
    section: type[BaseModel] | None = Run
    for part in where[:-1]:
        if section is not None and isinstance(part, str):
            section = _section_of(section.model_fields[part].annotation) if part in section.model_fields else None
    if section is None:
        return ""
    keys = list(section.model_fields)
    close = difflib.get_close_matches(str(where[-1]), keys, n=1, cutoff=0.5)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    elsewhere = [dotted for dotted in dotted_keys(Run) if dotted.split(".")[-1] == where[-1]]
    if not close and elsewhere:
        hint = f"; did you mean '{elsewhere[0]}'?"
    return f"{hint} (valid: {', '.join(keys)})"


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_section_of, typing.get_args(annotation))), None)


def dotted_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key as `--set` has it; of what is in a list, the first one's."""
    for name, field in section.model_fields.items():
        yield prefix + name
        inner = _section_of(field.annotation)
        if inner is not None:
            yield from dotted_keys(inner, f"{prefix}{name}." + "0." * _is_list(field.annotation))


def _is_list(annotation: Any) -> bool:
    return typing.get_origin(annotation) is tuple or any(map(_is_list, typing.get_args(annotation)))
