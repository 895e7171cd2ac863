"""`lumina_ds.plan` in Python: the snippet of docs/planner.md runs, without torch, and the results are plain dataclasses."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import lumina_ds.plan

PAGE = Path(__file__).parents[2] / "docs" / "planner.md"


def test_the_documented_snippet_runs_without_torch():
    [snippet] = re.findall(r"^```py\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    snippet += "import sys\nassert not {'torch', 'deepspeed', 'numpy', 'rich', 'click'} & set(sys.modules)\n"
    done = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    memory, search = done.stdout.splitlines()
    assert memory.startswith("backward ") and "'master weights'" in memory
    assert search.startswith("ZeRO-1 ") and "memory: a micro-batch of" in search


def test_everything_exported_exists_and_is_plain():
    for name in lumina_ds.plan.__all__:
        value = getattr(lumina_ds.plan, name)
        if isinstance(value, type):
            assert dataclasses.is_dataclass(value) and value.__dataclass_params__.frozen, name
