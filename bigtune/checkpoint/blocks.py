"""8-bit optimizer states in another layout: codes and the scales of their blocks.

A block of 256 codes shares one scale, counted over a flat partition, so that blocks move when partitions do. One whose
codes all come from one saved block, each at its own place, is copied with its scale, bit by bit. Others are
dequantized and quantized anew: each value then changes by half a step of its new block's codes at most.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from bigtune.checkpoint.layout import Range, Segment
from bigtune.model.shards import read_range
from bigtune.tensorfile import Place

UNTOUCHED, MIXED = -1, -2
"""Of a block that is padding alone, and of one whose elements come from several saved ones, or from other places."""
BLOCKS_AT_ONCE = 2**14
"""That are quantized together: 16 MiB of float32."""


@dataclass(frozen=True, slots=True)
class Requantized:
    """A partition's codes, as they follow from those of a checkpoint.

    Args:
        places: of the codes and of the scales of a saved rank's sub-group.
        segments: where the partition's elements lie in the checkpoint, in their order.
        book: the value of each code, relative to its block's scale.
        block: codes that share a scale.
    """

    places: Callable[[int, int], tuple[Place, Place]]
    segments: Sequence[Segment]
    book: torch.Tensor
    block: int

    def fill(self, codes: torch.Tensor, scales: torch.Tensor) -> None:
        """Overwrite all codes and scales but those of padding.

        Raises:
            BrokenFileError: a file ends before its tensors do.
            OSError: a file cannot be read.
        """
        sources = whole_blocks(self.segments, len(codes), self.block).tolist()
        # Runs of blocks that lie side by side here as they did there, and runs of others.
        runs = groupby(range(len(sources)), key=lambda i: sources[i] - i if sources[i] >= 0 else sources[i])
        for _, run in runs:
            blocks = list(run)
            first, end = blocks[0], blocks[-1] + 1
            if sources[first] >= 0:
                self._copy(sources[first], first, end, codes, scales)
            elif sources[first] == MIXED:
                for start in range(first, end, BLOCKS_AT_ONCE):
                    self._requantize(start, min(end, start + BLOCKS_AT_ONCE), codes, scales)

    def _copy(self, number: int, first: int, end: int, codes: torch.Tensor, scales: torch.Tensor) -> None:
        rank, sub_group, block = number >> 50, number >> 38 & 0xFFF, number & (1 << 38) - 1
        of_codes, of_scales = self.places(rank, sub_group)
        start, saved = first * self.block, block * self.block
        count = min(end * self.block, len(codes)) - start
        read_range(of_scales, block, scales[first:end])
        # The last saved block may be shorter than ours: what is behind it is padding here.
        read_range(of_codes, saved, codes[start : start + min(count, of_codes.numel - saved)])

    def _requantize(self, first: int, end: int, codes: torch.Tensor, scales: torch.Tensor) -> None:
        start, stop = first * self.block, min(end * self.block, len(codes))
        values = torch.zeros(stop - start)
        for segment in self.segments:
            begin, after = max(start, segment.offset), min(stop, segment.offset + segment.source.count)
            if begin < after:
                offset = segment.source.offset + begin - segment.offset
                values[begin - start : after - start] = self._values(segment.source, offset, after - begin)
        codes[start:stop], scales[first:end] = quantize(values, self.book, self.block)

    def _values(self, source: Range, offset: int, count: int) -> torch.Tensor:
        of_codes, of_scales = self.places(source.rank, source.sub_group)
        first = offset // self.block
        codes = torch.empty(count, dtype=torch.uint8)
        scales = torch.empty((offset + count - 1) // self.block - first + 1)
        read_range(of_codes, offset, codes)
        read_range(of_scales, first, scales)
        of_block = (torch.arange(count) + offset % self.block) // self.block
        return self.book[codes.long()] * scales[of_block]


def whole_blocks(segments: Sequence[Segment], length: int, block: int) -> npt.NDArray[np.int64]:
    """For each block of a partition, the number of the saved block that it is; or MIXED, or UNTOUCHED."""
    found = np.full(-(-length // block), UNTOUCHED, dtype=np.int64)
    for segment in segments:
        source, first = segment.source, segment.offset // block
        touched = found[first : (segment.offset + source.count - 1) // block + 1]
        if (segment.offset - source.offset) % block:
            touched[:] = MIXED
            continue
        # One number for a block among all of a checkpoint's: 2^38 blocks, of 2^12 sub-groups.
        number = (source.rank << 50) + (source.sub_group << 38) + source.offset // block
        numbers = number + np.arange(len(touched))
        touched[:] = np.where((touched == UNTOUCHED) | (touched == numbers), numbers, MIXED)
    return found


def quantize(values: torch.Tensor, book: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales, by bitsandbytes' own rule."""
    from bitsandbytes import functional

    state: Any
    codes, state = functional.quantize_blockwise(values, code=book, blocksize=block)
    return codes, state.absmax
