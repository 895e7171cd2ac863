"""What others do for the same job: `datasets` map with three tokenizers, ids and assistant labels, no packing.

    python peers.py NAME CORPUS TOKENIZER FOLDER WORKERS

Prints {"tokens": N, "trained_tokens": N}, which the benchmark compares: a peer counts only with the same tokens.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lumina_ds.data.tokenizer.sentencepiece_file import BYTE, NORMAL, SPACE_SYMBOL, ModelFile, read_model_file
from lumina_ds.data.tokenizer.tokenizer import Tokenizer

IGNORED = -100
Encode = Callable[[list[str]], list[list[int]]]


def main(name: str, corpus: str, tokenizer: str, folder: str, workers: str) -> None:
    import datasets

    datasets.disable_progress_bars()
    rows = datasets.load_dataset("json", data_files=corpus, split="train", cache_dir=folder)
    encoded = rows.map(Labelled(name, tokenizer), batched=True, remove_columns=rows.column_names, num_proc=int(workers))
    tokens = trained = 0
    for chunk in encoded.data.column("labels").chunks:
        labels = chunk.flatten().to_numpy()
        tokens += len(labels)
        trained += int((labels != IGNORED).sum())
    print(json.dumps({"tokens": tokens, "trained_tokens": trained}))


class Labelled:
    """Conversations to ids and labels; picklable, the tokenizer is made in the worker that uses it."""

    def __init__(self, name: str, tokenizer: str) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.template: Tokenizer | None = None
        self.encode: Encode | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "tokenizer": self.tokenizer, "template": None, "encode": None}

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        if self.template is None or self.encode is None:
            self.template = Tokenizer.load(self.tokenizer)
            self.encode = ENGINES[self.name](Path(self.tokenizer).read_bytes())
        contents = iter(self.encode([turn["content"] for messages in batch["messages"] for turn in messages]))
        rows = [self._row(messages, contents, self.template) for messages in batch["messages"]]
        return {"input_ids": [ids for ids, _ in rows], "labels": [labels for _, labels in rows]}

    def _row(self, messages: list[dict[str, str]], contents: Any, template: Tokenizer) -> tuple[list[int], list[int]]:
        ids = [] if template.bos_id is None else [template.bos_id]
        labels = [IGNORED] * len(ids)
        for turn in messages:
            content = [*next(contents), template.end_id]
            ids += [template.role_ids[turn["role"]], *content]
            labels += [IGNORED, *(content if turn["role"] == "assistant" else [IGNORED] * len(content))]
        return ids, labels


def _sentencepiece(model: bytes) -> Encode:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    return lambda texts: processor.encode(texts, num_threads=1)


def _tokenizers(model: bytes) -> Encode:
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(as_tokenizer_json(read_model_file(model))))
    return lambda texts: [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def _gigatoken(model: bytes) -> Encode:
    import gigatoken

    tokenizer = gigatoken.Tokenizer.from_json(json.dumps(as_tokenizer_json(read_model_file(model))))
    return lambda texts: tokenizer.encode_batch_list(texts, parallel=False)


ENGINES = {"sentencepiece": _sentencepiece, "tokenizers": _tokenizers, "gigatoken": _gigatoken}


def as_tokenizer_json(model: ModelFile) -> dict[str, Any]:
    """The same BPE model as a tokenizer.json without added tokens, so that text never becomes a control token."""
    texts = [piece.text.decode() for piece in model.pieces]
    normal = {text: i for i, text in enumerate(texts) if model.pieces[i].kind in (NORMAL, BYTE)}
    merges = [
        (left, text[len(left) :])
        for text in sorted(normal, key=lambda text: -model.pieces[normal[text]].score)
        if model.pieces[normal[text]].kind == NORMAL
        for left in sorted((text[:n] for n in range(1, len(text))), key=lambda left: normal.get(left, 0))
        if left in normal and text[len(left) :] in normal
    ]
    steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE_SYMBOL}]
    if model.adds_dummy_prefix:
        steps.insert(0, {"type": "Prepend", "prepend": SPACE_SYMBOL})
    vocabulary = {text: i for i, text in enumerate(texts)}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None, "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": SPACE_SYMBOL}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
            "vocab": vocabulary, "merges": [list(merge) for merge in merges],
        },
    }  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
