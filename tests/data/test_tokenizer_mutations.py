"""A damaged tokenizer file is one typed line, or what it says is what the library says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tokenizers")

from tokenizer_mutations import (
    byte_fallback,
    byte_level,
    check_json,
    check_model,
    mutated_json,
    mutated_model,
    run,
    sentencepiece_models,
)

from lumina_ds.cli.main import cli, run_command
from lumina_ds.data.tokenizer import trial
from lumina_ds.data.tokenizer.sentencepiece_file import NORMAL, read_model_file
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from lumina_ds.errors import DataError

# Digests of files that were tried already are remembered for the process; each file here is another.
SPLIT = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}


def test_mutants_of_tokenizer_json(tmp_path: Path) -> None:
    documents = [byte_level(), byte_fallback()]
    ends = run(250, 1, tmp_path, lambda generator: mutated_json(documents, generator), check_json)
    assert ends["accepted"] > 10 and ends["refused"] > 100


def test_mutants_of_sentencepiece_models(tmp_path: Path) -> None:
    models = sentencepiece_models()
    ends = run(250, 1, tmp_path, lambda generator: mutated_model(models, generator), check_model)
    assert ends["accepted"] > 5 and ends["refused"] > 100


def test_the_files_themselves_are_accepted(tmp_path: Path) -> None:
    for document in (byte_level(), byte_fallback()):
        (tmp_path / "t.json").write_text(json.dumps(document))
        assert check_json(tmp_path / "t.json") == "accepted"
    for model in sentencepiece_models():
        (tmp_path / "t.model").write_bytes(model)
        assert check_model(tmp_path / "t.model") == "accepted"


def with_change(**changes: Any) -> dict[str, Any]:
    document = byte_level()
    model = changes.pop("model", {})
    return {**document, **changes, "model": {**document["model"], **model}}


def with_piece(name: str, number: int) -> dict[str, Any]:
    return with_change(model={"vocab": byte_level()["model"]["vocab"] | {name: number}})


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (with_change(pre_tokenizer={"type": "Sequence", "pretokenizers": [SPLIT, byte_level()["pre_tokenizer"]]}), "retry-limit"),
        (with_change(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAAAAAA////"}), "Cannot parse"),
        (with_change(model={"merges": ["ab"]}), "is a damaged tokenizer.json"),
        (with_change(model={"merges": [None]}), "is a damaged tokenizer.json"),
        (with_change(model={"vocab": []}), "is a damaged tokenizer.json"),
        (with_change(added_tokens=7), "is a damaged tokenizer.json"),
        (with_piece("zz", 2**32 - 1), r"gives 'zz' the id 4294967295, beyond 16777215"),
        (with_piece("zz", 2**32), "is a damaged tokenizer.json"),
        (with_piece("zz", 5), "gives the id 5 to several tokens"),
        (with_change(model={"end_of_word_suffix": "</w>"}), "would lose characters"),
        (with_change(model={"continuing_subword_prefix": "##"}), "damaged|would lose"),
        ({**byte_fallback(), "model": {**byte_fallback()["model"], "ignore_merges": True}}, "looks up whole words"),
    ],
)  # fmt: skip
def test_one_typed_line_and_no_traceback(
    document: dict[str, Any], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import re

    (tmp_path / "t.json").write_text(json.dumps(document))
    assert run_command(cli, ["tokenizer", "inspect", str(tmp_path / "t.json")]) == 3
    error = capfd.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1 and "panicked" not in error


@pytest.mark.parametrize(
    ("document", "limits"),
    [
        # Endless enough: each place of a long text takes a while, and none too long for the library's own limit.
        (with_change(normalizer={"type": "Replace", "pattern": {"Regex": "a*a*a*a*[^a]"}, "content": "a" * 9}), {"CPU_SECONDS": 1}),
        (with_change(normalizer={"type": "Prepend", "prepend": "x" * 400_000}), {"MEMORY_BYTES": 400 << 20, "MEMORY_PER_BYTE": 0}),
    ],
    ids=["time", "memory"],
)  # fmt: skip
def test_time_and_memory_are_limited(
    document: dict[str, Any], limits: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in limits.items():
        monkeypatch.setattr(trial, name, value)
    (tmp_path / "t.json").write_text(json.dumps(document))
    with pytest.raises(
        DataError, match=r"t.json cannot be read and tried within \d+ seconds of CPU time|memory allocation"
    ):
        Tokenizer.load(tmp_path / "t.json")


def test_dropout_is_off_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "one.json").write_text(json.dumps(with_change(model={"dropout": 0.9})))
    (tmp_path / "other.json").write_text(json.dumps(byte_level()))
    dropped, plain = (Tokenizer.load(tmp_path / name) for name in ("one.json", "other.json"))
    assert "sets a BPE dropout of 0.9; it is off here" in caplog.text
    texts = ["the quick brown fox"] * 20
    assert dropped.encode_batch(texts) == plain.encode_batch(texts)
    assert dropped.encode_template(texts[0]) == plain.encode_template(texts[0])


def test_gaps_of_ids_leave_the_markers_behind_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "t.json").write_text(json.dumps(with_piece("zz", 900)))
    tokenizer = Tokenizer.load(tmp_path / "t.json")
    assert tokenizer.num_own_ids == 901 and tokenizer.vocab_size == 905
    assert [*tokenizer.role_ids.values(), tokenizer.end_id] == [901, 902, 903, 904]
    assert "the library's ids are used" in caplog.text


def test_a_piece_that_is_not_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model, _) = sentencepiece_models()
    piece = next(p.text for p in read_model_file(model).pieces if p.kind == NORMAL and len(p.text) == 2)
    damaged = model.replace(b"\x0a\x02" + piece, b"\x0a\x02\xff\xff", 1)
    assert damaged != model
    (tmp_path / "t.model").write_bytes(damaged)
    for verb in (
        ["tokenizer", "inspect", str(tmp_path / "t.model")],
        ["tokenizer", "inspect", str(tmp_path / "t.model"), "x"],
    ):
        assert run_command(cli, verb) == 3
        assert "is a damaged SentencePiece model: a piece is not UTF-8" in capsys.readouterr().err


def test_probes_name_the_characters_of_every_expression() -> None:
    document = {"normalizer": [{"x": {"pattern": {"Regex": "q+"}}}], "model": {"vocab": {"Regex": 1}}}
    texts = list(trial.probes(document))
    assert "q" * trial.RUN_LENGTH in texts and all(len(text) <= 2 * trial.RUN_LENGTH + 80 for text in texts)
