"""Rows of Parquet and Arrow as lines of JSON, one record batch at a time.

Arrow gives all rows and structs the same keys, so a null stands for a key that the row does not have. Values that JSON
does not know (bytes, decimals, times) become objects or numbers: whoever takes one for a text gets a refusal.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from typing import Any

import orjson
import pyarrow as pa

from lumina_ds.foreign_files import shorten
from preprocess.containers.compression import read_fully
from preprocess.containers.rows import unreadable

ARROW_MAGIC = b"ARROW1"
CONTINUATION = b"\xff\xff\xff\xff"
# Lines are made from about so much of a table at a time.
_BATCH_BYTES = 2 << 20
_MOST_ROWS = 4096
_MOST_FOOTER_BYTES = 256 << 20

Cleaner = Callable[[Any], Any]


def parquet_lines(file: Any) -> Iterator[bytes]:
    """Lines of a seekable Parquet file. Raises EOFError where it is damaged."""
    from pyarrow import parquet

    try:
        # Not pre-buffered: that would hold whole row groups.
        table = parquet.ParquetFile(
            pa.PythonFile(file, "r"), pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True
        )
        _check_names(table.schema_arrow)
        num_rows = 0
        for number in range(table.num_row_groups):
            group = table.metadata.row_group(number)
            row_bytes = group.total_byte_size // max(1, group.num_rows)
            size = max(1, min(_MOST_ROWS, _BATCH_BYTES // max(1, row_bytes)))
            # By group: a batch that spans two may need two dictionaries in one nested column, which pyarrow cannot make.
            for batch in table.iter_batches(batch_size=size, row_groups=[number], use_threads=False):
                num_rows += batch.num_rows
                yield from batch_lines(batch)
    except (pa.ArrowException, IndexError, MemoryError, OSError, ValueError) as error:
        raise EOFError(f"the Parquet file is damaged or cut off ({_one_line(error)})") from error
    if num_rows != table.metadata.num_rows:
        raise EOFError(f"the Parquet file gives {num_rows:,} rows, and its footer says {table.metadata.num_rows:,}")


def feather_v1_lines(file: Any) -> Iterator[bytes]:
    """Lines of a file of Feather's first version, which pyarrow reads as a whole. Raises EOFError."""
    import warnings

    from pyarrow import feather

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            table = feather.read_table(pa.PythonFile(file, "r"), memory_map=False, use_threads=False)
    except (pa.ArrowException, MemoryError, OSError, ValueError, NotImplementedError) as error:
        raise EOFError(f"cannot read Feather version 1 ({_one_line(error)}); write the table as Parquet") from error
    _check_names(table.schema)
    for batch in table.to_batches():
        yield from _checked_lines(batch)


def arrow_lines(stream: Any) -> Iterator[bytes]:
    """Lines of Arrow IPC files (Feather version 2) and streams that follow one another. Raises EOFError."""
    source = _Source(stream)
    while head := source.peek(len(ARROW_MAGIC) + 2):
        is_file = head.startswith(ARROW_MAGIC)
        if is_file:
            source.read(len(head))
        elif not head.startswith(CONTINUATION):
            raise EOFError("what follows the Arrow stream is none")
        try:
            with pa.ipc.open_stream(pa.PythonFile(source, "r")) as reader:
                _check_names(reader.schema)
                for batch in reader:
                    yield from _checked_lines(batch)
        except (pa.ArrowException, IndexError, MemoryError, OSError, ValueError) as error:
            raise EOFError(f"the Arrow data is damaged or cut off ({_one_line(error)})") from error
        if source.is_at_end:
            raise EOFError("the Arrow data has no end mark; it is cut off")
        if is_file:
            _pass_footer(source)


def batch_lines(batch: pa.RecordBatch) -> Iterator[bytes]:
    """The rows of a sound batch as lines, some at a time."""
    step = max(1, min(_MOST_ROWS, _BATCH_BYTES * batch.num_rows // max(1, batch.get_total_buffer_size())))
    for begin in range(0, batch.num_rows, step):
        part = batch.slice(begin, step)
        try:
            yield _lines(part)
        except UnicodeDecodeError:
            for number in range(part.num_rows):
                try:
                    yield _lines(part.slice(number, 1))
                except UnicodeDecodeError as error:
                    yield unreadable(f"invalid UTF-8 at byte {error.start} of a text")


def _lines(batch: pa.RecordBatch) -> bytes:
    names = batch.schema.names
    columns = [_values(column) for column in batch.columns]
    if not columns:
        return b"{}\n" * batch.num_rows
    if any(column.null_count for column in batch.columns):
        rows: Iterator[dict[str, Any]] = (
            {name: value for name, value in zip(names, values, strict=True) if value is not None}
            for values in zip(*columns, strict=True)
        )
    else:
        rows = (dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True))
    return b"".join(map(_line, rows))


def _line(row: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(row, default=_no_json, option=orjson.OPT_PASSTHROUGH_DATETIME | orjson.OPT_APPEND_NEWLINE)
    except orjson.JSONEncodeError as error:
        return unreadable(f"a value that cannot be written as JSON: {error}")


def _no_json(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"bytes": len(value)}
    return {type(value).__name__: str(value)}


def _values(column: pa.Array) -> list[Any]:
    """What the column holds as Python has it, without keys that are null."""
    column = _without_times(column)
    try:
        values: list[Any] = column.to_pylist()
    except (UnicodeDecodeError, IndexError):  # IndexError: a place in a dictionary that leads nowhere
        raise
    except (ValueError, OverflowError, LookupError, pa.ArrowException):
        # Known to Arrow alone: such as a struct with a key twice. It counts as there, and as no text and no list.
        return [{str(column.type): "unknown"} if is_there else None for is_there in column.is_valid().to_pylist()]
    clean = _cleaner(column)
    return values if clean is None else list(map(clean, values))


def _without_times(column: pa.Array) -> pa.Array:
    """Times as the numbers that stand for them: not all of them are times that Python knows."""
    timeless = _mapped(column.type, _number_type)
    return column if timeless == column.type else column.cast(timeless)


def _number_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_temporal(kind) and kind != pa.month_day_nano_interval():
        return pa.int32() if kind.bit_width == 32 else pa.int64()
    return kind


def _binary_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_string(kind):
        return pa.binary()
    return pa.large_binary() if pa.types.is_large_string(kind) else kind


def _mapped(kind: pa.DataType, change: Callable[[pa.DataType], pa.DataType]) -> pa.DataType:
    """The type with `change` at its leaves, as deep as structs and lists go."""
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_mapped(field.type, change)) for field in kind])
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_mapped(kind.value_type, change)))
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_mapped(kind.value_type, change)))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(kind.value_field.with_type(_mapped(kind.value_type, change)), kind.list_size)
    if pa.types.is_map(kind):
        return pa.map_(kind.key_field, kind.item_field.with_type(_mapped(kind.item_type, change)))
    return change(kind)


def _cleaner(array: pa.Array) -> Cleaner | None:
    """What leaves keys out that are null, and mends what orjson would write as null. None: nothing to do."""
    kind = array.type
    if pa.types.is_struct(kind):
        children = [array.field(number) for number in range(kind.num_fields)]
        cleaners = {field.name: _cleaner(child) for field, child in zip(kind, children, strict=True)}
        if not any(cleaners.values()) and not any(child.null_count for child in children):
            return None
        return lambda value: None if value is None else _without_nulls(value, cleaners)
    if pa.types.is_map(kind):
        key, item = (_cleaner(child) or _as_it_is for child in (array.keys, array.items))
        return lambda value: None if value is None else _object([(key(name), item(each)) for name, each in value])
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        clean = _cleaner(array.values)
        return None if clean is None else lambda value: None if value is None else list(map(clean, value))
    if pa.types.is_floating(kind):
        return _finite
    return _deep if pa.types.is_nested(kind) or isinstance(kind, pa.BaseExtensionType) else None


def _without_nulls(value: dict[str, Any], cleaners: dict[str, Cleaner | None]) -> dict[str, Any]:
    found = {}
    for name, each in value.items():
        if each is not None:
            clean = cleaners[name]
            found[name] = each if clean is None else clean(each)
    return found


def _deep(value: Any) -> Any:
    """As the cleaners of structs and lists, for kinds whose values tell alone what they are: unions, views."""
    if isinstance(value, dict):
        return {name: _deep(each) for name, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_deep(each) for each in value]
    return _finite(value) if isinstance(value, float) else value


def _object(pairs: list[tuple[Any, Any]]) -> Any:
    """A map as an object, where its keys are those of one."""
    found = {name: value for name, value in pairs if value is not None}
    is_object = all(isinstance(name, str) for name, _ in pairs) and len({name for name, _ in pairs}) == len(pairs)
    return found if is_object else [list(pair) for pair in pairs]


def _finite(value: Any) -> Any:
    """NaN and infinities by name: a null would say that nothing is there."""
    return value if value is None or math.isfinite(value) else str(value)


def _as_it_is(value: Any) -> Any:
    return value


def _checked_lines(batch: pa.RecordBatch) -> Iterator[bytes]:
    """The lines of a batch whose offsets may lead anywhere, as those of damaged files do."""
    batch.validate()
    for column in batch.columns:
        _check(column)
    return batch_lines(batch)


def _check(array: pa.Array) -> None:
    """Raises ArrowInvalid where reading values of `array` would reach outside its buffers.

    As validate(full=True), but a text that is no UTF-8 is to cost its row, not the file, and the places in a dictionary
    are looked at where they are used: below a struct that is null pyarrow itself writes such as lead nowhere.
    """
    kind = array.type
    array.validate()
    if pa.types.is_struct(kind):
        for number in range(kind.num_fields):
            _check(array.field(number))
    elif pa.types.is_dictionary(kind):
        _check(array.indices)
        _check(array.dictionary)
        _check_places(array)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_map(kind):
        values = (array.keys, array.items) if pa.types.is_map(kind) else (array.values,)
        lists = pa.LargeListArray if pa.types.is_large_list(kind) else pa.ListArray
        lists.from_arrays(array.offsets, pa.nulls(len(values[0]))).validate(full=True)
        for each in values:
            _check(each)
    elif pa.types.is_fixed_size_list(kind):
        _check(array.values)
    else:
        as_bytes = _binary_type(kind)
        (array if as_bytes == kind else array.view(as_bytes)).validate(full=True)


def _check_places(array: pa.DictionaryArray) -> None:
    """pyarrow follows a place below zero. Zero may stand below a null struct, also in an empty dictionary."""
    import pyarrow.compute as pc

    bounds = pc.min_max(array.indices).as_py()
    if bounds["min"] is not None and (bounds["min"] < 0 or bounds["max"] >= max(1, len(array.dictionary))):
        raise pa.ArrowInvalid("a place outside the dictionary")


def _check_names(schema: pa.Schema) -> None:
    twice = [name for name in schema.names if schema.names.count(name) > 1]
    if twice:
        raise EOFError(f"two columns are called {shorten(twice[0])}; rename or drop one of them")


def _pass_footer(source: _Source) -> None:
    """An Arrow file ends with its footer, the length of that, and its magic: so a file that was cut off is noticed."""
    rest = source.read(_MOST_FOOTER_BYTES)
    length = struct.unpack("<i", rest[-10:-6])[0] if len(rest) >= 10 else -1
    if not rest.endswith(ARROW_MAGIC) or length != len(rest) - 10:
        raise EOFError("the Arrow file has no footer; it is cut off")


class _Source:
    """A stream for pyarrow that can look ahead and knows whether its end was met."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._ahead = b""
        self.is_at_end = False
        self.closed = False

    def peek(self, size: int) -> bytes:
        self._ahead = self._ahead or read_fully(self._stream, size)
        return self._ahead

    def read(self, size: int) -> bytes:
        data, self._ahead = self._ahead[:size], self._ahead[size:]
        if len(data) < size:
            data += read_fully(self._stream, size - len(data))
        self.is_at_end = self.is_at_end or len(data) < size
        return data

    def close(self) -> None:
        """pyarrow closes what it has read to the end mark; more may follow."""


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
