"""NumPy ↔ Arrow without a copy, and without `pa.array` and `to_numpy`, which import pandas: half a second a process."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa


def arrow_numbers(values: npt.NDArray[Any]) -> pa.Array:
    """Numbers [N] as an Arrow array of the same type."""
    kind = pa.from_numpy_dtype(values.dtype)
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.ascontiguousarray(values))])


def arrow_lists(offsets: npt.NDArray[np.int32], values: npt.NDArray[Any]) -> pa.ListArray:
    """Lists of numbers: the n-th one is `values[offsets[n] : offsets[n + 1]]`."""
    return pa.ListArray.from_arrays(arrow_numbers(offsets), arrow_numbers(values))


def numpy_numbers(column: pa.Array) -> npt.NDArray[Any]:
    """A column of numbers or booleans, [N]; booleans are copied, since Arrow keeps them as bits."""
    if pa.types.is_boolean(column.type):
        copied: npt.NDArray[np.bool_] = column.to_numpy(zero_copy_only=False)
        return copied
    viewed: npt.NDArray[Any] = np.from_dlpack(column)
    return viewed


def numpy_lists(column: pa.ListArray) -> tuple[npt.NDArray[np.int32], npt.NDArray[Any]]:
    """Offsets and values of lists of numbers."""
    return numpy_numbers(column.offsets), numpy_numbers(column.values)
