"""Where a reply ends: at the end of the turn, at max_new_tokens, or with the context."""

from pathlib import Path

import pytest
import torch

from lumina_ds.config.schema import ModelConfig
from lumina_ds.data.conversation import Turn
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from lumina_ds.errors import ConfigError
from lumina_ds.generate import chat
from lumina_ds.generate.chat import generate_ids, stream_reply
from lumina_ds.generate.load import LoadedModel
from lumina_ds.generate.sampling import SamplingSettings
from lumina_ds.model.init import initialize
from lumina_ds.model.transformer import CausalLM

CONFIG = ModelConfig(
    vocab_size=400, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
    max_position_embeddings=24, num_experts=2, moe_intermediate_size=8,
)  # fmt: skip


@pytest.fixture
def loaded(corpus) -> LoadedModel:
    model = CausalLM(CONFIG).eval()
    initialize(model, CONFIG, seed=0)
    return LoadedModel(model, Tokenizer.load(Path(corpus.tokenizer)), torch.device("cpu"))


def scripted(monkeypatch, ids):
    script = iter(ids)
    monkeypatch.setattr(chat, "sample", lambda logits, settings, generator: next(script))


def test_the_end_of_turn_ends_the_reply_and_is_not_part_of_it(loaded, monkeypatch):
    scripted(monkeypatch, [270, 271, loaded.tokenizer.end_id, 272])
    assert list(generate_ids(loaded, [1, 5, 6], SamplingSettings())) == [270, 271]


def test_max_new_tokens_and_the_context_end_it_too(loaded, monkeypatch):
    scripted(monkeypatch, [270] * 100)
    assert len(list(generate_ids(loaded, [1, 5, 6], SamplingSettings(max_new_tokens=4)))) == 4
    assert len(list(generate_ids(loaded, [1, 5, 6], SamplingSettings(max_new_tokens=99)))) == 24 - 3


def test_a_prompt_that_fills_the_context_is_refused(loaded):
    with pytest.raises(ConfigError, match="the prompt has 24 tokens and the model's context is 24"):
        list(generate_ids(loaded, [5] * 24, SamplingSettings()))


def test_pieces_join_to_the_text_and_never_cut_a_character(loaded, monkeypatch):
    text = "3 plus 4 is 7, \N{GRINNING FACE}!"
    (ids,) = loaded.tokenizer.encode_batch([text])
    assert len(ids) < 40
    scripted(monkeypatch, [*ids, loaded.tokenizer.end_id])
    monkeypatch.setattr(loaded.model.config, "max_position_embeddings", 99)
    pieces = list(stream_reply(loaded, [Turn("user", "sum")], SamplingSettings()))
    assert "".join(pieces) == text
    assert "\N{GRINNING FACE}" in pieces  # its four bytes came as one piece


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        (("8",), "3 plus 4 is 7, 7 is 3 plus 4"),
        (("is 7",), "3 plus 4 "),
        (("7 is", "is 7,"), "3 plus 4 "),
        (("is 7, 8", "plus 4x"), "3 plus 4 is 7, 7 is 3 plus 4"),
        (("4",), "3 plus "),
        (("3",), ""),
    ],
)
def test_a_stop_text_ends_the_reply_before_it_and_is_never_shown(loaded, monkeypatch, stops, expected):
    (ids,) = loaded.tokenizer.encode_batch(["3 plus 4 is 7, 7 is 3 plus 4"])
    scripted(monkeypatch, [*ids, loaded.tokenizer.end_id])
    monkeypatch.setattr(loaded.model.config, "max_position_embeddings", 99)
    assert "".join(stream_reply(loaded, [Turn("user", "sum")], SamplingSettings(stop=stops))) == expected


def test_the_penalty_sees_the_prompt_and_the_reply(loaded, monkeypatch):
    """With a penalty that no logit survives, greedy decoding never says anything twice."""
    settings = SamplingSettings(temperature=0, repetition_penalty=1e6, max_new_tokens=20)
    ids = list(generate_ids(loaded, [1, 5, 6], settings, stop_at_end=False))
    assert len(set(ids)) == len(ids) == 20 and not {1, 5, 6} & set(ids)
