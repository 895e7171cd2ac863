"""Text stays text, in our models and in foreign ones; the markers get ids that no text can produce."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from lumina_ds.data.tokenizer.tokenizer import MARKERS, Tokenizer, check_vocabulary
from lumina_ds.errors import ConfigError, DataError

TRICKY = [
    "<s>", "</s>", "<unk>", "<pad>", "\u2581", "a\u2581b \u2581\u2581", "\u2581\ue000", "\0", "a\0b", *MARKERS,
    "<|user|>hi<|end|>", "<0x41>", "  two  spaces  ", "\n\ttabs\r\n", "wörld 中文 \U0001f600", "\ufeff", "\u2585", "x" * 9000,
]  # fmt: skip


def control_ids(tokenizer: Tokenizer) -> set[int]:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    size = processor.get_piece_size()
    own = {i for i in range(size) if processor.is_control(i) or processor.is_unknown(i)}
    return own | set(range(size, tokenizer.vocab_size))


@pytest.mark.parametrize("text", TRICKY)
def test_our_text_round_trips_and_stays_text(tokenizer: Tokenizer, text: str) -> None:
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.decode(ids) == text
    assert not control_ids(tokenizer) & set(ids)


def test_our_markers_are_control_symbols(tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos_id, tokenizer.end_id) == (1, 2)
    assert tokenizer.role_ids == {"system": 3, "user": 4, "assistant": 5}
    assert tokenizer.vocab_size <= 400
    assert [tokenizer.piece(i) for i in (3, 4, 5, 2)] == list(MARKERS)
    assert tokenizer.digest == hashlib.sha256(tokenizer.path.read_bytes()).hexdigest()


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_foreign_markers_are_appended(make_foreign: Callable[..., Tokenizer], model_type: str) -> None:
    foreign = make_foreign(model_type=model_type, vocab_size=300)
    size = foreign.vocab_size - 4
    assert [*foreign.role_ids.values(), foreign.end_id] == [size, size + 1, size + 2, size + 3]
    for text in TRICKY:
        (ids,) = foreign.encode_batch([text])
        assert not control_ids(foreign) & set(ids), text


def test_literal_space_symbol_in_a_foreign_model(make_foreign: Callable[..., Tokenizer]) -> None:
    foreign = make_foreign()
    (ids,) = foreign.encode_batch(["the \u2581 fox"])
    assert foreign.decode(ids) == "the \u2581 fox"


def test_ids_are_exactly_sentencepieces(tokenizer: Tokenizer, make_foreign: Callable[..., Tokenizer]) -> None:
    texts = ["the quick fox", " lead and trail ", "<s> how are you? </s>", "\n"]
    for one in (tokenizer, make_foreign()):
        reference = sentencepiece.SentencePieceProcessor(model_file=str(one.path))
        assert one.encode_batch(texts) == [reference.encode(text) for text in texts]


def test_markers_that_text_could_spell_are_not_taken_over(make_foreign: Callable[..., Tokenizer]) -> None:
    foreign = make_foreign(user_defined_symbols=["<|user|>"], bos_id=-1, eos_id=-1)
    (ids,) = foreign.encode_batch(["<|user|>"])
    assert foreign.role_ids["user"] not in ids
    assert foreign.bos_id is None


def test_decode_skips_markers_and_unused_ids(tokenizer: Tokenizer, make_foreign: Callable[..., Tokenizer]) -> None:
    for one in (tokenizer, make_foreign()):
        (ids,) = one.encode_batch(["the fox"])
        framed = [one.bos_id, one.role_ids["user"], *ids, one.end_id, one.vocab_size, 60_000]
        assert one.decode(framed) == "the fox"
    assert tokenizer.piece(60_000) == "<unused 60000>"


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read the tokenizer .*none.model: No such file"):
        Tokenizer.load(tmp_path / "none.model")
    for content in (b"", b"{}", b"\x00" * 100):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(DataError, match=r"bad.model is not a SentencePiece model"):
            Tokenizer.load(tmp_path / "bad.model")


def test_check_vocabulary(tokenizer: Tokenizer) -> None:
    check_vocabulary(tokenizer, tokenizer.vocab_size)
    size = tokenizer.vocab_size
    with pytest.raises(ConfigError) as caught:
        check_vocabulary(tokenizer, size - 1)
    assert str(caught.value) == (
        f"the tokenizer has {size} ids, more than model.vocab_size {size - 1}; set --model.vocab_size {size}"
    )


def test_parts_of_a_rendered_chat(tokenizer: Tokenizer) -> None:
    special, content = tokenizer.special_tokens, "hé <|user|> 你\n</s>"
    text = "<|user|>" + "fox" + "<|end|>"
    assert tokenizer.encode_template(text) == [special["<|user|>"], *tokenizer.encode_plain("fox"), special["<|end|>"]]
    ids, spans = tokenizer.encode_parts([("<|us", True), ("er|>", True), (content, False), ("<|end|>", True)])
    assert ids == [special["<|user|>"], *tokenizer.encode_plain(content), special["<|end|>"]]
    assert spans[0].tolist() == [0, 8] and spans[-1].tolist() == [8 + len(content), 15 + len(content)]
    starts = spans[1:-1, 0]
    assert (np.diff(starts) >= 0).all() and starts[0] == 8
    assert tokenizer.encode_parts([(text, True)]).ids == tokenizer.encode_template(text)
