"""What a foreign tokenizer loses of the data is counted and said, and trained unknown ids end a run."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from lumina_ds.cli.main import cli, run_command
from lumina_ds.config.schema import RunConfig
from lumina_ds.data.shards.folder import ShardFolder
from lumina_ds.data.shards.manifest import Settings, read_manifest
from lumina_ds.data.shards.text_loss import describe_loss
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from lumina_ds.errors import DataError
from preprocess.pipeline import preprocess_files
from preprocess.prepare import prepare_training_data, preprocessing_record
from preprocess.text_check import describe_change
from preprocess.validation.page import write_report

KNOWN = ["the quick brown fox jumps over the lazy dog", "hello there def f return x = ()"]
CHATS = [
    ("hello", "def f\n\treturn x"),
    ("你好", "the fox"),  # unknown, not trained
    ("hello", "the 你好 fox 你"),
    ("the fox", "hello"),
]


def foreign(path: Path, **settings: Any) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(KNOWN * 5), model_writer=model, hard_vocab_limit=False, minloglevel=2, **settings
    )
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture
def lossy(tmp_path: Path) -> Path:
    """No byte fallback, and nmt_nfkc, which makes spaces of newlines and tabs."""
    return foreign(tmp_path / "lossy.model", vocab_size=60, model_type="bpe")


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    lines = [{"messages": [{"role": "user", "content": u}, {"role": "assistant", "content": a}]} for u, a in CHATS]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(*words: object) -> int:
    return run_command(cli, [str(word) for word in words])


def test_trained_unknown_ids_need_a_word(
    chats: Path, lossy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["preprocess", chats, "--tokenizer", lossy, "--seq-length", 64, "--out", tmp_path / "out"]
    assert run(*words) == 3
    shown = capsys.readouterr().err
    assert "3 unknown ids in the first 4 lines, 2 of them trained" in shown
    assert "first trained: chats.jsonl line 3: 你 (U+4F60), 好 (U+597D)" in shown and "--allow-unknown" in shown
    assert not (tmp_path / "out").exists()
    assert run(*words, "--allow-unknown") == 0
    shown = capsys.readouterr().out
    assert "3 unknown ids" in shown and "first: chats.jsonl line 2: 你 (U+4F60)" in shown
    assert "3 of 8 texts tried (37.5%) do not come back" in shown and "newline, tab" in shown
    assert run(*words) == 3  # the finished folder is held to the same
    loss = read_manifest(tmp_path / "out").totals.text_loss
    assert loss and (loss.unknown_ids, loss.trained_unknown_ids, loss.changed_texts, loss.tried_texts) == (3, 2, 3, 8)
    assert {name: loss.lost_characters[name] for name in ("newline", "tab", "你 (U+4F60)")} == {
        "newline": 1, "tab": 1, "你 (U+4F60)": 3,
    }  # fmt: skip
    unknown = sentencepiece.SentencePieceProcessor(model_file=str(lossy)).unk_id()
    folder = ShardFolder.open(tmp_path / "out")
    documents = [folder.document(number) for number in range(4)]
    assert sum(int((ids == unknown).sum()) for ids, _ in documents) == 3
    assert sum(int(((ids == unknown) & (mask == 1)).sum()) for ids, mask in documents) == 2


def test_validate_finds_the_same(chats: Path, lossy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("validate", chats, "--tokenizer", lossy, "--json") == 3
    document = json.loads(capsys.readouterr().out)
    counts = {rule["rule"]: rule["count"] for rule in document["rules"]}
    assert counts["unknown ids"] == 2 and counts["text does not come back"] == 3
    assert document["text_loss"]["trained_unknown_ids"] == 2
    assert run("validate", chats, "--tokenizer", lossy, "--allow-unknown", "--report", chats.with_suffix(".html")) == 0
    assert "do not come back" in " ".join(capsys.readouterr().out.split())
    assert "3 unknown ids" in chats.with_suffix(".html").read_text()


def test_training_says_and_refuses_the_same(
    chats: Path, lossy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def prepare(**data: Any) -> Any:
        settings = {"train_data": [str(chats)], "tokenizer": str(lossy), "seq_length": 64} | data
        return prepare_training_data(
            RunConfig.model_validate({"model": {"vocab_size": 80}, "data": settings}), tmp_path / "cache"
        )

    with pytest.raises(DataError, match="3 unknown ids in the first 4 lines, 2 of them trained"):
        prepare()
    caplog.set_level(logging.INFO)
    data = prepare(allow_unknown=True)
    assert "3 unknown ids" in caplog.text
    assert preprocessing_record(data)["train"]["text_loss"]["unknown_ids"] == 3
    with pytest.raises(DataError, match="--allow-unknown"):
        prepare()  # from the cache
    folder = {"train_data": [], "tokenizer": "auto", "shards": str(data.shards)}
    with pytest.raises(DataError, match=r"2 of them trained.*--allow-unknown"):
        prepare(**folder)  # of the finished folder
    caplog.clear()
    prepare(**folder, allow_unknown=True)
    assert f"{data.shards}: 3 unknown ids" in caplog.text
    write_report(data.shards, tmp_path / "page.html")
    assert "3 of 8 texts tried" in (tmp_path / "page.html").read_text()


def test_texts_that_change_are_said_but_refuse_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Byte fallback, but nmt_nfkc: no unknown id, and code loses its lines."""
    model = foreign(tmp_path / "t.model", vocab_size=400, model_type="bpe", byte_fallback=True)
    line = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "def f\n\treturn x"}]}
    (tmp_path / "c.jsonl").write_text(json.dumps(line) + "\n")
    assert (
        run("preprocess", tmp_path / "c.jsonl", "--tokenizer", model, "--seq-length", 64, "--out", tmp_path / "o") == 0
    )
    shown = capsys.readouterr().out
    assert "0 unknown ids" in shown and "1 of 2 texts tried (50.0%) does not come back" in shown
    assert "c.jsonl line 1: loses newline, tab, gains space x 2" in shown or "loses newline, tab" in shown


def test_the_counts_are_exact_and_the_same_for_any_number_of_workers(lossy: Path, tmp_path: Path) -> None:
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"hello {'你' * (i % 3)}"},
                {"role": "assistant", "content": "好 fox"},
            ]
        }
        for i in range(300)
    ]
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    totals = []
    for number, (workers, limit) in enumerate([(1, None), (2, None), (1, 100)]):
        settings = Settings(seq_length=64, max_conversations=limit, eval_fraction=0.2)
        out = tmp_path / str(number)
        made = preprocess_files(
            [str(path)], lossy, out, settings, num_workers=workers, allow_unknown=True, block_bytes=16_000
        )
        totals.append(made.totals.text_loss)
    assert totals[0] == totals[1]
    # Equal characters that are unknown and next to each other are one id.
    assert totals[0] and (totals[0].unknown_ids, totals[0].trained_unknown_ids) == (500, 300)
    assert totals[2] and (totals[2].unknown_ids, totals[2].trained_unknown_ids) == (166, 100)


def test_a_model_that_loses_nothing_is_known_as_such(tmp_path: Path) -> None:
    plain = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "vocab_size": 400}
    for kind in ("bpe", "unigram"):
        for changed, loses_nothing in [
            ({}, True),
            ({"add_dummy_prefix": False}, True),
            ({"byte_fallback": False, "vocab_size": 60}, False),
            ({"normalization_rule_name": "nmt_nfkc"}, False),
            ({"remove_extra_whitespaces": True}, False),
        ]:
            settings = {"byte_fallback": True, "model_type": kind} | plain | changed
            tokenizer = Tokenizer.load(foreign(tmp_path / "t.model", **settings))
            assert tokenizer.loses_nothing == loses_nothing, settings
            texts = [" ", "", "a  b ", "\n\t", "你\0", "\u2581", *KNOWN]
            back = [tokenizer.decode(ids) for ids in tokenizer.encode_batch(texts)]
            assert tokenizer.round_trip(texts) == back and tokenizer.round_trip([]) == []
            assert not loses_nothing or back == texts


@pytest.mark.parametrize(
    ("text", "back", "lost", "reason"),
    [
        ("a\nb\n\tc", "a b c", {"newline": 2, "tab": 1}, "loses newline x 2, tab, gains space x 2"),
        ("ﬁ", "fi", {"ﬁ (U+FB01)": 1}, "loses ﬁ (U+FB01), gains 'f', 'i'"),
        ("ab", "ba", {}, "characters change their order"),
        ("a", "a ", {}, "gains space"),
        ("\u200b\xa0", "", {"U+200B": 1, "no-break space": 1}, "loses U+200B, no-break space"),
    ],
)
def test_a_change_in_words(text: str, back: str, lost: dict[str, int], reason: str) -> None:
    assert describe_change(text, back) == (lost, reason)


def test_a_folder_of_an_earlier_version_does_not_claim_to_have_counted() -> None:
    assert list(describe_loss(None, 10, 5)) == [
        "unknown ids and texts that do not come back were not counted when these shards were made"
    ]
