"""Hugging Face's tokenizer.json: text never reaches an added token, and only kinds that can promise that are taken."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina_ds.data.shards.folder import ShardFolder
from lumina_ds.data.shards.manifest import Settings
from lumina_ds.data.shards.verify import verify_folder
from lumina_ds.data.tokenizer.tokenizer import MARKERS, Tokenizer, check_vocabulary
from lumina_ds.errors import ConfigError, DataError, MachineError
from preprocess.pipeline import preprocess_files

tokenizers = pytest.importorskip("tokenizers")

LINES = [
    "the quick brown fox, isn't it?",
    "def f(x):\n    return x",
    "l'été à Noël 123",
    "日本語 Привет \U0001f600",
] * 5
SPECIAL = ["<s>", "</s>", "<unk>", "<|im_start|>"]
ORDINARY = ["<tool_call>", "   "]  # added, but not special
TRICKY = [
    *SPECIAL,
    *ORDINARY,
    *MARKERS,
    "a<s>b",
    "\u2581",
    "a \u2581\u2581b",
    "\0",
    "",
    " ",
    "  two  ",
    "\r\n\t",
    "<0x41>",
]
TEXTS = st.lists(st.one_of(st.text(max_size=10), st.sampled_from([*TRICKY, *LINES[:4]])), max_size=12).map("".join)


def byte_level(special: list[str] = SPECIAL) -> dict[str, Any]:
    """As GPT-2, Llama 3 and Qwen have it."""
    from tokenizers import decoders, models, pre_tokenizers, trainers

    one = tokenizers.Tokenizer(models.BPE())
    one.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    one.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    one.train_from_iterator(LINES, trainer)
    one.add_tokens(ORDINARY)
    one.enable_truncation(4)
    one.enable_padding(length=8)
    one.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return json.loads(one.to_str())


def byte_fallback() -> dict[str, Any]:
    """As Llama 2 and Mistral have it: U+2581 for the space, and bytes for what is unknown."""
    from tokenizers import models, trainers

    one = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=[*SPECIAL, "\u2581"], show_progress=False)
    one.train_from_iterator([line.replace(" ", "\u2581") for line in LINES], trainer)
    document = json.loads(one.to_str())
    document["added_tokens"] = [token for token in document["added_tokens"] if token["content"] != "\u2581"]
    vocabulary = document["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    # A merge that spells a control token, as an ill-made file may have it.
    vocabulary |= {
        piece: len(vocabulary) + i for i, piece in enumerate(["<", "/", "</", "</s", ">"]) if piece not in vocabulary
    }
    document["model"]["merges"] += [["<", "/"], ["</", "s"], ["</s", ">"]]
    document["model"]["byte_fallback"] = True
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    document["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, replace]}
    restore = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    document["decoder"] = {"type": "Sequence", "decoders": [restore, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]}
    return document


@pytest.fixture(scope="module", params=[byte_level, byte_fallback])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("json") / "any.name"
    path.write_text(json.dumps(request.param()))
    return path


def library(path: Path) -> Any:
    return tokenizers.Tokenizer.from_str(path.read_text())


def special_ids(path: Path) -> set[int]:
    return {token["id"] for token in json.loads(path.read_text())["added_tokens"] if token["special"]}


def test_text_stays_text(path: Path) -> None:
    tokenizer = Tokenizer.load(path)
    forbidden = special_ids(path) | set(range(library(path).get_vocab_size(), tokenizer.vocab_size))
    assert len(forbidden) >= len(SPECIAL) + 4

    @settings(max_examples=150, deadline=None)
    @given(st.lists(TEXTS, max_size=3))
    def check(texts: list[str]) -> None:
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
            assert not forbidden & set(ids)
            assert tokenizer.decode(ids) == text

    check()
    for text in TRICKY:
        (ids,) = tokenizer.encode_batch([text])
        assert tokenizer.decode(ids) == text and not forbidden & set(ids)


def test_ids_are_the_librarys_for_ordinary_text(path: Path) -> None:
    reference = library(path)
    reference.no_truncation()
    reference.no_padding()
    texts = [*LINES[:4], *ORDINARY, "a   b<tool_call>", "    <tool_call", "<|user|>"]
    expected = [reference.encode(text, add_special_tokens=False).ids for text in texts]
    assert Tokenizer.load(path).encode_batch(texts) == expected


def test_markers_are_appended(path: Path) -> None:
    tokenizer = Tokenizer.load(path)
    size = max(library(path).get_vocab().values()) + 1
    assert [*tokenizer.role_ids.values(), tokenizer.end_id] == [size, size + 1, size + 2, size + 3]
    assert tokenizer.vocab_size == size + 4 and tokenizer.file_name == "tokenizer.json"
    (ids,) = tokenizer.encode_batch(["the fox"])
    framed = [tokenizer.bos_id or 0, tokenizer.role_ids["user"], *ids, tokenizer.end_id, 60_000]
    assert tokenizer.decode(framed) == "the fox"
    assert [tokenizer.piece(i) for i in (0, size, size + 3, size + 4)] == [
        "<s>",
        *MARKERS[:1],
        MARKERS[3],
        f"<unused {size + 4}>",
    ]
    with pytest.raises(ConfigError, match=f"set --model.vocab_size {size + 4}"):
        check_vocabulary(tokenizer, size)


def test_bos_and_own_markers(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps(byte_level([*SPECIAL, *MARKERS])))
    tokenizer = Tokenizer.load(tmp_path / "t.json")
    assert tokenizer.bos_id == 0
    assert [*tokenizer.role_ids.values(), tokenizer.end_id] == [4, 5, 6, 7]
    assert not {4, 5, 6, 7} & set(tokenizer.encode_batch(["".join(MARKERS)])[0])


def test_a_copy_under_another_name_is_the_same(path: Path, tmp_path: Path) -> None:
    shutil.copyfile(path, tmp_path / "tokenizer.model")
    one, other = Tokenizer.load(path), Tokenizer.load(tmp_path / "tokenizer.model")
    assert one.digest == other.digest and one.encode_batch(TRICKY) == other.encode_batch(TRICKY)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_shard_folder_keeps_it(path: Path, tmp_path: Path, workers: int) -> None:
    messages = [{"role": "user", "content": "<s> the fox"}, {"role": "assistant", "content": LINES[1]}]
    (tmp_path / "in.jsonl").write_text((json.dumps({"messages": messages}) + "\n") * 3)
    preprocess_files(
        [str(tmp_path / "in.jsonl")], path, tmp_path / "out", Settings(seq_length=128), num_workers=workers
    )
    folder = ShardFolder.open(tmp_path / "out")
    verify_folder(folder.path)
    tokenizer = Tokenizer.load(folder.tokenizer_path)
    assert tokenizer.digest == folder.manifest.tokenizer.digest == Tokenizer.load(path).digest
    assert folder.tokenizer_path.name == "tokenizer.json" and not (tmp_path / "out/tokenizer.model").exists()
    (tmp_path / "out/tokenizer.json").rename(tmp_path / "out/tokenizer.model")  # as earlier versions called it
    assert Tokenizer.load(ShardFolder.open(tmp_path / "out").tokenizer_path).digest == tokenizer.digest
    ids, mask = folder.document(0)
    user, assistant = (tokenizer.encode_batch([turn["content"]])[0] for turn in messages)
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    roles, end = tokenizer.role_ids, tokenizer.end_id
    assert ids.tolist() == [*start, roles["user"], *user, end, roles["assistant"], *assistant, end]
    assert mask.tolist() == [0] * (len(ids) - len(assistant) - 1) + [1] * (len(assistant) + 1)


def unigram() -> dict[str, Any]:
    return {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]], "byte_fallback": False}}


def word_piece() -> dict[str, Any]:
    return {"model": {"type": "WordPiece", "unk_token": "[UNK]", "vocab": {"[UNK]": 0, "a": 1}}}


def without_bytes() -> dict[str, Any]:
    return {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}}


def damaged() -> dict[str, Any]:
    document = byte_level()
    document["model"]["merges"] = [["no", "such pieces"]]
    return document


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (unigram, r"t.json is a tokenizer.json of type Unigram, .* use the SentencePiece model it was made from"),
        (word_piece, r"of type WordPiece, in which text can spell control tokens; use a BPE one"),
        (without_bytes, r"would lose characters that its vocabulary lacks"),
        (damaged, r"t.json is a damaged tokenizer.json: "),
        (dict, r"t.json is not a SentencePiece model nor a tokenizer.json"),
    ],
)
def test_refusals(make: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps(make()))
    with pytest.raises(DataError, match=message):
        Tokenizer.load(tmp_path / "t.json")


def test_without_the_package(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MachineError, match=r"needs the package tokenizers; pip install 'lumina-ds\[hf\]'"):
        Tokenizer.load(path)


def test_parts_of_a_rendered_chat(path: Path) -> None:
    document = json.loads(path.read_text())
    for token in document["added_tokens"]:
        token["rstrip"] = token["content"] == "<|im_start|>"
    path.write_text(json.dumps(document))
    reference = library(path)
    reference.no_truncation()
    reference.no_padding()
    tokenizer = Tokenizer.load(path)
    text = "<|im_start|>  user\nhi é   <tool_call> there</s><s>"
    expected = reference.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode_template(text) == expected
    for cut in range(len(text)):  # two strokes of the template are one text
        assert tokenizer.encode_parts([(text[:cut], True), (text[cut:], True)]).ids == expected
    special = tokenizer.special_tokens
    for content in ["a<s>b", "</s>", "<|im_start|>", "\ufdd0<s>\ufdd0", "\ufdd0" * 9, "\ufdd0\ufdd0</s>\ufdd0\ufdd0"]:
        ids, spans = tokenizer.encode_parts([("<|im_start|>", True), (content, False), ("</s>", True)])
        assert [ids[0], ids[-1]] == [special["<|im_start|>"], special["</s>"]]
        assert not set(special.values()) & set(ids[1:-1])
        assert spans[0].tolist() == [0, 12] and spans[-1].tolist() == [12 + len(content), 16 + len(content)]
        assert tokenizer.decode(ids) == content
    # A name that content and template spell together is no special token.
    assert special["<s>"] not in tokenizer.encode_parts([("<", True), ("s>", False)]).ids


def test_what_stands_beside_a_tokenizer(path: Path, tmp_path: Path) -> None:
    shutil.copyfile(path, tmp_path / "tokenizer.json")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.chat_template is None and tokenizer.token_names == {}
    names = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "in config", **names}))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.chat_template.source == "in config"
    assert tokenizer.token_names == {"bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "chat_template.jinja").write_text("its own\n")
    assert Tokenizer.load(tmp_path).chat_template.source == "its own\n"
    own = tokenizer.without_markers()
    assert own.vocab_size == own.num_own_ids == tokenizer.vocab_size - 4 and own.role_ids == {}
    assert own.ids_of(["<s>"]) == [tokenizer.special_tokens["<s>"]]
    (tmp_path / "chat_template.jinja").unlink()
    for content, message in [
        ({"chat_template": [{"name": "default", "template": "one"}, {"name": "rag", "template": "two"}]}, None),
        (
            {"chat_template": [{"name": "rag", "template": "two"}]},
            "\\(rag\\): no chat template of the name default; write the one to use",
        ),
        ([1], "is a list, not an object"),
    ]:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
        if message is None:
            assert Tokenizer.load(tmp_path).chat_template.source == "one"
            continue
        with pytest.raises(DataError, match=message):
            _ = Tokenizer.load(tmp_path).chat_template


def test_a_rendered_chat_has_the_ids_of_transformers(path: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    shutil.copyfile(path, tmp_path / "tokenizer.json")
    template = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}"
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    ours = Tokenizer.load(tmp_path)
    assert ours.chat_template.source == template
    messages = [{"role": "user", "content": "hi   <tool_call> é"}, {"role": "assistant", "content": LINES[1]}]
    text = theirs.apply_chat_template(messages, tokenize=False)
    expected = list(theirs.apply_chat_template(messages, tokenize=True, return_dict=False))
    assert ours.encode_template(text) == expected == ours.encode_parts([(text, True)]).ids
