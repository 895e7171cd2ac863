"""The offline stage from end to end: inputs -> blocks -> encoded rows -> shards, packing plan, manifest.

The output depends on the inputs, the tokenizer, the template and the settings, and on nothing else: the
same bytes for any number of workers, in any folder, at any time. Everything is written into a folder beside
OUT and renamed last, so OUT is finished or absent.

With an eval fraction, OUT/eval is a shard folder of its own that holds the conversations held out; a hash of
the content chooses them, so a conversation that stands twice never lands on both sides.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from lumina_ds.data.chat_template import TEMPLATE_DIGEST, TEMPLATE_VERSION
from lumina_ds.data.manifest import (
    MANIFEST_FILE,
    FileEntry,
    InputEntry,
    Manifest,
    Settings,
    TemplateEntry,
    TokenizerEntry,
    Totals,
    describe_difference,
    read_manifest,
    write_manifest,
)
from lumina_ds.data.packing import pack
from lumina_ds.data.packing_file import packing_file, write_packing
from lumina_ds.data.shard_writer import ShardWriter, publish, shard_schema, staging_folder
from lumina_ds.data.shards import EVAL_FOLDER, REJECTED_FILE, TOKENIZER_FILE, ShardFolder
from lumina_ds.data.tokenizer import Tokenizer
from lumina_ds.errors import DataError
from lumina_ds.files import file_digest
from preprocess.encode import EncodedBlock, EncodedRows
from preprocess.progress import show_progress
from preprocess.quarantine import Quarantine, nothing_accepted, too_many_rejected
from preprocess.sources import BLOCK_BYTES, Block, InputFile, resolve_inputs
from preprocess.workers import EncodeOptions, encode_blocks

log = logging.getLogger("lumina_ds.preprocess")


def preprocess_files(
    inputs: Sequence[str],
    tokenizer_path: str | Path,
    out: str | Path,
    settings: Settings,
    *,
    num_workers: int = 1,
    max_rejected: int | None = None,
    overwrite: bool = False,
    block_bytes: int = BLOCK_BYTES,
) -> Manifest:
    """Turn JSONL files, globs or `-` into the shard folder `out` and return its manifest.

    A finished folder of the same inputs and settings is kept as it is; one made otherwise needs `overwrite`.
    Raises DataError: input missing or damaged, nothing to train in it, more than `max_rejected` lines
    refused, or a folder in the way.
    """
    files = resolve_inputs(inputs)
    tokenizer = Tokenizer.load(tokenizer_path)
    run = _Run(files, tokenizer, settings, Path(out))
    finished = run.find_finished(overwrite)
    if finished is not None:
        log.info("%s is up to date: same inputs, tokenizer and settings", out)
        return finished
    with staging_folder(run.out) as staging:
        manifest = run.compile(staging, num_workers, max_rejected, block_bytes)
        publish(staging, run.out)
    return manifest


class _Run:
    """One compilation: what goes in, and where it goes."""

    def __init__(self, files: list[InputFile], tokenizer: Tokenizer, settings: Settings, out: Path) -> None:
        self.files = files
        self.tokenizer = tokenizer
        self.settings = settings
        self.out = out
        self.input_names = ", ".join(str(file.path or "standard input") for file in files)

    def find_finished(self, overwrite: bool) -> Manifest | None:
        """The manifest of an `out` that already is what this run would write. Raises DataError on anything else there."""
        if not self.out.exists() or (self.out.is_dir() and not any(self.out.iterdir())):
            return None
        if not (self.out / MANIFEST_FILE).is_file():
            raise DataError(f"{self.out} exists and is no shard folder; choose another --out")
        if overwrite:
            return None
        if any(file.path is None for file in self.files):
            raise DataError(f"{self.out} exists; use --overwrite or choose another --out")
        manifest = read_manifest(self.out)
        difference = describe_difference(manifest, self.manifest([file.entry() for file in self.files]))
        if difference:
            raise DataError(f"{self.out} holds other shards ({difference}); use --overwrite or choose another --out")
        ShardFolder.open(self.out)
        return manifest

    def compile(self, staging: Path, num_workers: int, max_rejected: int | None, block_bytes: int) -> Manifest:
        """Write everything into `staging`, manifests last."""
        quarantine = Quarantine(staging / REJECTED_FILE)
        train = _Side(staging, self.tokenizer, self.settings)
        held_out = _Side(staging / EVAL_FOLDER, self.tokenizer, self.settings)
        for block in self._encoded_blocks(num_workers, block_bytes):
            quarantine.add(block.rejections)
            if max_rejected is not None and quarantine.num_rejected > max_rejected:
                raise too_many_rejected(quarantine, max_rejected, self.out)
            train.add(block.train)
            held_out.add(block.held_out)
        self._check_sides(train, held_out, quarantine)
        rejected = quarantine.close()
        inputs = [file.entry() for file in self.files]
        if held_out.num_conversations:
            held_out.finish(self.manifest(inputs, "eval", held_out.totals()))
        return train.finish(self.manifest(inputs, "train", train.totals(held_out, quarantine)), rejected)

    def manifest(self, inputs: list[InputEntry], split: str = "train", totals: Totals | None = None) -> Manifest:
        """The manifest of this run, still without its files."""
        return Manifest(
            split=split,
            settings=self.settings,
            tokenizer=TokenizerEntry(digest=self.tokenizer.digest, vocab_size=self.tokenizer.vocab_size),
            template=TemplateEntry(version=TEMPLATE_VERSION, digest=TEMPLATE_DIGEST),
            inputs=inputs,
            totals=totals or Totals(lines=0, conversations=0, tokens=0, trained_tokens=0),
            shards=[],
            files=[],
        )

    def _encoded_blocks(self, num_workers: int, block_bytes: int) -> Iterator[EncodedBlock]:
        """Encoded blocks in order, cut off after max_conversations, with progress on the way."""
        limit = self.settings.max_conversations
        options = EncodeOptions(self.tokenizer.path, self.settings.eval_fraction, limit)
        sizes = [file.size_bytes for file in self.files]
        total_bytes = None if None in sizes else sum(size or 0 for size in sizes)
        num_tokens = num_conversations = 0
        with show_progress(total_bytes) as progress:
            for block in encode_blocks(self._blocks(block_bytes), options, num_workers):
                if limit is not None:
                    block = block.first(limit - num_conversations)
                num_conversations += block.num_conversations
                num_tokens += block.num_tokens
                progress.update(sum(file.bytes_read for file in self.files), num_tokens)
                yield block
                if num_conversations == limit:
                    return

    def _blocks(self, block_bytes: int) -> Iterator[Block]:
        for file in self.files:
            yield from file.blocks(block_bytes)

    def _check_sides(self, train: _Side, held_out: _Side, quarantine: Quarantine) -> None:
        if not train.num_conversations + held_out.num_conversations:
            raise nothing_accepted(quarantine, self.input_names, self.out)
        for side, name in ((train, "training"), (held_out, "evaluation")):
            if not side.num_conversations and (side is train or self.settings.eval_fraction):
                raise DataError(
                    f"--eval-fraction {self.settings.eval_fraction} of "
                    f"{train.num_conversations + held_out.num_conversations} conversations leaves none for {name}; "
                    "change the fraction or give more data"
                )


class _Side:
    """The shards of one split while they are written, and what its packing needs."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, settings: Settings) -> None:
        self.folder = folder
        self._tokenizer = tokenizer
        self._settings = settings
        shard_bytes = None if settings.disable_sharding else settings.shard_size_mb << 20
        self._writer = ShardWriter(folder, shard_schema(tokenizer.vocab_size), shard_bytes)
        self._lengths: list[np.ndarray] = []
        self._first_trained: list[np.ndarray] = []
        self.num_conversations = 0
        self.num_tokens = 0
        self.num_trained_tokens = 0

    def add(self, rows: EncodedRows) -> None:
        if not rows.batch.num_rows:
            return
        self.folder.mkdir(exist_ok=True)
        self._writer.write(rows.batch)
        self._lengths.append(rows.batch.column("num_tokens").to_numpy())
        self._first_trained.append(rows.first_trained)
        self.num_conversations += rows.batch.num_rows
        self.num_tokens += rows.num_tokens
        self.num_trained_tokens += rows.num_trained_tokens

    def totals(self, held_out: _Side | None = None, quarantine: Quarantine | None = None) -> Totals:
        num_held_out = held_out.num_conversations if held_out else 0
        num_rejected = quarantine.num_rejected if quarantine else 0
        return Totals(
            lines=self.num_conversations + num_held_out + num_rejected,
            conversations=self.num_conversations,
            held_out=num_held_out,
            rejected=num_rejected,
            rejected_by_rule=dict(sorted(quarantine.by_rule.items())) if quarantine else {},
            tokens=self.num_tokens,
            trained_tokens=self.num_trained_tokens,
        )

    def finish(self, manifest: Manifest, *more_files: FileEntry) -> Manifest:
        """Seal the shards, plan the rows, copy the tokenizer, and write the manifest."""
        self._writer.close()
        settings = self._settings
        lengths = np.concatenate(self._lengths).astype(np.int64)
        first_trained = np.concatenate(self._first_trained)
        plan = pack(lengths, first_trained, settings.seq_length, settings.packing, settings.overlong)
        if not plan.num_rows:
            raise DataError(
                f"none of the {self.num_conversations} conversations has a trained token within --seq-length "
                f"{settings.seq_length}; raise it, or use --overlong split"
            )
        if plan.num_dropped:
            cause = "hold no trained token within" if settings.overlong == "truncate" else "are longer than"
            log.warning(
                "%d conversations %s %d tokens and stand in no row", plan.num_dropped, cause, settings.seq_length
            )
        packing = write_packing(plan, self.folder / packing_file(settings.seq_length))
        files = [packing, *more_files, self._copy_tokenizer()]
        manifest = manifest.model_copy(update={"shards": self._writer.shards, "files": files})
        write_manifest(manifest, self.folder)
        return manifest

    def _copy_tokenizer(self) -> FileEntry:
        path = self.folder / TOKENIZER_FILE
        shutil.copyfile(self._tokenizer.path, path)
        return FileEntry(file=path.name, size_bytes=path.stat().st_size, sha256=file_digest(path))
