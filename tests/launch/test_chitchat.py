"""The quickstart's conversion of human chats, on chats small enough to work out by hand."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lumina_ds.errors import MachineError

SCRIPT = Path(__file__).parent.parent.parent / "launch" / "chitchat_to_jsonl.py"


def chat(*bursts: str) -> dict[str, Any]:
    """`chat("a:hello|there", "b:hi")`: a sends two messages, then b one."""
    messages = []
    for burst in bursts:
        sender, texts = burst.split(":")
        messages.append([{"text": text, "sender": sender, "timestamp": ""} for text in texts.split("|")])
    return {"messages": messages, "prompt": "ignored"}


def convert(tmp_path: Path, chats: Any) -> subprocess.CompletedProcess[str]:
    source = tmp_path / "dataset.json"
    source.write_text(chats if isinstance(chats, str) else json.dumps(chats), encoding="utf-8")
    command = [sys.executable, str(SCRIPT), "--source", str(source), "--out", str(tmp_path / "out")]
    return subprocess.run(command, capture_output=True, text=True)


def read(path: Path) -> list[Any]:
    return [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_roles_runs_and_the_held_out_conversation(tmp_path: Path) -> None:
    chats = {str(number): chat(f"a:question {number}", f"b:answer {number}") for number in range(1, 101)}
    chats["1"] = chat("x: hallo |wie geht's?", "y:schön, danke", "y:und dir?", "x:auch", "z:ich auch")
    # Neither has two sides: nobody answers, or the answer is blank. They do not count for the split.
    chats = {"alone": chat("a:hello", "a:anyone?"), "blank": chat("a:hello", "b:  ")} | chats
    done = convert(tmp_path, chats)
    assert done.returncode == 0, done.stderr
    train, held_out = read(tmp_path / "out" / "train.jsonl"), read(tmp_path / "out" / "eval.jsonl")
    assert train[0] == [
        {"role": "user", "content": "hallo wie geht's?"},
        {"role": "assistant", "content": "schön, danke und dir?"},
        {"role": "user", "content": "auch"},
        {"role": "assistant", "content": "ich auch"},
    ]
    assert [turns[0]["content"] for turns in held_out] == ["question 50", "question 100"]
    assert len(train) == 98
    assert "98 conversations, 198 turns" in done.stdout
    assert "dropped: 2 chats" in done.stdout


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    chats = {str(number): chat("a:hi", "b:hello") for number in range(60)}
    outputs = []
    for _ in range(2):
        assert convert(tmp_path, chats).returncode == 0
        outputs.append((tmp_path / "out" / "train.jsonl").read_bytes())
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(
    ("chats", "says"),
    [
        ({"1": chat("a:hi", "b:hello")}, "1 conversations with both sides are too few"),
        ("{", "as JSON"),
        ("[]", "holds a list"),
    ],
)
def test_unusable_sources_exit_3_with_one_line(tmp_path: Path, chats: Any, says: str) -> None:
    done = convert(tmp_path, chats)
    assert done.returncode == 3
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_without_the_package_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("chitchat_to_jsonl", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "PACKAGE", "no_such_package")
    with pytest.raises(MachineError, match=r"no_such_package is not installed; pip install chitchat-dataset==0\.9\.0"):
        script.installed_dataset()
