"""numpy arrays as Arrow columns and back, without a copy.

array(), scalar() and to_numpy() of pyarrow import pandas wherever it is installed, to see whether they were given some of its
objects. That is a third of a second, as long as everything else that starts a short run of preprocessing. Before
pyarrow 26 to_pandas_dtype() needs pandas, which is none of our requirements.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

_NUMPY_DTYPES = {
    pa.from_numpy_dtype(dtype): dtype for dtype in map(np.dtype, ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8"))
}


def numpy_dtype(dtype: pa.DataType) -> np.dtype:
    """numpy's type of the same integers. Raises pa.ArrowInvalid for any other type."""
    if dtype not in _NUMPY_DTYPES:
        raise pa.ArrowInvalid(f"{dtype} is no type of integers")
    return _NUMPY_DTYPES[dtype]


def column(values: np.ndarray, dtype: pa.DataType | None = None) -> pa.Array:
    """Numbers, all of them there. `dtype`: what they become; else Arrow's type of the same numbers."""
    dtype = dtype or pa.from_numpy_dtype(values.dtype)
    numbers = np.ascontiguousarray(values, numpy_dtype(dtype))
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
    dtype = numpy_dtype(array.type)
    return np.frombuffer(values or b"", dtype, array.offset + len(array))[array.offset :]
