"""Every rule that a line can break has a remedy, and the jq programs among them mend what they speak of."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import lumina_ds.data
from lumina_ds.data.remedies import REMEDIES, remedy


def rules() -> set[str]:
    """The first argument of every RejectedLine in the package, constants looked up in their file."""
    found = set()
    for path in Path(lumina_ds.data.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text())
        constants = {
            node.targets[0].id: node.value.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and isinstance(node.value, ast.Constant)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and _is_refusal(node) and node.args:
                rule = node.args[0]
                if isinstance(rule, ast.Constant):
                    found.add(rule.value)
                elif isinstance(rule, ast.Name) and rule.id in constants:
                    found.add(constants[rule.id])
    return found


def _is_refusal(call: ast.Call) -> bool:
    """RejectedLine(...), or super().__init__(RULE, ...) of a class made of it."""
    of_base = ast.unparse(call.func) == "super().__init__" and call.args and ast.unparse(call.args[0]) == "UNPROVEN"
    return getattr(call.func, "id", "") == "RejectedLine" or bool(of_base)


def test_every_rule_has_a_remedy_and_every_remedy_a_rule() -> None:
    # A prompt of generation is read by rules of its own.
    assert rules() - REMEDIES.keys() == {"plain text"} and len(rules()) > 30
    assert REMEDIES.keys() - rules() == set()
    assert remedy("unsupported images") is None  # its reason says it


def test_the_jq_programs_are_programs() -> None:
    jq = shutil.which("jq")
    programs = {rule: re.findall(r"jq -c '([^']*)'", text) for rule, text in REMEDIES.items()}
    assert sum(map(len, programs.values())) > 15
    if jq is None:
        pytest.skip("jq is not installed")
    message = {"role": "user", "content": "a"}
    for rule, found in programs.items():
        for program in found:
            given = [{"messages": [message]}] if program == ".[]" else {"messages": [message], "dialog": [message]}
            done = subprocess.run([jq, "-c", program], input=json.dumps(given), capture_output=True, text=True)
            assert done.returncode == 0, (rule, program, done.stderr)
