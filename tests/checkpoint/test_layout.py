"""The layout says for every element of every parameter where it lies, once, whatever the number of ranks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bigtune.checkpoint.layout import Layout, Parameter, State, SubGroup
from bigtune.errors import CheckpointError

SHAPES = {"whole": (8, 15), "odd": (7, 3), "few": (3,), "one": (1,)}
"""120 elements divide by all of 1 … 5 ranks; 3 and 1 leave ranks without any."""


def layout(world_size: int) -> Layout:
    """ZeRO-3's: a window a parameter."""
    parameters, offset = [], 0
    for name, shape in SHAPES.items():
        numel = Parameter(name, shape, 0, 0).numel
        parameters.append(Parameter(name, shape, offset, -(-numel // world_size)))
        offset += parameters[-1].length
    return of_halves(world_size, parameters[:2], parameters[2:])


def even_cuts(world_size: int) -> Layout:
    """ZeRO-2's: parameter behind parameter, with a gap before the last, as alignment leaves one; then cut evenly."""
    halves = []
    for names in (("whole", "odd"), ("few", "one")):
        numels = [Parameter(name, SHAPES[name], 0, 0).numel for name in names]
        length = -(-(sum(numels) + 1) // world_size)
        halves.append([Parameter(name, SHAPES[name], 0, length, i * (numels[0] + 1)) for i, name in enumerate(names)])
    return of_halves(world_size, *halves)


def of_halves(world_size: int, *halves: list[Parameter]) -> Layout:
    states = {"state1": State("uint8", 1), "absmax1": State("float32", 256)}
    groups = tuple(
        SubGroup(index, name, max(p.offset + p.length for p in part), tuple(part), states, {"step": 3.0})
        for index, (name, part) in enumerate(zip(("matrices", "vectors"), halves, strict=True))
    )
    return Layout(world_size, "bfloat16", groups, {"lm_head.weight": "whole"}, {"whole": {"a": (60,), "b": (5, 12)}})


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("kind", [layout, even_cuts])
def test_ranges_cover_each_parameter_once_without_padding(kind: Callable[[int], Layout], world_size: int) -> None:
    described = kind(world_size)
    taken: set[tuple[int, int, int]] = set()
    assert [parameter.name for _, parameter in described.parameters()] == list(SHAPES)
    for sub_group, parameter in described.parameters():
        covered: list[int] = []
        for piece in described.ranges(sub_group, parameter):
            assert 0 <= piece.rank < world_size
            assert piece.sub_group == sub_group.index
            assert parameter.offset <= piece.offset
            assert piece.offset + piece.count <= parameter.offset + parameter.length
            covered += range(piece.start, piece.start + piece.count)
            places = {(piece.rank, piece.sub_group, place) for place in range(piece.offset, piece.offset + piece.count)}
            assert not places & taken
            taken |= places
        assert covered == list(range(parameter.numel))


@pytest.mark.parametrize("saved", [1, 2, 3, 5])
@pytest.mark.parametrize("live", [1, 2, 4, 5])
@pytest.mark.parametrize("kinds", [(layout, layout), (layout, even_cuts), (even_cuts, layout), (even_cuts, even_cuts)])
def test_segments_lead_from_any_layout_to_any_other(kinds: tuple[Any, Any], saved: int, live: int) -> None:
    """Elements that are moved along them are each in its place: numbers stand for the elements of the parameters."""
    source, target = kinds[0](saved), kinds[1](live)
    numbers = {name: 1000 * i for i, name in enumerate(SHAPES, 1)}
    partitions = {(rank, group.index): [-1] * group.numel for rank in range(saved) for group in source.sub_groups}
    for group, parameter in source.parameters():
        for piece in source.ranges(group, parameter):
            first = numbers[parameter.name] + piece.start
            partitions[piece.rank, group.index][piece.offset : piece.offset + piece.count] = range(
                first, first + piece.count
            )
    for rank in range(live):
        for group in target.sub_groups:
            moved = [-1] * group.numel
            for segment in target.segments(group, rank, source):
                at = segment.source
                assert at.count > 0
                assert moved[segment.offset : segment.offset + at.count] == [-1] * at.count
                moved[segment.offset : segment.offset + at.count] = partitions[at.rank, at.sub_group][at.offset :][
                    : at.count
                ]
            wanted = [-1] * group.numel
            for parameter in group.parameters:
                for piece in target.ranges(group, parameter):
                    if piece.rank == rank:
                        first = numbers[parameter.name] + piece.start
                        wanted[piece.offset : piece.offset + piece.count] = range(first, first + piece.count)
            assert moved == wanted


def test_ranks_that_hold_nothing_of_a_parameter_have_no_range() -> None:
    described = layout(5)
    ranks = {p.name: [piece.rank for piece in described.ranges(group, p)] for group, p in described.parameters()}
    assert ranks == {"whole": [0, 1, 2, 3, 4], "odd": [0, 1, 2, 3, 4], "few": [0, 1, 2], "one": [0]}


def test_a_border_may_pass_through_a_parameter() -> None:
    """142 elements on 3 ranks, 48 each: the first parameter ends on the last rank, and the second begins there."""
    described = even_cuts(3)
    group = described.sub_groups[0]
    pieces = {
        p.name: [(r.rank, r.offset, r.start, r.count) for r in described.ranges(group, p)] for p in group.parameters
    }
    assert pieces == {"whole": [(0, 0, 0, 48), (1, 0, 48, 48), (2, 0, 96, 24)], "odd": [(2, 25, 0, 21)]}


def test_a_scalar_parameter_has_one_element() -> None:
    parameter = Parameter("scale", (), 0, 1)
    described = Layout(2, "float32", (SubGroup(0, "vectors", 1, (parameter,), {}, {}),), {}, {})
    assert [piece.count for piece in described.ranges(described.sub_groups[0], parameter)] == [1]


@pytest.mark.parametrize("kind", [layout, even_cuts])
def test_what_was_written_is_read(tmp_path: Path, kind: Callable[[int], Layout]) -> None:
    kind(3).write(tmp_path)
    assert Layout.read(tmp_path) == kind(3)


def test_another_version_is_refused(tmp_path: Path) -> None:
    layout(1).write(tmp_path)
    document = json.loads((tmp_path / "layout.json").read_text())
    (tmp_path / "layout.json").write_text(json.dumps(document | {"version": 1}))
    with pytest.raises(CheckpointError, match=r"layout\.json: version 1; this bigtune reads version 2"):
        Layout.read(tmp_path)


def test_a_missing_layout_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^/.*: no layout\.json; this is no bigtune checkpoint"):
        Layout.read(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 2}', '{"version": 2, "world_size": 1, "dtype": "x"}'])
def test_a_broken_layout_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "layout.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"layout\.json: broken layout"):
        Layout.read(tmp_path)


def test_an_entry_that_lacks_a_field_is_broken(tmp_path: Path) -> None:
    layout(1).write(tmp_path)
    document = json.loads((tmp_path / "layout.json").read_text())
    del document["sub_groups"][0]["parameters"][0]["offset"]
    (tmp_path / "layout.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="broken layout"):
        Layout.read(tmp_path)
