"""Refused lines are never silent: counted, shown with their first, kept, and too many of them end a run."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lumina_ds.cli.main import cli, run_command
from lumina_ds.config.chat_templates import DEFAULT_TEMPLATE, TEMPLATES
from lumina_ds.config.schema import RunConfig
from lumina_ds.data.loader import PackedRows
from lumina_ds.data.shards.folder import ShardFolder
from lumina_ds.data.shards.manifest import read_manifest
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from lumina_ds.errors import DataError
from lumina_ds.train.run_folder import RunFolder, effective_config
from preprocess.prepare import prepare_training_data, preprocessing_record

BAD = '{"messages":[{"role":"system","content":""},{"role":"user","content":"x"}]}'


@pytest.fixture
def tenth(tmp_path: Path, make_lines: Callable[..., list[str]]) -> Path:
    """90 good lines, the first with a key of its own, and 10 bad ones from line 91 on."""
    first, *others = make_lines(90)
    path = tmp_path / "tenth.jsonl"
    path.write_text("\n".join([first[:-1] + ', "id": 7}', *others, *[BAD] * 10]) + "\n")
    return path


def preprocess(tenth: Path, tokenizer: Tokenizer, *options: str) -> int:
    words = ["preprocess", tenth, "--tokenizer", tokenizer.path, "--seq-length", 64, "--out", tenth.parent / "out"]
    return run_command(cli, [*map(str, words), *options])


@pytest.mark.parametrize(
    ("limit", "code"),
    [(None, 3), ("5%", 3), ("0.05", 3), ("9", 3), ("9.9%", 3), ("10", 0), ("10%", 0), ("0.1", 0), ("1.0", 0), ("0", 3)],
)
def test_more_refused_lines_than_allowed_are_exit_code_3(
    limit: str | None, code: int, tenth: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert preprocess(tenth, tokenizer, *(["--max-rejected", limit] if limit else [])) == code
    shown = capsys.readouterr()
    if code:
        assert "10 of 100 lines rejected, more than --max-rejected" in shown.err and "10 empty content" in shown.err
        assert "first: tenth.jsonl line 91" in shown.err
        assert ("allow them with --max-rejected 10%" in shown.err) == (limit not in ("9", "0"))
        assert len((tenth.parent / "out.rejected.jsonl").read_text().splitlines()) == 10
    else:
        assert "10 of 100 lines rejected" in shown.out and "rejected 10: empty content (first: tenth" in shown.out
        assert "keys without a meaning here: id 1 (ignored)" in shown.out
        totals = read_manifest(tenth.parent / "out").totals
        assert totals.other_keys == {"id": 1} and list(totals.first_rejected) == ["empty content"]
        # the finished folder is held to a stricter limit too
        assert preprocess(tenth, tokenizer, "--max-rejected", "1%") == 3


@pytest.mark.parametrize("limit", ["many", "-1", "1.5", "101%", "%", "nan"])
def test_a_limit_that_is_none_is_a_usage_error(limit: str, tenth: Path, tokenizer: Tokenizer) -> None:
    assert preprocess(tenth, tokenizer, f"--max-rejected={limit}") == 2


def config(path: Path, **data: Any) -> RunConfig:
    return RunConfig.model_validate(
        {"model": {"vocab_size": 360}, "data": {"seq_length": 64, "train_data": [str(path)]} | data}
    )


def test_training_shows_and_keeps_the_same_and_has_the_same_limit(
    tenth: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(DataError, match="10 of 100 lines rejected, more than --max-rejected 5%"):
        prepare_training_data(config(tenth), tmp_path / "cache")
    caplog.set_level(logging.INFO)
    for reused in (False, True):
        caplog.clear()
        data = prepare_training_data(config(tenth, max_rejected="10%"), tmp_path / "cache")
        assert data.reused == reused
        assert "10 of 100 lines rejected" in caplog.text and "rejected 10: empty content" in caplog.text
    with pytest.raises(DataError, match="more than --max-rejected 9"):
        prepare_training_data(config(tenth, max_rejected=9), tmp_path / "cache")
    record = json.loads(json.dumps(preprocessing_record(data)))
    assert record["train"]["rejected_by_rule"] == {"empty content": 10} and record["train"]["lines"] == 100


def test_the_run_folder_keeps_the_record(tenth: Path, tmp_path: Path) -> None:
    from lumina_ds.cli.train import _with_shards

    wanted = config(tenth, max_rejected="10%").model_dump() | {"run": {"runs_dir": str(tmp_path / "runs")}}
    made = _with_shards(RunConfig.model_validate(wanted))
    record = json.loads((tmp_path / "runs" / made.run_name / "preprocessing.json").read_text())
    assert record["train"]["shards"] == made.data.shards and record["train"]["rejected"] == 10
    assert "10 of 100 lines rejected" in record["train"]["summary"][0]


def test_other_data_do_not_replace_the_record_of_a_run_with_checkpoints(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "r")
    for record, fresh, kept in (({"n": 1}, False, 1), ({"n": 2}, False, 2), ({"n": 3}, False, 2), ({"n": 4}, True, 4)):
        folder.write_preprocessing(record, fresh)
        assert json.loads((folder.path / "preprocessing.json").read_text()) == {"n": kept}
        if kept == 2:
            (folder.checkpoints / "step-00000001").mkdir(exist_ok=True)


def test_a_runs_own_configuration_is_accepted_with_its_shards(
    tenth: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards made with settings that are no defaults; config.yaml of the run names them all."""
    monkeypatch.setitem(TEMPLATES, "no-bos", replace(TEMPLATES[DEFAULT_TEMPLATE], bos=False))
    settings = {"packing": "concat", "overlong": "split", "train_turns": "last", "chat_template": "no-bos"}
    options = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", value)]
    assert preprocess(tenth, tokenizer, "--max-rejected", "10%", *options) == 0
    folder = ShardFolder.open(tenth.parent / "out")
    begun = config(tenth, train_data=[], shards=str(folder.path))
    written = effective_config(begun, PackedRows(folder, 64), ())
    assert {name: written["data"][name] for name in settings} == settings
    again = RunConfig.model_validate(json.loads(json.dumps(written)))
    assert prepare_training_data(again, tmp_path / "cache").shards == folder.path


def test_what_formats_leave_out_is_said(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = {"role": "prompter", "text": "a", "replies": [{"role": "assistant", "text": t} for t in ("b", "c", "d")]}
    thought = {"role": "assistant", "content": "b", "thinking": "hm"}
    twice = {"messages": [{"role": "user", "content": "a"}, thought] * 2}
    lines = [{"prompt": tree}, {"prompt": "a", "chosen": "b", "rejected": "c"}, {"text": "a text"}, twice]
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in lines * 3))
    assert preprocess(path, tokenizer, "--train-reasoning", "last") == 0
    shown = capsys.readouterr().out
    for line in (
        "  6 messages of trees off the best path: left out",
        "  3 rejected sides of preferences: left out, the chosen one is trained",
        "  3 documents of plain text: every token is a label",
        "  3 turns whose reasoning is left out and that are no labels, by --train-reasoning last",
    ):
        assert line in shown.splitlines()
    manifest = read_manifest(tmp_path / "out")
    assert sorted(manifest.totals.notes.values()) == [3, 3, 3, 6] and manifest.settings.train_reasoning == "last"
    assert preprocess(path, tokenizer) == 3
    assert "holds other shards (train_reasoning last, not yes)" in capsys.readouterr().err


def test_a_format_by_name(tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"instruction": "a", "output": "b", "response": "c"}] * 5
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    assert preprocess(path, tokenizer) == 3
    assert "name the one that is meant with --format" in capsys.readouterr().err
    assert preprocess(path, tokenizer, "--format", "alpaca") == 0
    assert read_manifest(tmp_path / "out").totals.other_keys == {"response": 5}
    assert preprocess(path, tokenizer, "--format", "alpacca") == 2
    assert "there is no format alpacca; did you mean alpaca" in capsys.readouterr().err
