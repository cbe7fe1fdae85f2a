"""Read a rank's partitions back from a checkpoint of any number of ranks, and of ZeRO-2 or ZeRO-3 alike.

A live layout and the saved one are put side by side: each stretch of this rank's partition is read from the files that
have it, straight into memory that is there. No rank reads more than its own elements, and blocks around them.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import torch

from bigtune.checkpoint.blocks import Requantized
from bigtune.checkpoint.folder import rank_file
from bigtune.checkpoint.layout import MASTER, Layout, Range, Segment, State, SubGroup
from bigtune.errors import CheckpointError
from bigtune.model.shards import read_range
from bigtune.tensorfile import BrokenFileError, Place, read_header


class Saved:
    """A checkpoint, as one rank of a live layout reads it."""

    def __init__(self, checkpoint: Path, live: Layout, rank: int) -> None:
        """Compare the layouts; no tensor is read.

        Raises:
            CheckpointError: other parameters than the model's, or another optimizer's states.
        """
        self._checkpoint, self.live, self._rank = checkpoint, live, rank
        self.layout = Layout.read(checkpoint)
        self._headers: dict[int, dict[str, Place]] = {}
        saved, wanted = ({p.name: p.shape for _, p in layout.parameters()} for layout in (self.layout, live))
        if saved != wanted:
            differing = sorted(name for name in {**saved, **wanted} if saved.get(name) != wanted.get(name))
            raise CheckpointError(
                f"{checkpoint}: holds other parameters than this run trains; {len(differing)} differ, among them "
                f"{', '.join(differing[:3])}; resume with the model and the adapter that it was saved with"
            )
        self._same = self.layout.world_size == live.world_size and [
            (part.numel, part.parameters) for part in self.layout.sub_groups
        ] == [(part.numel, part.parameters) for part in live.sub_groups]

    def files_needed(self) -> set[str]:
        """The rank files that this rank reads."""
        parts = self.live.sub_groups
        ranks = {s.source.rank for part in parts for s in self.live.segments(part, self._rank, self.layout)}
        ranks = {self._rank} if self._same else ranks
        return {rank_file(self._checkpoint, rank, self.layout.world_size).name for rank in ranks}

    def read(
        self, part: SubGroup, master: torch.Tensor, books: Mapping[str, torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], Mapping[str, float]]:
        """Fill a partition's float32 values, and make its optimizer states.

        Args:
            master: the flat partition.
            books: the values of 8-bit codes, by kind of state.

        Returns:
            State tensors by kind, in the host's memory, and the states' scalars.

        Raises:
            CheckpointError: a file is missing or broken, or its states are of another optimizer.
        """
        source = next((one for one in self.layout.sub_groups if one.group == part.group), None)
        if source is None:
            raise CheckpointError(f"{self._checkpoint}: has no state of the {part.group}; resume from another step")
        segments = _joined(self.live.segments(part, self._rank, self.layout))
        try:
            self._fill(part, MASTER, segments, master)
            states: dict[str, torch.Tensor] = {}
            for kind, state in source.states.items():
                if state.scales is not None:
                    states |= self._codes(part, kind, state.scales, source.states[state.scales], segments, books[kind])
                elif state.block == 1:
                    states[kind] = torch.zeros(part.numel, dtype=getattr(torch, state.dtype))
                    self._fill(part, kind, segments, states[kind])
        except (OSError, BrokenFileError, KeyError) as error:
            raise CheckpointError(f"{self._checkpoint}: cannot be read ({error}); resume from another step") from None
        return states, source.scalars

    def _fill(self, part: SubGroup, kind: str, segments: Iterable[Segment], out: torch.Tensor) -> None:
        if self._same:
            read_range(self._place(self._rank, part.index, kind), 0, out)
            return
        for segment in segments:
            at = segment.source
            read_range(
                self._place(at.rank, at.sub_group, kind), at.offset, out[segment.offset : segment.offset + at.count]
            )

    def _codes(
        self, part: SubGroup, kind: str, scale_kind: str, scale: State, segments: list[Segment], book: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """8-bit codes and their scales: saved blocks as they are, and mixed ones quantized anew."""
        codes = torch.full((part.numel,), int(book.abs().argmin()), dtype=torch.uint8)  # of padding: zero
        scales = torch.zeros(-(-part.numel // scale.block))
        if self._same:
            self._fill(part, kind, segments, codes)
            self._fill(part, scale_kind, segments, scales)
        else:
            places = partial(self._pair, kind, scale_kind)
            Requantized(places, segments, book, scale.block).fill(codes, scales)
        return {kind: codes, scale_kind: scales}

    def _pair(self, kind: str, scale_kind: str, rank: int, sub_group: int) -> tuple[Place, Place]:
        return self._place(rank, sub_group, kind), self._place(rank, sub_group, scale_kind)

    def _place(self, rank: int, sub_group: int, kind: str) -> Place:
        if rank not in self._headers:
            self._headers[rank], _, _ = read_header(rank_file(self._checkpoint, rank, self.layout.world_size))
        return self._headers[rank][f"{sub_group}.{kind}"]


def _joined(segments: Iterable[Segment]) -> list[Segment]:
    """Segments that lie side by side in both layouts as one; in the order of the live partition."""
    joined: list[Segment] = []
    for segment in sorted(segments, key=lambda segment: segment.offset):
        at, last = segment.source, joined[-1] if joined else None
        if (
            last is not None
            and (last.source.rank, last.source.sub_group) == (at.rank, at.sub_group)
            and last.offset + last.source.count == segment.offset
            and last.source.offset + last.source.count == at.offset
        ):
            whole = Range(at.rank, at.sub_group, last.source.offset, last.source.start, last.source.count + at.count)
            joined[-1] = Segment(last.offset, whole)
        else:
            joined.append(segment)
    return joined
