"""Arrow columns from numpy and back, and the import that they save."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from lumina_ds.data.shards.arrow_columns import column, list_column, numbers, repeated_text


@pytest.mark.parametrize("values", [[], [3, 1, 2]])
def test_equal_what_pyarrow_makes(values: list[int]) -> None:
    array = np.array(values, np.uint16)
    assert column(array).equals(pa.array(values, pa.uint16()))
    assert column(array, pa.int64()).equals(pa.array(values, pa.int64()))
    assert repeated_text("é.jsonl", len(values)).equals(pa.array(["é.jsonl"] * len(values), pa.string()))


def test_lists() -> None:
    assert list_column(np.array([0, 2, 2, 3]), np.array([5, 6, 7], np.int32)).to_pylist() == [[5, 6], [], [7]]


def test_numbers_view_a_slice_without_a_copy() -> None:
    array = pa.array([1, 2, 3, 4], pa.int32())
    view = numbers(array[1:3])
    assert view.tolist() == [2, 3]
    assert view.__array_interface__["data"][0] == array.buffers()[1].address + 4
    assert numbers(pa.array([], pa.int32())).tolist() == []


def test_missing_numbers_are_refused() -> None:
    with pytest.raises(pa.ArrowInvalid, match="1 values are missing"):
        numbers(pa.array([1, None]))


def test_preprocessing_imports_nothing_slow_that_it_does_not_need(tmp_path: Path, corpus) -> None:
    """pandas takes as long to import as all the rest, and the suite has it, for transformers and datasets."""
    pytest.importorskip("pandas")
    slow = ["pandas", "torch", "scipy.linalg", "lumina_ds.config.schema", "lumina_ds.data.templates.jinja_template"]
    words = ["preprocess", str(corpus.train), "--tokenizer", str(corpus.tokenizer), "--seq-length", "64"]
    words += ["--eval-fraction", "0.1", "--out", str(tmp_path / "shards")]
    program = (
        "import sys; from lumina_ds.cli.main import cli, run_command\n"
        f"assert run_command(cli, {words!r}) == 0\n"
        "assert 'preprocess.scan_kernel' in sys.modules, 'nothing was compiled'\n"
        f"assert not [name for name in sys.modules if name.startswith(tuple({slow!r}))], 'imported'"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
