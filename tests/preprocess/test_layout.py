"""The batch layout, compiled and interpreted, equals the chat template's reference, token for token."""

from __future__ import annotations

import random

import numpy as np
import pytest

from lumina_ds.data.chat_template import encode_conversations
from lumina_ds.data.conversation import Conversation, Role, Turn
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from preprocess import layout
from preprocess.layout import lay_out
from preprocess.scan import Conversations

ROLES: list[Role] = ["system", "user", "assistant"]


def conversations(count: int) -> list[tuple[Turn, ...]]:
    generator = random.Random(count)
    result = []
    for _ in range(count):
        roles = generator.choices(ROLES, k=generator.randint(0, 6))
        roles.insert(generator.randint(0, len(roles)), "assistant")
        result.append(
            tuple(
                Turn(role, generator.choice(["the fox", " ", "a\n\u2581 b", "<|end|>", "dog " * 40, "\x00"]))
                for role in roles
            )
        )
    return result


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("has_bos", [True, False])
@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_equals_the_template(
    tokenizer: Tokenizer, count: int, has_bos: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(layout, "_loop", lambda: layout._fill)
    if not has_bos:
        monkeypatch.setattr(tokenizer, "bos_id", None)
    made = conversations(count)
    documents = lay_out(Conversations.join(made), tokenizer, np.uint16)
    expected = encode_conversations([Conversation(turns) for turns in made], tokenizer)
    assert documents.ids.dtype == np.uint16 and documents.mask.dtype == np.uint8
    assert documents.ids.tolist() == [token for ids, _ in expected for token in ids]
    assert documents.mask.tolist() == [value for _, mask in expected for value in mask]
    assert documents.lengths.tolist() == [len(ids) for ids, _ in expected]
    assert documents.first_trained.tolist() == [mask.index(1) for _, mask in expected]


def test_where_takes_whole_documents(tokenizer: Tokenizer) -> None:
    made = conversations(5)
    chosen = np.array([True, False, False, True, True])
    some = lay_out(Conversations.join(made), tokenizer, np.uint16).where(chosen)
    expected = lay_out(Conversations.join([made[0], made[3], made[4]]), tokenizer, np.uint16)
    for column, other in zip(some, expected, strict=True):
        assert column.tolist() == other.tolist() and column.dtype == other.dtype
