"""Tokenizers for the data tests, each trained once: ours, and foreign ones without our markers."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import sentencepiece

from lumina_ds.config.chat_templates import DEFAULT_TEMPLATE, template_digest
from lumina_ds.data.shards.manifest import (
    FileEntry,
    Manifest,
    Settings,
    TemplateEntry,
    TokenizerEntry,
    Totals,
    write_manifest,
)
from lumina_ds.data.shards.writer import ShardWriter, shard_schema
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from lumina_ds.files import file_digest
from preprocess.train_tokenizer import train_tokenizer

TEXTS = ["the quick brown fox jumps over the lazy dog", "hello there, how are you today?", "I am fine, thank you 123"]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A BPE model of ours."""
    folder = tmp_path_factory.mktemp("tokenizer")
    messages = [{"role": "assistant", "content": text} for text in TEXTS]
    (folder / "chats.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    return train_tokenizer([str(folder / "chats.jsonl")], 400, folder / "tok.model")


@pytest.fixture(scope="session")
def make_foreign(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tokenizer]:
    """Train a model as others do (Llama's way by default); keywords are SentencePiece's."""

    def make(**settings: object) -> Tokenizer:
        model = io.BytesIO()
        defaults = {"vocab_size": 400, "model_type": "bpe", "byte_fallback": True, "hard_vocab_limit": False}
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS * 3), model_writer=model, minloglevel=2, **(defaults | settings)
        )
        path: Path = tmp_path_factory.mktemp("foreign") / "foreign.model"
        path.write_bytes(model.getvalue())
        return Tokenizer.load(path)

    return make


@pytest.fixture
def make_folder(tmp_path: Path, tokenizer: Tokenizer) -> Callable[..., Path]:
    """Write a shard folder of documents given as (ids, mask); a shard file per document with `one_per_shard`."""

    def make(documents: list[tuple[list[int], list[int]]], seq_length: int, one_per_shard: bool = False) -> Path:
        folder = tmp_path / "folder"
        folder.mkdir()
        schema = shard_schema(tokenizer.vocab_size)
        writer = ShardWriter(folder, schema, shard_bytes=1 if one_per_shard else None)
        for line, (ids, mask) in enumerate(documents, 1):
            row = {"input_ids": ids, "loss_mask": mask, "num_tokens": len(ids), "source": "hand", "line": line}
            writer.write(pa.RecordBatch.from_pylist([row], schema=schema))
        writer.close()
        (folder / "tokenizer.model").write_bytes(tokenizer.path.read_bytes())
        tokens, trained = sum(len(ids) for ids, _ in documents), sum(sum(mask) for _, mask in documents)
        count = len(documents)
        manifest = Manifest(
            settings=Settings(seq_length=seq_length),
            tokenizer=TokenizerEntry(digest=tokenizer.digest, vocab_size=tokenizer.vocab_size),
            template=TemplateEntry(version=DEFAULT_TEMPLATE, digest=template_digest(DEFAULT_TEMPLATE)),
            inputs=[],
            totals=Totals(lines=count, conversations=count, tokens=tokens, trained_tokens=trained),
            shards=writer.shards,
            files=[
                FileEntry(
                    file="tokenizer.model", size_bytes=tokenizer.path.stat().st_size, sha256=file_digest(tokenizer.path)
                )
            ],
        )
        write_manifest(manifest, folder)
        return folder

    return make
