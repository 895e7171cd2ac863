"""Sources and named evaluation sets become shard folders with one tokenizer; what does not fit together is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from lumina_ds.config.schema import RunConfig
from lumina_ds.data.shards.folder import ShardFolder
from lumina_ds.errors import ConfigError, DataError
from preprocess.mixture_forecast import forecast_sources
from preprocess.run_data import check_run_data, evaluation_set_names, iter_folders, prepare_run_data


def config(best_by=None, **data):
    values = {"model": {"vocab_size": 360}, "data": {"seq_length": 64} | data, "train": {"best_by": best_by}}
    return RunConfig.model_validate(values)


def other_chats(path: Path, count: int = 40) -> Path:
    turns = [{"role": "user", "content": "and the dog?"}, {"role": "assistant", "content": "it sleeps, lazy as ever."}]
    lines = [json.dumps({"messages": turns, "id": number}) + "\n" for number in range(count)]
    path.write_text("".join(lines))
    return path


def test_every_source_gets_a_folder_with_the_tokenizer_of_all(chats, tmp_path):
    other = other_chats(tmp_path / "other.jsonl")
    sources = [{"name": "a", "paths": [str(chats)]}, {"name": "b", "paths": [str(other)], "repeats": 2}]
    wanted = config(sources=sources, eval_sets=[{"name": "held", "paths": [str(other)]}], max_conversations=30)
    made = prepare_run_data(wanted, tmp_path / "cache")
    a, b, held = [ShardFolder.open(path) for path in iter_folders(made.config)]
    assert a.manifest.tokenizer == b.manifest.tokenizer == held.manifest.tokenizer
    assert (b.manifest.totals.conversations, held.manifest.totals.conversations) == (30, 40)
    assert made.record["sources"]["b"]["conversations"] == 30 and made.record["eval_sets"]["held"]["lines"] == 40
    data = made.config.data
    assert [(each.name, each.paths, each.repeats) for each in data.sources] == [("a", [], None), ("b", [], 2)]
    # Started again from what it came to, nothing is made anew.
    again = prepare_run_data(made.config, tmp_path / "none")
    assert again.config == made.config and again.record == {} and not (tmp_path / "none").exists()
    # A finished folder beside files gives its tokenizer to them.
    mixed = config(sources=[{"name": "x", "paths": [str(chats)]}, {"name": "b", "shards": str(b.path)}])
    found = [ShardFolder.open(path) for path in iter_folders(prepare_run_data(mixed, tmp_path / "cache").config)]
    assert found[0].manifest.tokenizer == found[1].manifest.tokenizer


def test_held_out_parts_are_evaluation_sets_by_the_sources_names(chats, tmp_path):
    other = other_chats(tmp_path / "other.jsonl", 80)
    other.write_text("".join(line.replace("lazy", f"lazy {n}") for n, line in enumerate(other.open())))
    sources = [{"name": "a", "paths": [str(chats)]}, {"name": "b", "paths": [str(other)]}]
    wanted = config(sources=sources, eval_fraction=0.2)
    assert evaluation_set_names(wanted) == ["a", "b"]
    data = prepare_run_data(wanted, tmp_path).config.data
    assert [each.name for each in data.eval_sets] == ["a", "b"] and data.eval_fraction == 0
    assert [Path(each.shards).name for each in data.eval_sets] == ["eval", "eval"]


def test_the_dry_run_tells_what_is_taken_without_leaving_anything(chats, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = other_chats(tmp_path / "other.jsonl")
    sources = [{"name": "a", "paths": [str(chats)]}, {"name": "b", "paths": [str(other)], "repeats": 3, "cap": 2}]
    before = sorted(tmp_path.iterdir())
    a, b = forecast_sources(config(sources=sources), readers=1)
    assert sorted(tmp_path.iterdir()) == before
    assert (a.epochs, b.epochs, a.reaches_cap, b.reaches_cap) == (pytest.approx(1, rel=0.05), 2.0, False, True)
    assert a.share == pytest.approx(a.tokens / (a.tokens + 3 * b.tokens))
    assert forecast_sources(config(train_data=[str(chats)]), readers=1) is None


@pytest.mark.parametrize(
    ("best_by", "message"),
    [
        ("helt", "train.best_by helt names no evaluation set; did you mean held?; the evaluation sets are eval, held"),
        ("held", None),
        ("eval", None),
        ("mean", None),
    ],
)
def test_the_best_is_by_a_set_that_there_is(chats, best_by, message):
    wanted = config(
        best_by, train_data=[str(chats)], eval_data=[str(chats)], eval_sets=[{"name": "held", "paths": [str(chats)]}]
    )
    if message is None:
        check_run_data(wanted)
        return
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        check_run_data(wanted)


def test_what_is_not_there_or_empty_or_shared_is_said(chats, tmp_path, caplog):
    one = {"name": "a", "paths": [str(chats)]}
    with pytest.raises(DataError, match=r"no such file: nowhere.jsonl"):
        check_run_data(config(sources=[one, {"name": "b", "paths": ["nowhere.jsonl"]}]))
    with pytest.raises(DataError, match=r"nowhere does not exist"):
        check_run_data(config(sources=[one], eval_sets=[{"name": "e", "shards": "nowhere"}]))
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    with pytest.raises(DataError, match=r"empty.jsonl holds no conversations: it is empty"):
        prepare_run_data(config(sources=[one, {"name": "b", "paths": [str(empty)]}]), tmp_path / "cache")
    with caplog.at_level(logging.WARNING):
        check_run_data(config(sources=[one, one | {"name": "b"}]))
    assert "is in the sources a and b, and is trained in both" in caplog.text
    with pytest.raises(ConfigError, match=r"there is none"):
        check_run_data(config("mean", sources=[one]))
