"""Where a model's parameters lie in its files, under the names and in the pieces that the files have.

Files and model differ where transformers renames tensors on load, and where it lays several end to end, as with
mixtures of experts, whose files hold each expert apart:

    …experts.gate_up_proj [2, 2F, D]  =  …experts.0.w1 ‖ …experts.0.w3 ‖ …experts.1.w1 ‖ …experts.1.w3

Such a parameter is read by ranges of its elements all the same, and no rank ever holds a whole group. The rules are
transformers' own (`transformers.conversion_mapping`), for the ways of joining that keep a tensor's elements together.

Shapes: F expert width, D model width.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, rename_source_key

from bigtune.errors import ModelError
from bigtune.model.shards import Shards

Shape = tuple[int, ...]
Pieces = tuple[str, ...]
"""Names of the files' tensors that make a parameter, in the order of its elements."""


class Weights:
    """A model's tensors in the files of its folder, under the model's own names."""

    def __init__(self, shards: Shards, pieces: Mapping[str, Pieces], shapes: Mapping[str, Shape] = {}) -> None:
        """Of tensors that are known already: see `of`."""
        self.shards, self.pieces = shards, dict(pieces)
        self._shapes, self._buffers = dict(shapes), tuple[str, ...]()

    @classmethod
    def of(cls, model: PreTrainedModel, folder: Path, grown: Collection[str] = ()) -> "Weights":
        """Read the headers of all files, and fit them to the model; no tensor is read.

        Args:
            grown: parameters that may have fewer rows in the files than in the model.

        Raises:
            ModelError: no readable files, tensors that are missing or misshapen, or joined in a way that is not known.
        """
        shards, buffers = Shards(folder), saved_buffers(model)
        shapes = {name: tuple(tensor.shape) for name, tensor in (*model.named_parameters(), *buffers.items())}
        weights = cls(shards, _pieces(model, shards, set(shapes)), shapes)
        weights._buffers = tuple(buffers)
        weights._check(shapes, grown)
        return weights

    @property
    def joined(self) -> dict[str, dict[str, Shape]]:
        """Parameters that the files hold under other names or in pieces: name → the shape of each piece."""
        return {
            name: {
                piece: self._shapes[name] if len(pieces) == 1 else self.shards.places[piece].shape for piece in pieces
            }
            for name, pieces in self.pieces.items()
            if pieces != (name,)
        }

    def rows(self, name: str) -> int:
        """Of a parameter that the files hold in one piece."""
        (piece,) = self.pieces[name]
        return self.shards.places[piece].shape[0]

    def read(self, name: str, start: int, count: int, out: torch.Tensor) -> None:
        """Fill `out[:count]` with elements start … start + count of a parameter, flattened, cast to its dtype."""
        sizes = [prod(self.shards.places[piece].shape) for piece in self.pieces[name]]
        for piece, size, end in zip(self.pieces[name], sizes, accumulate(sizes), strict=True):
            first, last = max(start, end - size), min(start + count, end)
            if first < last:
                self.shards.read(piece, first - (end - size), last - first, out[first - start : last - start])

    def saved_buffers(self) -> dict[str, torch.Tensor]:
        """What the files hold beside parameters, which training does not change, as it is there."""
        held = {}
        for name in self._buffers:
            for piece in self.pieces[name]:
                place = self.shards.places[piece]
                held[piece] = torch.empty(place.shape, dtype=place.dtype)
                self.shards.read(piece, 0, prod(place.shape), held[piece].view(-1))
        return held

    def _check(self, wanted: Mapping[str, Shape], grown: Collection[str]) -> None:
        missing = [name for name in wanted if name not in self.pieces]
        if missing:
            shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            raise ModelError(f"{self.shards.folder}: the files lack {len(missing)} tensors of the model: {shown}")
        for name, shape in wanted.items():
            shapes = [self.shards.places[piece].shape for piece in self.pieces[name]]
            found, number = " and ".join(str(list(one)) for one in sorted(set(shapes))), len(shapes)
            fewer = name in grown and shapes[0][0] < shape[0] and shapes[0][1:] == shape[1:]
            if number == 1 and shapes[0] != shape and not fewer:
                problem = f"has shape {found}"
            elif number > 1 and sum(map(prod, shapes)) != prod(shape):
                problem = f"is made of {number} of shape {found}"
            else:
                continue
            raise ModelError(f"{self.shards.folder}: tensor {name} {problem}, the config asks for {list(shape)}")


def saved_buffers(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The buffers that a model's files hold (few models have any)."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


def _pieces(model: PreTrainedModel, shards: Shards, wanted: set[str]) -> dict[str, Pieces]:
    """The files' tensors of each parameter. One that the files hold under its own name is taken as it is."""
    rules = get_model_conversion_mapping(model)
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    found: dict[str, Pieces] = {}
    groups: dict[str, list[tuple[int, tuple[Any, ...], str]]] = defaultdict(list)
    used: dict[str, WeightConverter] = {}
    for tensor in shards.places:
        name, pattern = rename_source_key(
            tensor, renamings, converters, model.base_model_prefix, dict.fromkeys(wanted, True)
        )
        if pattern is None:
            found[name] = (tensor,)
            continue
        converter = next(one for one in converters if pattern in one.source_patterns)
        used[name] = converter
        groups[name].append((converter.source_patterns.index(pattern), _natural(tensor), tensor))
    for name, members in groups.items():
        if name in wanted:
            found[name] = _in_order(name, members, used[name])
    return {name: pieces for name, pieces in found.items() if name in wanted}


def _in_order(name: str, members: list[tuple[int, tuple[Any, ...], str]], rule: WeightConverter) -> Pieces:
    """The members of a group as their elements lie in the parameter.

    Raises:
        ModelError: the rule moves elements about, so that no range of the parameter is one of a tensor's.
    """
    operations = [(type(one), getattr(one, "dim", None)) for one in rule.operations]
    if operations in ([(MergeModulelist, 0)], [(Concatenate, 0)]):
        return tuple(tensor for _, _, tensor in sorted(members))
    if operations == [(MergeModulelist, 0), (Concatenate, 1)]:
        # Sources are stacked over experts, then joined within each: expert by expert, source by source.
        by_source: dict[int, list[tuple[tuple[Any, ...], str]]] = defaultdict(list)
        for source, natural, tensor in members:
            by_source[source].append((natural, tensor))
        columns = [[tensor for _, tensor in sorted(by_source[source])] for source in sorted(by_source)]
        if len({len(column) for column in columns}) == 1:
            return tuple(tensor for expert in zip(*columns, strict=True) for tensor in expert)
        raise ModelError(f"the files lack some of the {len(members)} tensors that make {name}; download them again")
    names = ", ".join(type(one).__name__ for one in rule.operations)
    raise ModelError(
        f"the files hold {name} in another form than the model, and bigtune does not know the way ({names}); "
        "save the model once with transformers' save_pretrained(save_original_format=False)"
    )


def _natural(name: str) -> tuple[Any, ...]:
    """Sorts `experts.2` before `experts.10`."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"\.", name))
