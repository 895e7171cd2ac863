"""Every reader of foreign files, on files damaged by seed: reader_mutations.py says how, and what must hold."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from reader_mutations import READERS

TESTS = Path(__file__).parent
CASES = 400  # of each reader; 500 more of tokenizers stand in tests/data/test_tokenizer_mutations.py
MANY = 10_000


def tried(reader: str, first: int, count: int, folder: Path) -> Counter[str]:
    """How the cases ended. In a process of its own: what would crash or fill it ends it alone, with the seed's number."""
    words = [sys.executable, "-X", "faulthandler", str(TESTS / "reader_mutations.py"), reader, str(first), str(count)]
    paths = {
        "PYTHONPATH": f"{TESTS.parent}:{TESTS}",
        "PATH": "/usr/bin:/bin",
        "OMP_NUM_THREADS": "1",
        "HOME": str(folder),
    }
    done = subprocess.run(words, env=paths, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    return Counter(json.loads(done.stdout.splitlines()[-1]))


# Ends that are good, and how many of 400 there are at least: a change that is refused every time would try nothing.
LEAST = {
    "shards": {"faults found": 300},
    "checkpoints": {"faults found": 100, "refused: CheckpointError": 50, "accepted": 50},
    "models": {"refused: ConfigError": 50, "refused: CheckpointError": 50, "refused: DataError": 20, "accepted": 50},
    "settings": {"accepted / faults": 30, "refused: ConfigError / accepted": 100, "accepted": 10},
}


@pytest.mark.parametrize("reader", READERS)
def test_damaged_files_are_one_line_or_in_range(reader: str, tmp_path: Path) -> None:
    ends = tried(reader, 0, CASES, tmp_path)
    assert ends.total() == CASES
    assert not LEAST[reader].keys() - ends.keys() and not Counter(LEAST[reader]) - ends, ends


@pytest.mark.faults
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("reader", READERS)
def test_many_more_of_them(reader: str, tmp_path: Path) -> None:
    assert tried(reader, CASES, MANY, tmp_path).total() == MANY
