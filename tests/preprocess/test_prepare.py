"""The one-step way: what is reused, what is not, and what is refused."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lumina_ds.config.chat_templates import DEFAULT_TEMPLATE, TEMPLATES
from lumina_ds.config.schema import RunConfig
from lumina_ds.data.shards.folder import ShardFolder
from lumina_ds.data.shards.manifest import Settings
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from lumina_ds.errors import ConfigError, DataError
from preprocess.pipeline import preprocess_files
from preprocess.prepare import PreparedData, prepare_training_data
from preprocess.train_tokenizer import train_tokenizer


def config(vocab_size: int = 360, **data: Any) -> RunConfig:
    return RunConfig.model_validate({"model": {"vocab_size": vocab_size}, "data": {"seq_length": 64} | data})


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_second_run_reuses(chats: Path, cache: Path) -> None:
    wanted = config(train_data=[str(chats)], eval_fraction=0.1)
    first = prepare_training_data(wanted, cache)
    second = prepare_training_data(wanted, cache)
    assert (first.reused, second.reused) == (False, True)
    assert (
        (second.shards, second.eval_shards)
        == (first.shards, first.eval_shards)
        == (first.shards, first.shards / "eval")
    )
    folder = ShardFolder.open(first.shards)
    tokenizer = Tokenizer.load(first.tokenizer)
    assert folder.manifest.tokenizer.digest == tokenizer.digest and tokenizer.vocab_size <= 360


def changed_input(chats: Path, data: dict[str, Any]) -> None:
    # same size, same name: only the content tells
    chats.write_text(chats.read_text().replace("fox", "cow"))


def changed_seq_length(chats: Path, data: dict[str, Any]) -> None:
    data["seq_length"] = 32


def changed_setting(chats: Path, data: dict[str, Any]) -> None:
    data["overlong"] = "split"


def changed_limit(chats: Path, data: dict[str, Any]) -> None:
    data["max_conversations"] = 50


def changed_tokenizer(chats: Path, data: dict[str, Any]) -> None:
    data["tokenizer"] = str(train_tokenizer([str(chats)], 320, chats.parent / "other.model").path)


@pytest.mark.parametrize(
    "change", [changed_input, changed_seq_length, changed_setting, changed_limit, changed_tokenizer]
)
def test_a_change_is_never_mistaken(chats: Path, cache: Path, change: Callable[[Path, dict[str, Any]], None]) -> None:
    data: dict[str, Any] = {"train_data": [str(chats)]}
    first = prepare_training_data(config(**data), cache)
    change(chats, data)
    second = prepare_training_data(config(**data), cache)
    assert not second.reused and second.shards != first.shards
    assert prepare_training_data(config(**data), cache).reused


def test_another_template_is_never_mistaken(chats: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare_training_data(config(train_data=[str(chats)]), cache)
    changed = replace(TEMPLATES[DEFAULT_TEMPLATE], bos=False)
    monkeypatch.setitem(TEMPLATES, "no-bos", changed)
    second = prepare_training_data(config(train_data=[str(chats)], chat_template="no-bos"), cache)
    assert second.shards != first.shards
    with pytest.raises(
        DataError, match="were made with chat template lumina-chat-1, not no-bos; set --chat-template lum"
    ):
        prepare_training_data(config(shards=str(first.shards), chat_template="no-bos"), cache)
    with pytest.raises(DataError, match="were made with chat template no-bos, not lumina-chat-1"):
        prepare_training_data(config(shards=str(first.shards), eval_shards=str(second.shards)), cache)
    monkeypatch.setitem(TEMPLATES, DEFAULT_TEMPLATE, changed)
    with pytest.raises(DataError, match="chat template lumina-chat-1, another version of it; preprocess again"):
        prepare_training_data(config(shards=str(first.shards)), cache)


def test_workers_and_place_do_not_matter(chats: Path, cache: Path, tmp_path: Path) -> None:
    first = prepare_training_data(config(train_data=[str(chats)]), cache)
    moved = tmp_path / "moved" / "chats.jsonl"
    moved.parent.mkdir()
    os.rename(chats, moved)
    assert prepare_training_data(config(train_data=[str(moved)], num_workers=2), cache) == PreparedData(
        first.shards, None, first.tokenizer, True
    )


def test_a_damaged_cache_is_made_again(chats: Path, cache: Path) -> None:
    wanted = config(train_data=[str(chats)])
    shard = prepare_training_data(wanted, cache).shards / "shard-00000.arrow"
    intact = shard.read_bytes()
    os.truncate(shard, 100)
    assert not prepare_training_data(wanted, cache).reused
    assert shard.read_bytes() == intact


def _prepare_in_process(path: str, cache: Path, results: Any) -> None:
    prepared = prepare_training_data(config(train_data=[path]), cache)
    results.put((str(prepared.shards), prepared.reused))


def test_two_at_once(chats: Path, cache: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_prepare_in_process, args=(str(chats), cache, results)) for _ in range(2)]
    for process in processes:
        process.start()
    outcomes = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert len({shards for shards, _ in outcomes}) == 1
    assert sorted(reused for _, reused in outcomes) == [False, True]


def test_evaluation_data(chats: Path, cache: Path, tmp_path: Path, make_lines: Callable[..., list[str]]) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text("\n".join(make_lines(20, seed=9)))
    # the fraction only counts where no evaluation data is given
    prepared = prepare_training_data(config(train_data=[str(chats)], eval_data=[str(held)], eval_fraction=0.5), cache)
    assert prepared.eval_shards is not None
    train, evaluation = ShardFolder.open(prepared.shards), ShardFolder.open(prepared.eval_shards)
    assert (train.num_documents, evaluation.num_documents) == (300, 20)
    assert train.manifest.tokenizer == evaluation.manifest.tokenizer
    again = prepare_training_data(config(shards=str(prepared.shards), eval_data=[str(held)]), cache)
    assert again == PreparedData(prepared.shards, prepared.eval_shards, prepared.tokenizer, True)


@pytest.fixture
def shards(chats: Path, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    out = tmp_path / "shards"
    preprocess_files([str(chats)], tokenizer.path, out, Settings(seq_length=64, eval_fraction=0.1))
    return out


def test_given_shards(shards: Path, tokenizer: Tokenizer, cache: Path) -> None:
    for name in ("auto", str(tokenizer.path)):
        prepared = prepare_training_data(config(shards=str(shards), tokenizer=name), cache)
        assert prepared == PreparedData(shards, shards / "eval", shards / "tokenizer.model", True)
    explicit = prepare_training_data(config(shards=str(shards), eval_shards=str(shards)), cache)
    assert explicit.eval_shards == shards


def test_shards_of_another_tokenizer(shards: Path, chats: Path, cache: Path, tmp_path: Path) -> None:
    other = train_tokenizer([str(chats)], 320, tmp_path / "other.model")
    with pytest.raises(DataError, match=r"were made with another tokenizer than .*other.model"):
        prepare_training_data(config(shards=str(shards), tokenizer=str(other.path)), cache)
    out = tmp_path / "others"
    preprocess_files([str(chats)], other.path, out, Settings(seq_length=64))
    with pytest.raises(DataError, match=r"the shards in .*others were made with another tokenizer"):
        prepare_training_data(config(shards=str(shards), eval_shards=str(out)), cache)


def test_refusals(shards: Path, chats: Path, tokenizer: Tokenizer, cache: Path) -> None:
    size = tokenizer.vocab_size
    too_small = rf"the tokenizer has {size} ids, more than model.vocab_size {size - 1}; set --model.vocab_size {size}"
    with pytest.raises(ConfigError, match=too_small):
        prepare_training_data(config(size - 1, shards=str(shards)), cache)
    with pytest.raises(ConfigError, match=too_small):
        prepare_training_data(config(size - 1, train_data=[str(chats)], tokenizer=str(tokenizer.path)), cache)
    with pytest.raises(
        ConfigError, match=r"no training data; give JSONL files with --train-data, .* --data, or data\.sources"
    ):
        prepare_training_data(config(), cache)
    with pytest.raises(ConfigError, match="both --data and --train-data"):
        prepare_training_data(config(train_data=[str(chats)], shards=str(shards)), cache)
    with pytest.raises(ConfigError, match=r"data.packing is concat, but .* best_fit"):
        prepare_training_data(config(shards=str(shards), packing="concat"), cache)
    with pytest.raises(ConfigError, match="cannot read standard input"):
        prepare_training_data(config(train_data=["-"]), cache)
    with pytest.raises(DataError, match="no such file"):
        prepare_training_data(config(train_data=["none.jsonl"]), cache)
    with pytest.raises(DataError, match="does not exist"):
        prepare_training_data(config(shards="none"), cache)
