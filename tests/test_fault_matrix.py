"""Every row of the matrix of 38 faults has a test that carries its number."""

import re
from pathlib import Path

NUM_ROWS = 38
NUMBERED = re.compile(r"def test_rows?_((?:\d+_(?:and_)?)+)")


def test_each_row_has_a_test_of_its_number():
    sources = [path.read_text(encoding="utf-8") for path in Path(__file__).parent.rglob("test_*.py")]
    names = [numbers for source in sources for numbers in NUMBERED.findall(source)]
    rows = {int(number) for name in names for number in re.findall(r"\d+", name)}
    assert rows == set(range(1, NUM_ROWS + 1))
