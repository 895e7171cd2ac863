"""numpy arrays as Arrow columns and back, without a copy.

array(), scalar() and to_numpy() of pyarrow import pandas wherever it is installed, to see whether they were given some of its
objects. That is a third of a second, as long as everything else that starts a short run of preprocessing.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa


def column(values: np.ndarray, dtype: pa.DataType | None = None) -> pa.Array:
    """Numbers, all of them there. `dtype`: what they become; else Arrow's type of the same numbers."""
    dtype = dtype or pa.from_numpy_dtype(values.dtype)
    numbers = np.ascontiguousarray(values, dtype.to_pandas_dtype())
    return pa.Array.from_buffers(dtype, len(numbers), [None, pa.py_buffer(numbers)])


def list_column(offsets: np.ndarray, values: np.ndarray, dtype: pa.DataType | None = None) -> pa.ListArray:
    """Lists: the i-th is values[offsets[i] : offsets[i + 1]]."""
    return pa.ListArray.from_arrays(column(offsets, pa.int32()), column(values, dtype))


def repeated_text(text: str, count: int) -> pa.StringArray:
    """`count` times the same text."""
    encoded = text.encode()
    offsets = np.arange(count + 1, dtype=np.int32) * len(encoded)
    return pa.Array.from_buffers(pa.string(), count, [None, pa.py_buffer(offsets), pa.py_buffer(encoded * count)])


def numbers(array: pa.Array) -> np.ndarray:
    """A view of a column of numbers. Raises pa.ArrowInvalid or ValueError where some are missing, as damage may have it."""
    if array.null_count:
        raise pa.ArrowInvalid(f"{array.null_count} values are missing")
    values = array.buffers()[1]
    dtype = np.dtype(array.type.to_pandas_dtype())
    return np.frombuffer(values or b"", dtype, array.offset + len(array))[array.offset :]
