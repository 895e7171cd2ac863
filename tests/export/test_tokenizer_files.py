"""The exported tokenizer, read by transformers: ids equal ours, whatever a content spells."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece

from lumina_ds.data.chat_template import encode_conversations, encode_prompt
from lumina_ds.data.tokenizer.tokenizer import MARKERS, Tokenizer
from lumina_ds.data.turns import Conversation, ToolCall, Turn, to_messages
from lumina_ds.errors import DataError
from lumina_ds.export.chat_template import GUARD, split_token
from lumina_ds.export.fast_tokenizer import fast_tokenizer_document
from lumina_ds.export.tokenizer import check_same_ids, write_tokenizer

transformers = pytest.importorskip("transformers")

LINES = [
    "the quick brown fox, isn't it?",
    "def f(x):\n    return x --- ====",
    "l'été à Noël 123",
    "日本語 Привет",
] * 5
# The check at export time does not know these.
TURNS = (
    Turn("system", " Be brief.\n"),
    Turn("user", "Is <|end|> or <s> a word?<|assistant|><|en<|end|>d|> <|user|>"),
    Turn("assistant", "   no\t\n\n<unk></s>    done "),
    Turn("user", "Ünïcödé 漢字 \U0001f680 <0x0A>"),
)


def sentencepiece_model(folder: Path, **settings: object) -> Path:
    model = io.BytesIO()
    defaults = {"vocab_size": 400, "model_type": "bpe", "byte_fallback": True, "hard_vocab_limit": False}
    ascii_lines = [" ".join(map(chr, range(33, 127)))] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES + ascii_lines), model_writer=model, minloglevel=2, **(defaults | settings)
    )
    path = folder / "some.model"
    path.write_bytes(model.getvalue())
    return path


def ours(folder: Path) -> Path:
    from preprocess.train_tokenizer import train_tokenizer

    lines = [json.dumps({"messages": [{"role": "assistant", "content": line}]}) for line in LINES]
    (folder / "chats.jsonl").write_text("\n".join(lines) + "\n")
    train_tokenizer([str(folder / "chats.jsonl")], 400, folder / "some.model")
    return folder / "some.model"


def llama(folder: Path) -> Path:
    """With a dummy prefix and without our markers, which are appended."""
    return sentencepiece_model(folder, normalization_rule_name="identity", remove_extra_whitespaces=False)


def nfkc_unigram(folder: Path) -> Path:
    return sentencepiece_model(folder, model_type="unigram")


def byte_level(folder: Path) -> Path:
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, trainers

    one = Fast(models.BPE())
    one.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    one.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    one.train_from_iterator(LINES, trainer)
    one.add_tokens(["   ", "done"])  # ordinary additions, one of them found again in its own repetition
    one.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def chat_wrapped(chat: Conversation) -> Conversation:
    """The same with its definitions as reading gives them."""
    return replace(chat, tools=tuple(f'{{"type": "function", "function": {tool}}}' for tool in chat.tools))


@pytest.mark.parametrize("make", [ours, llama, nfkc_unigram, byte_level])
def test_transformers_gives_our_ids(make, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizer = Tokenizer.load(make(tmp_path))
    out = tmp_path / "out"
    out.mkdir()
    write_tokenizer(tokenizer, out, context=64)
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    messages = [{"role": turn.role, "content": turn.content} for turn in TURNS]

    [(expected, _)] = encode_conversations([Conversation(TURNS)], tokenizer)
    assert theirs.apply_chat_template(messages, return_dict=False) == expected
    assert expected.count(tokenizer.end_id) == len(TURNS)
    call = ToolCall("f", '{"x": "<|end|></tool_call> é"}', "c")
    asked = (
        *TURNS,
        Turn("assistant", "", "hm <s>", (call, call._replace(id="d"))),
        Turn("tool", "<|end|>", "", (), "c"),
    )
    chat = Conversation((*asked, Turn("assistant", "so", "", (call,))), tools=('{"name": "f", "é": ["<|user|>"]}',))
    messages_with_tools, tools = to_messages(chat)
    [(expected_with_tools, _)] = encode_conversations([chat_wrapped(chat)], tokenizer)
    assert theirs.apply_chat_template(messages_with_tools, tools=tools, return_dict=False) == expected_with_tools
    messages_with_tools[-2]["tool_call_id"] = "d"
    with pytest.raises(Exception, match="in the order of their calls"):
        theirs.apply_chat_template(messages_with_tools)

    prompt = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert prompt == encode_prompt(TURNS, tokenizer)

    assert [theirs.convert_tokens_to_ids(marker) for marker in MARKERS] == [
        *tokenizer.role_ids.values(),
        tokenizer.end_id,
    ]
    assert theirs.eos_token_id == theirs.pad_token_id == tokenizer.end_id
    assert theirs.bos_token_id == tokenizer.bos_id and theirs.model_max_length == 64
    [plain] = tokenizer.encode_batch(["hello there"])
    assert theirs("hello there").input_ids == ([tokenizer.bos_id] if tokenizer.bos_id is not None else []) + plain
    assert theirs.decode(expected, skip_special_tokens=True).endswith("Ünïcödé 漢字 \U0001f680 <0x0A>")
    assert ((out / "tokenizer.model").exists()) == (make is not byte_level)


def test_roles_without_a_marker_are_refused_by_the_template(tmp_path):
    write_tokenizer(Tokenizer.load(ours(tmp_path)), tmp_path, context=64)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(Exception, match="unknown role narrator"):
        theirs.apply_chat_template([{"role": "narrator", "content": "x"}])


def test_another_order_of_merges_is_found(tmp_path):
    tokenizer = Tokenizer.load(ours(tmp_path))
    document = fast_tokenizer_document(tokenizer)
    document["model"]["merges"].reverse()
    with pytest.raises(DataError, match=r"other ids than training saw, from token \d+ .*--no-fast-tokenizer"):
        check_same_ids(tokenizer, document, "{{ bos_token }}{{ messages[0]['content'] }}")


def test_what_tokenizer_json_cannot_express_is_refused(tmp_path):
    tokenizer = Tokenizer.load(sentencepiece_model(tmp_path, treat_whitespace_as_suffix=True))
    with pytest.raises(DataError, match="marks spaces in a way"):
        write_tokenizer(tokenizer, tmp_path, context=64)


def test_without_a_fast_tokenizer_only_the_source_is_written(tmp_path):
    tokenizer = Tokenizer.load(sentencepiece_model(tmp_path, treat_whitespace_as_suffix=True))
    out = tmp_path / "out"
    out.mkdir()
    write_tokenizer(tokenizer, out, context=64, with_fast=False)
    assert [path.name for path in out.iterdir()] == ["tokenizer.model"]
    assert (out / "tokenizer.model").read_bytes() == tokenizer.path.read_bytes()


def test_a_split_token_is_not_found_again():
    assert split_token("<|end|>") == f"<{GUARD}|end|>"
    for length in range(1, 9):
        guarded = (" " * length).replace("   ", split_token("   "))
        assert "   " not in guarded and guarded.replace(GUARD, "") == " " * length


def test_an_exported_tokenizer_json_gives_itself_and_the_same_ids(tmp_path):
    """The way of a folder that is imported and exported again."""
    source = Tokenizer.load(byte_level(tmp_path))
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, tokenizer in ((first, source), (second, None)):
        folder.mkdir()
        write_tokenizer(tokenizer or Tokenizer.load(first / "tokenizer.json"), folder, context=64)
    assert (second / "tokenizer.json").read_bytes() == (first / "tokenizer.json").read_bytes()
    assert (second / "tokenizer_config.json").read_bytes() == (first / "tokenizer_config.json").read_bytes()
    again = Tokenizer.load(second / "tokenizer.json")
    conversation = [Conversation(TURNS)]
    assert encode_conversations(conversation, again) == encode_conversations(conversation, source)
