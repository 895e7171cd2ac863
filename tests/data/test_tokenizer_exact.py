"""The ids of any text are SentencePiece's own, through the chunk table and without it, for every kind of model."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lumina_ds.data.tokenizer import chunks
from lumina_ds.data.tokenizer import sentencepiece as our_sentencepiece
from lumina_ds.data.tokenizer.chunks import SAMPLE, ChunkEncoder
from lumina_ds.data.tokenizer.flat import Texts
from lumina_ds.data.tokenizer.merges import make_merges
from lumina_ds.data.tokenizer.sentencepiece_file import BYTE, CONTROL, read_model_file
from lumina_ds.data.tokenizer.table import ChunkTable
from lumina_ds.data.tokenizer.tokenizer import MARKERS, Tokenizer
from preprocess.train_tokenizer import train_tokenizer

CORPUS = [
    "the quick brown fox jumps over the lazy dog, isn't it? He said: \"no-one's there\" at 12:30.",
    "def f(x):\n    return x[0] + y  # a comment\n\n\nclass A(B):\n\tpass",
    "l'été déjà à Noël; größer; Привет, мир! Καλημέρα; 日本語のテキスト、中文文本。 한국어",
    "hello there, how are you today? I am fine, thank you 123 4567",
]
SPECIAL = [
    "<s>",
    "</s>",
    "<unk>",
    "<0x41>",
    "\0",
    " ",
    "  ",
    "\n",
    "\t",
    "\r\n",
    "é",
    "e\u0301",
    "\U0001f600",
    *MARKERS,
]
WORDS = sorted({word for line in CORPUS for word in line.split()})
TEXTS = st.lists(
    st.one_of(st.text(max_size=12), st.sampled_from(SPECIAL), st.sampled_from(WORDS), st.sampled_from(WORDS).map(" ".__add__)),
    max_size=30,
).map(lambda parts: "".join(parts).replace("\u2581", ""))  # fmt: skip

MISTRAL = "tokenizer.model.v1"

# What each model differs in from a plain BPE one with byte fallback; the last item: does the chunk table take it?
FOREIGN: dict[str, tuple[dict[str, object], bool]] = {
    "dummy_prefix": ({}, True),
    "no_dummy_prefix": ({"add_dummy_prefix": False}, True),
    "pieces_across_words": ({"split_by_whitespace": False}, True),
    "spaces_only_pieces": ({"allow_whitespace_only_pieces": True, "split_digits": True}, True),
    "user_symbols": ({"user_defined_symbols": ["<|user|>", "o w", "the\n", "''", "\u2581\u2581"]}, False),
    "user_symbols_without_space": ({"user_defined_symbols": ["<|user|>", "ow", "ox", "\n\n", "''"]}, True),
    "no_byte_fallback": ({"byte_fallback": False}, False),
    "normalized": ({"normalization_rule_name": "nmt_nfkc"}, False),
    "spaces_removed": ({"remove_extra_whitespaces": True}, False),
    "space_as_suffix": ({"treat_whitespace_as_suffix": True}, False),
    "unigram": ({"model_type": "unigram"}, False),
}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("models")
    made = {}
    for name, (options, _) in FOREIGN.items():
        common: dict[str, object] = {"model_type": "bpe", "vocab_size": 480, "byte_fallback": True, "minloglevel": 2}
        common |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "hard_vocab_limit": False}
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([line for text in CORPUS for line in text.split("\n") if line] * 4),
            model_prefix=str(folder / name),
            **(common | options),
        )
        made[name] = (folder / f"{name}.model").read_bytes()
    messages = [{"role": "assistant", "content": text} for text in CORPUS]
    (folder / "chats.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    for kind in ("bpe", "unigram"):
        path = train_tokenizer([str(folder / "chats.jsonl")], 500, folder / "ours", kind).path
        made[f"our_{kind}"] = path.read_bytes()
    return made


def reference(model: bytes) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    return processor


def through_table(model: bytes, num_rows: int = 1 << 12) -> ChunkEncoder:
    encoder = ChunkEncoder.for_model(reference(model), model, read_model_file(model), num_rows)
    assert encoder is not None
    return encoder


def as_lists(encoded: tuple[np.ndarray, np.ndarray]) -> list[list[int]]:
    ids, offsets = encoded
    assert ids.dtype == np.uint32 and offsets.dtype == np.int64
    return [ids[begin:end].tolist() for begin, end in pairwise(offsets)]


def mistral() -> bytes:
    spec = importlib.util.find_spec("mistral_common")
    if spec is None or spec.origin is None:
        pytest.skip("mistral-common is not installed (extra bench)")
    return (Path(spec.origin).parent / "data" / MISTRAL).read_bytes()


@pytest.mark.parametrize("name", [*FOREIGN, "our_bpe", "our_unigram"])
def test_which_models_the_table_takes(models: dict[str, bytes], name: str) -> None:
    encoder = ChunkEncoder.for_model(reference(models[name]), models[name], read_model_file(models[name]), 1 << 10)
    assert (encoder is not None) == (FOREIGN[name][1] if name in FOREIGN else name == "our_bpe")


@pytest.mark.parametrize(("name", "merged"), [("dummy_prefix", True), ("our_bpe", True), ("user_symbols", False)])
def test_where_compiled_merges_take_the_place_of_sentencepiece(
    models: dict[str, bytes], name: str, merged: bool
) -> None:
    assert (make_merges(read_model_file(models[name])) is not None) == merged


def test_model_file_reads_as_the_library_does(models: dict[str, bytes]) -> None:
    for content in models.values():
        model, processor = read_model_file(content), reference(content)
        assert len(model.pieces) == processor.get_piece_size()
        for i, piece in enumerate(model.pieces):
            assert piece.text.decode() == processor.id_to_piece(i) and piece.score == processor.get_score(i)
            assert (piece.kind == CONTROL, piece.kind == BYTE) == (processor.is_control(i), processor.is_byte(i))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, (_, taken) in FOREIGN.items() if taken] + ["our_bpe"])
def test_any_text_through_the_table(models: dict[str, bytes], name: str) -> None:
    encoder, processor = through_table(models[name]), reference(models[name])

    @settings(max_examples=60, deadline=None)
    @given(st.lists(TEXTS, max_size=6))
    def check(texts: list[str]) -> None:
        assert as_lists(encoder.encode(Texts.join(texts))) == processor.encode(texts)

    check()


def test_any_text_through_mistrals_model() -> None:
    model = mistral()
    encoder, processor = through_table(model, 1 << 14), reference(model)

    @settings(max_examples=200, deadline=None)
    @given(st.lists(TEXTS, max_size=6))
    def check(texts: list[str]) -> None:
        assert as_lists(encoder.encode(Texts.join(texts))) == processor.encode(texts)

    check()
    assert as_lists(encoder.encode(Texts.join(CORPUS))) == processor.encode(CORPUS)


@pytest.mark.parametrize("name", [*FOREIGN, "our_bpe", "our_unigram"])
def test_any_text_through_the_tokenizer(
    models: dict[str, bytes], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(our_sentencepiece, "CHUNKS_FROM_CHARACTERS", 1)
    (tmp_path / "m").write_bytes(models[name])
    tokenizer, processor = Tokenizer.load(tmp_path / "m"), reference(models[name])
    size = processor.get_piece_size()
    control = {i for i in range(size) if processor.is_control(i)} | set(range(size, tokenizer.vocab_size))

    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.one_of(TEXTS, st.just("a \u2581 b")), max_size=6))
    def check(texts: list[str]) -> None:
        encoded = tokenizer.encode_batch(texts)
        assert as_lists(tokenizer.encode_flat(texts)) == encoded
        for text, ids in zip(texts, encoded, strict=True):
            assert not control & set(ids)
            if "\u2581" not in text:
                assert ids == processor.encode(text)
            elif name in ("our_bpe", "our_unigram"):
                assert tokenizer.decode(ids) == text

    check()


def test_a_full_table_starts_again(models: dict[str, bytes]) -> None:
    encoder, processor = through_table(models["dummy_prefix"], 64), reference(models["dummy_prefix"])
    texts = [f"{word} {number}" for number in range(40) for word in WORDS]
    for begin in range(0, len(texts), 97):
        assert as_lists(encoder.encode(Texts.join(texts[begin : begin + 97]))) == processor.encode(
            texts[begin : begin + 97]
        )
        assert encoder._idle_tables[0].num_rows <= 48  # three quarters of the table, whatever was encoded


def test_an_interrupted_call_leaves_no_trace(models: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, processor = through_table(models["our_bpe"]), reference(models["our_bpe"])

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ChunkTable, "_learn", interrupt)
        encoder.encode(Texts.join(CORPUS))
    assert as_lists(encoder.encode(Texts.join(CORPUS))) == processor.encode(CORPUS)


def test_threads_encode_side_by_side(models: dict[str, bytes]) -> None:
    encoder, processor = through_table(models["our_bpe"]), reference(models["our_bpe"])
    batches = [[f"{text} {number}" for text in CORPUS] for number in range(40)]
    with ThreadPoolExecutor(4) as threads:
        encoded = list(threads.map(lambda batch: as_lists(encoder.encode(Texts.join(batch))), batches))
    assert encoded == [processor.encode(batch) for batch in batches]
    assert 1 <= len(encoder._idle_tables) <= 4


def test_long_chunks_and_windows(models: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "WINDOW_BYTES", 1000)
    encoder, processor = through_table(models["our_bpe"]), reference(models["our_bpe"])
    texts = [
        "o" * 70_000,
        "",
        *CORPUS,
        "x" * 33,
        "x" * 32,
        "x" * 8,
        "x" * 7 + "\0",
        *CORPUS * 20,
        "\U0001f600" * 500,
        "",
    ]
    assert as_lists(encoder.encode(Texts.join(texts))) == processor.encode(texts)
    monkeypatch.setattr(chunks, "MAX_TEXT_BYTES", 50_000)
    assert as_lists(encoder.encode(Texts.join(texts))) == processor.encode(texts)
    assert as_lists(encoder.encode(Texts.join([]))) == []
    assert as_lists(encoder.encode(Texts.join([""]))) == [[]]


def test_a_cut_table_that_lies_is_caught(
    models: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    everywhere = np.ones((256, 256), bool)
    everywhere[:, 0x80:0xC0] = False
    monkeypatch.setattr(chunks, "_cuts", lambda model: everywhere.reshape(-1))
    model = models["our_bpe"]
    with caplog.at_level(logging.WARNING):
        assert ChunkEncoder.for_model(reference(model), model, read_model_file(model)) is None
    assert "differs from SentencePiece on a sample" in caplog.text


def test_without_numba_sentencepiece_encodes(
    models: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_import: Callable[[str], None]
) -> None:
    monkeypatch.setattr(our_sentencepiece, "CHUNKS_FROM_CHARACTERS", 1)
    block_import("lumina_ds.data.tokenizer.kernel")
    (tmp_path / "m").write_bytes(models["our_bpe"])
    assert Tokenizer.load(tmp_path / "m").encode_batch(list(SAMPLE)) == reference(models["our_bpe"]).encode(
        list(SAMPLE)
    )


@pytest.fixture
def block_import(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    import sys

    import lumina_ds.data

    def block(name: str) -> None:
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delattr(lumina_ds.data, name.rpartition(".")[2], raising=False)

    return block


def test_health_of_the_strategy() -> None:
    """The texts drawn above do hold what the tests are about."""
    seen: set[str] = set()

    @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(TEXTS)
    def draw(text: str) -> None:
        seen.update(part for part in SPECIAL if part in text)

    draw()
    assert seen == set(SPECIAL)
