"""The bytes of a merged model's tensors, block by block: read by byte ranges, cast, and read ahead by threads.

    ranks' files ──read──▶ buffer ──(+ adapter)──cast──▶ buffer ──▶ tensorfile.write

Buffers are made once and used again, so that memory is a matter of how many there are, whatever the model's size.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from math import prod
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt

from bigtune.checkpoint.source import Piece, Shape, Tensor
from bigtune.tensorfile import BYTES, BrokenFileError, Content, Sums, in_order, read_into, write

Values = npt.NDArray[np.float32]
NUMPY = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""What can be cast, by the format's names; numpy and ml_dtypes round to the nearest, ties to even, as torch does."""
BLOCK = 2**20
"""Elements that are read and cast together; the same on any number of workers, since what an adapter adds may be
rounded otherwise in blocks of another size."""
AHEAD = 3
"""Blocks of one output file that are in memory at a time: one is written while the next are read."""


@dataclass(frozen=True, slots=True)
class Change:
    """What an adapter adds to a weight: scale · B A, A [rank, inputs] and B [outputs, rank]; or that transposed."""

    lora_a: Tensor
    lora_b: Tensor
    scale: float
    transposed: bool


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor of a merged model's file: elements from number `start` of `tensor`, and what an adapter adds to them.

    `rows_before` are those of the adapted weight that lie in other outputs.
    """

    name: str
    shape: Shape
    dtype: str
    tensor: Tensor
    start: int = 0
    change: Change | None = None
    rows_before: int = 0

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Block:
    """Some elements of an output, from number `first` of it, and where they lie; with the adapter's matrices."""

    output: Output
    first: int
    pieces: tuple[Piece, ...]
    pair: tuple[Values, Values] | None

    @property
    def count(self) -> int:
        return sum(piece.count for piece in self.pieces)


class Buffers:
    """Memory for one block, as it is read and as it is written."""

    def __init__(self) -> None:
        self._memory = [memoryview(b""), memoryview(b"")]

    def take(self, number: int, count: int) -> memoryview:
        """The first or second buffer's first `count` bytes."""
        if len(self._memory[number]) < count:
            self._memory[number] = np.empty(count, np.uint8).data
        return self._memory[number][:count]


def write_outputs(
    path: Path, outputs: Iterable[Output], readers: Executor, written: Callable[[int], None] = lambda count: None
) -> Sums:
    """Write a safetensors file, reading ahead.

    Args:
        written: is told of bytes as they go out; what it raises ends the writing.

    Raises:
        OSError: a file cannot be read or written.
        BrokenFileError: a file that is read ends too early.
    """
    ordered = in_order({output.name: output for output in outputs})
    blocks = (block for output in ordered.values() for block in blocks_of(output))
    stream = ahead(readers, blocks, [Buffers() for _ in range(AHEAD)])
    contents = {
        name: Content(output.dtype, output.shape, _pieces(output, stream, written)) for name, output in ordered.items()
    }
    return write(path, contents, {"format": "pt"})


def _pieces(
    output: Output, stream: Iterator[tuple[Block, memoryview]], written: Callable[[int], None]
) -> Iterator[memoryview]:
    """One output's share of a stream of all: they are asked for in the same order."""
    left = output.numel
    while left:
        block, content = next(stream)
        if block.output is not output:
            raise AssertionError(f"{block.output.name} came where {output.name} was to be written")
        left -= block.count
        yield content
        written(len(content))


def ahead(readers: Executor, blocks: Iterable[Block], buffers: Iterable[Buffers]) -> Iterator[tuple[Block, memoryview]]:
    """The blocks' bytes, in order; each is good until the next is asked for."""
    under_way: deque[tuple[Block, Buffers, Future[memoryview]]] = deque()
    free = list(buffers)
    for block in blocks:
        if not free:
            done, used, future = under_way.popleft()
            yield done, future.result()
            free.append(used)
        under_way.append((block, free[-1], readers.submit(_fill, block, free.pop())))
    for done, _, future in under_way:
        yield done, future.result()


def blocks_of(output: Output) -> Iterator[Block]:
    """An output cut into blocks; whole rows where an adapter adds to them."""
    pair, most = None, BLOCK
    if output.change is not None:
        pair = whole(output.change.lora_a), whole(output.change.lora_b)
        most = max(1, BLOCK // output.shape[-1]) * output.shape[-1]
    first, taken, held = 0, 0, list[Piece]()
    size = BYTES[output.tensor.dtype]
    for piece in output.tensor.pieces:
        start = max(piece.start, output.start)
        end = min(piece.start + piece.count, output.start + output.numel)
        while start < end:
            count = min(end - start, most - taken)
            held.append(Piece(piece.path, piece.offset + (start - piece.start) * size, start, count))
            start, taken = start + count, taken + count
            if taken == most:
                yield Block(output, first, tuple(held), pair)
                first, taken, held = first + taken, 0, []
    if held:
        yield Block(output, first, tuple(held), pair)


def _fill(block: Block, buffers: Buffers) -> memoryview:
    output, count = block.output, block.count
    size = BYTES[output.tensor.dtype]
    raw, done = buffers.take(0, count * size), 0
    for piece in block.pieces:
        try:
            read_into(piece.path, piece.offset, raw[done : done + piece.count * size])
        except BrokenFileError as error:
            raise BrokenFileError(f"{piece.path.name}: {error}") from None
        done += piece.count * size
    if block.pair is None and output.dtype == output.tensor.dtype:
        return raw
    values: npt.NDArray[np.generic] = np.frombuffer(raw, NUMPY[output.tensor.dtype])
    if block.pair is not None:
        values = _changed(block, values)
    content = buffers.take(1, count * BYTES[output.dtype])
    with np.errstate(over="ignore", invalid="ignore"):  # infinities and NaN are what was asked for
        np.copyto(np.frombuffer(content, NUMPY[output.dtype]), values, casting="unsafe")
    return content


def _changed(block: Block, values: npt.NDArray[np.generic]) -> Values:
    """W + scale · B A of a block's rows, computed in float32."""
    change, columns = block.output.change, block.output.shape[-1]
    if change is None or block.pair is None:
        raise AssertionError(f"{block.output.name} has no adapter")
    lora_a, lora_b = block.pair
    first = block.output.rows_before + block.first // columns
    rows = slice(first, first + block.count // columns)
    added = lora_a[:, rows].T @ lora_b.T if change.transposed else lora_b[rows] @ lora_a
    added *= np.float32(change.scale)
    added += values.reshape(-1, columns).astype(np.float32, copy=False)
    return added.reshape(-1)


def whole(tensor: Tensor) -> Values:
    """A small tensor, in float32."""
    output = Output(tensor.name, tensor.shape, "F32", tensor)
    flat, done = np.empty(output.numel, np.float32), 0
    for block in blocks_of(output):
        flat[done : done + block.count] = np.frombuffer(_fill(block, Buffers()), np.float32)
        done += block.count
    return flat.reshape(tensor.shape)
