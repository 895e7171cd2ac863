"""Damaged tokenizer files by seed, and what must hold of each: one typed error, or the ids of the library.

PYTHONPATH=.:tests/data python tests/data/tokenizer_mutations.py 30000      by hand: that many, in child processes
"""

from __future__ import annotations

import io
import json
import os
import random
import resource
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece

from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from lumina_ds.data.tokenizer.trial import probes
from lumina_ds.errors import DataError

LINES = ["the quick brown fox, isn't it?", "def f(x):\n    return x", "l'été à Noël 123", "日本語 Привет"] * 3
TEXTS = [*LINES[:4], "", " ", "a   b<tool_call>c", "    x\t\n", "\U0001f600\0", "<tool_call> <think>", "zzzzqqqq" * 9]
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**32 - 1, 2**32, 2**64, 0.5, 1e308, float("nan"), "", "a", "\u2581", " ", "<s>",
    "x" * 1000, "\ud800", [], {}, [None], ["ab"], ["a", "b"], [["a", "b"]], {"a": 1}, {"Regex": "(a+)+$"},
    {"Regex": "("}, {"String": ""}, {"Regex": ""}, "BPE", "Unigram", "WordPiece", "ByteLevel", "Precompiled", "Sequence",
]  # fmt: skip
PARTS: list[Any] = [
    {"type": "Split", "pattern": {"Regex": "(a|aa)+$"}, "behavior": "Isolated", "invert": False},
    {"type": "Split", "pattern": {"Regex": "\\s+"}, "behavior": "Removed", "invert": True},
    {"type": "Split", "pattern": {"Regex": "(z+)+q*$"}, "behavior": "MergedWithNext", "invert": False},
    {"type": "Replace", "pattern": {"Regex": "(x+x+)+y"}, "content": ""},
    {"type": "Replace", "pattern": {"String": "a"}, "content": "<s>"},
    {"type": "Precompiled", "precompiled_charsmap": "AAAAAAAA////"},
    {"type": "NFC"}, {"type": "Lowercase"}, {"type": "Strip", "strip_left": True, "strip_right": True},
    {"type": "Prepend", "prepend": "<s>"}, {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
    {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": True},
    {"type": "Digits", "individual_digits": True}, {"type": "Whitespace"}, {"type": "Fuse"}, {"type": "ByteFallback"},
]  # fmt: skip


def byte_level() -> dict[str, Any]:
    """A small file as Qwen's and Llama's are: byte-level, special tokens and others."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    one = Tokenizer(models.BPE())
    one.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    one.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    one.train_from_iterator(LINES, trainer)
    one.add_special_tokens([AddedToken("<|im_start|>", rstrip=True)])
    one.add_tokens(["<tool_call>", "   ", AddedToken("<think>", lstrip=True, single_word=True, normalized=True)])
    one.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", one.token_to_id("<s>"))]
    )
    return json.loads(one.to_str())


def byte_fallback() -> dict[str, Any]:
    """A small file as Llama 2's and Mistral's are."""
    vocabulary = {name: i for i, name in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))])}
    merges = []
    for piece in [*"theqickbrown\u2581", "th", "the", "\u2581the", "qu", "ck", "ow"]:
        vocabulary.setdefault(piece, len(vocabulary))
    for left, right in [("t", "h"), ("th", "e"), ("\u2581", "the"), ("c", "k"), ("o", "w")]:
        merges.append([left, right])
    names = [("<unk>", True), ("<s>", True), ("</s>", True), ("<tool_call>", False)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": vocabulary.get(n, len(vocabulary)), "content": n, "special": s, **flags} for n, s in names]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    restore = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, replace]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [restore, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE", "unk_token": "<unk>", "byte_fallback": True, "fuse_unk": True, "dropout": None,
            "vocab": vocabulary, "merges": merges,
        },
    }  # fmt: skip


def sentencepiece_models() -> list[bytes]:
    """Small models of both kinds, with byte fallback and without."""
    made = []
    for kind, settings in [("bpe", {"byte_fallback": True, "vocab_size": 320}), ("unigram", {"vocab_size": 70})]:
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(LINES * 4), model_writer=model, model_type=kind, hard_vocab_limit=False,
            minloglevel=2, user_defined_symbols=["<tool_call>"], **settings,
        )  # fmt: skip
        made.append(model.getvalue())
    return made


def mutated_json(documents: list[dict[str, Any]], generator: random.Random) -> bytes:
    """One of the documents with one to three changes, in its structure or in its bytes."""
    document = json.loads(json.dumps(generator.choice(documents)))
    if generator.random() < 0.15:
        return _mutated_bytes(json.dumps(document).encode(), generator)
    for _ in range(generator.randint(1, 3)):
        _change(document, generator)
    text = json.dumps(document)
    return text.encode()


def mutated_model(models: list[bytes], generator: random.Random) -> bytes:
    return _mutated_bytes(generator.choice(models), generator)


def _mutated_bytes(content: bytes, generator: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(generator.choice([1, 1, 2, 5])):
        place = generator.randrange(len(changed))
        match generator.randrange(4):
            case 0:
                changed[place] = generator.randrange(256)
            case 1:
                del changed[place : place + generator.randint(1, 9)]
            case 2:
                changed[place:place] = bytes(generator.randrange(256) for _ in range(generator.randint(1, 9)))
            case 3:
                changed[place:place] = changed[place : place + generator.randint(1, 99)]
        changed = changed or bytearray(b"\0")
    return bytes(changed[: generator.randrange(len(changed))]) if generator.random() < 0.1 else bytes(changed)


def _change(document: dict[str, Any], generator: random.Random) -> None:
    if generator.random() < 0.35:
        key = generator.choice(["normalizer", "pre_tokenizer", "decoder", "post_processor"])
        part = json.loads(json.dumps(generator.choice(PARTS)))
        if generator.random() < 0.5 and isinstance(document.get(key), dict):
            inner = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}.get(
                key, "processors"
            )
            parts = [part, document[key]]
            generator.shuffle(parts)
            part = {"type": "Sequence", inner: parts}
        document[key] = part
        return
    places = list(_places(document, generator))
    container, key = generator.choice(places)
    match generator.randrange(4):
        case 0 if isinstance(container, dict):
            container[
                generator.choice(
                    ["dropout", "unk_token", "ignore_merges", "byte_fallback", "id", "special", "type", "x"]
                )
            ] = generator.choice(VALUES)
        case 1:
            del container[key]
        case 2 if isinstance(container, list):
            container.insert(generator.randint(0, len(container)), json.loads(json.dumps(container[key])))
        case _:
            container[key] = generator.choice(VALUES)


def _places(part: Any, generator: random.Random) -> Any:
    """Every place of the document; of a long table or list only a few."""
    if isinstance(part, dict | list):
        keys = list(part if isinstance(part, dict) else range(len(part)))
        for key in keys if len(keys) < 20 else generator.sample(keys, 3):
            yield part, key
            yield from _places(part[key], generator)


def check_json(path: Path) -> str:
    """Load the file and compare; returns how it ended. Raises AssertionError where it is read otherwise than it says."""
    import tokenizers

    try:
        tokenizer = Tokenizer.load(path, is_tried=True)
        document = json.loads(path.read_bytes())
        tokenizer.encode_batch(list(probes(document)))
    except DataError as error:
        assert "\n" not in str(error)
        return "refused"
    library = tokenizers.Tokenizer.from_str(path.read_text())
    library.no_truncation()
    library.no_padding()
    if library.model.dropout:
        library.model.dropout = None
    framed = tokenizers.Tokenizer.from_str(library.to_str())
    library.post_processor = None  # one may say a text twice, even without special tokens
    ids = library.get_vocab(with_added_tokens=True)
    assert tokenizer.num_own_ids == max(ids.values()) + 1
    markers = [*tokenizer.role_ids.values(), tokenizer.end_id]
    assert len({*markers, *ids.values()} - set(ids.values())) == tokenizer.vocab_size - tokenizer.num_own_ids
    names = list(tokenizer.special_tokens)
    texts = [text for text in TEXTS if not any(name in text for name in names)]
    for text in texts:
        try:
            expected = library.encode(text, add_special_tokens=False).ids
            found = tokenizer.encode_plain(text)
            tokenizer.decode(found)
        except DataError as error:
            assert "\n" not in str(error)
            return "refused at a text"
        except BaseException as error:
            if type(error).__name__ != "PanicException" and not isinstance(error, Exception):
                raise
            assert not isinstance(error, AssertionError)
            continue
        is_special = set(expected) & set(tokenizer.special_tokens.values())
        assert is_special or found == expected, (text, found, expected)
        assert not set(found) & set(tokenizer.special_tokens.values())
        assert is_special or tokenizer.encode_template(text) == framed.encode(text, add_special_tokens=False).ids
        parts = tokenizer.encode_parts([(text, True)])
        assert is_special or parts.ids == expected
    for name in names:
        assert not {*tokenizer.special_tokens.values()} & set(tokenizer.encode_plain(f"a{name} b"))
    return "accepted"


def check_model(path: Path) -> str:
    """As check_json, of a SentencePiece model."""
    try:
        tokenizer = Tokenizer.load(path)
        found = tokenizer.encode_batch(TEXTS)
        back = [tokenizer.decode(ids) for ids in found]
    except DataError as error:
        assert "\n" not in str(error)
        return "refused"
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert found == processor.encode(TEXTS)
    assert not tokenizer.loses_nothing or back == TEXTS
    controls = [i for i in range(processor.get_piece_size()) if processor.is_control(i)]
    assert not {*controls} & {i for ids in found for i in ids}
    return "accepted"


def run(
    count: int, seed: int, folder: Path, make: Callable[[random.Random], bytes], check: Callable[[Path], str]
) -> Counter[str]:
    """Check `count` files of the seed in this process; the file at fault stays in `folder`."""
    ends: Counter[str] = Counter()
    for number in range(count):
        path = folder / f"mutant-{seed}"
        path.write_bytes(make(random.Random(f"{seed} {number}")))
        ends[check(path)] += 1
    return ends


def main(total: int, kind: str, batch: int = 250) -> None:
    """Batches in child processes, so that a crash or a hang is found and the others go on."""
    documents, models = [byte_level(), byte_fallback()], sentencepiece_models()
    makes = {"json": lambda g: mutated_json(documents, g), "model": lambda g: mutated_model(models, g)}
    checks = {"json": check_json, "model": check_model}
    ends: Counter[str] = Counter()
    folder = Path(tempfile.mkdtemp())
    for seed in range(total // batch):
        out = folder / f"ends-{seed}"
        child = os.fork()
        if not child:
            resource.setrlimit(resource.RLIMIT_CPU, (300, 300))
            resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
            os.dup2(os.open(folder / f"errors-{seed}", os.O_CREAT | os.O_WRONLY), 2)
            try:
                found = run(batch, seed, folder, makes[kind], checks[kind])
                out.write_text(json.dumps(found))
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            print(f"FAILED seed {seed} status {status}: {folder}", flush=True)
        else:
            ends.update(json.loads(out.read_text()))
            (folder / f"errors-{seed}").unlink()
    print(kind, dict(ends), folder)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
