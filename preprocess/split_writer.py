"""One split of the output while it is written: shards, and the documents' lengths that packing needs at the end."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lumina_ds.data.packing import pack
from lumina_ds.data.shards.folder import ShardFolder
from lumina_ds.data.shards.manifest import FileEntry, Manifest, Settings, ShardEntry, Totals, write_manifest
from lumina_ds.data.shards.packing_file import packing_file, write_packing
from lumina_ds.data.shards.text_loss import TextLoss
from lumina_ds.data.shards.writer import HashingFile, ShardWriter, shard_schema
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from lumina_ds.errors import DataError
from lumina_ds.files import file_digest
from lumina_ds.text import counted
from preprocess.encode import EncodedRows
from preprocess.journal import SplitPosition

log = logging.getLogger("lumina_ds.preprocess")


class SplitWriter:
    """Writes one split into `folder`; document lengths wait in the file `lengths` rather than in memory."""

    def __init__(self, folder: Path, lengths: Path, tokenizer: Tokenizer, settings: Settings) -> None:
        self.folder = folder
        self._lengths_path = lengths
        self._tokenizer = tokenizer
        self._settings = settings
        shard_bytes = None if settings.disable_sharding else settings.shard_size_mb << 20
        self._shards = ShardWriter(folder, shard_schema(tokenizer.vocab_size), shard_bytes)
        self._num_known_shards = 0
        self._lengths: HashingFile | None = None
        self.num_conversations = 0
        self.num_tokens = 0
        self.num_trained_tokens = 0

    def resume(self, positions: Sequence[SplitPosition]) -> None:
        """Go on after the last of `positions`, one per sealed block. Raises ValueError when a file is not as it was."""
        at = positions[-1]
        shards: list[ShardEntry] = [shard for position in positions for shard in position.new_shards]
        self._shards.resume(shards, at.open_shard)
        self._num_known_shards = len(shards)
        self._lengths = None if at.lengths is None else HashingFile.reopen(self._lengths_path, at.lengths)
        self.num_conversations = at.num_conversations
        self.num_tokens = at.num_tokens
        self.num_trained_tokens = at.num_trained_tokens

    def add(self, rows: EncodedRows) -> None:
        if not rows.num_rows:
            return
        if self._lengths is None:
            self.folder.mkdir(exist_ok=True)
            self._lengths = HashingFile(self._lengths_path)
        self._shards.write_message(rows.message, rows.num_rows, rows.num_tokens)
        self._lengths.write(np.stack([rows.lengths, rows.first_trained], axis=1).astype("<i4").tobytes())
        self.num_conversations += rows.num_rows
        self.num_tokens += rows.num_tokens
        self.num_trained_tokens += rows.num_trained_tokens

    def position(self) -> SplitPosition:
        """Where the files stand; shards are reported as new once."""
        new_shards = self._shards.shards[self._num_known_shards :]
        self._num_known_shards = len(self._shards.shards)
        return SplitPosition(
            new_shards=new_shards,
            open_shard=self._shards.position(),
            lengths=None if self._lengths is None else self._lengths.position(),
            num_conversations=self.num_conversations,
            num_tokens=self.num_tokens,
            num_trained_tokens=self.num_trained_tokens,
        )

    def sync(self) -> None:
        self._shards.sync()
        if self._lengths is not None:
            self._lengths.sync()

    def finish(self, manifest: Manifest, *more_files: FileEntry) -> Manifest:
        """Seal the shards, plan the rows, copy the tokenizer, and write the manifest."""
        assert self._lengths is not None, "a split without conversations is not finished"
        self._shards.close()
        self._lengths.close()
        manifest = manifest.model_copy(update={"shards": self._shards.shards})
        unsealed = ShardFolder(self.folder, manifest, "streaming", digest="")  # its manifest is not written yet
        packing = self._write_packing(unsealed)
        manifest = manifest.model_copy(update={"files": [packing, *more_files, self._copy_tokenizer()]})
        write_manifest(manifest, self.folder)
        return manifest

    def totals(
        self,
        num_held_out: int = 0,
        rejected_by_rule: Mapping[str, int] | None = None,
        first_rejected: Mapping[str, str] | None = None,
        other_keys: Mapping[str, int] | None = None,
        notes: Mapping[str, int] | None = None,
        text_loss: TextLoss | None = None,
    ) -> Totals:
        by_rule = dict(sorted((rejected_by_rule or {}).items()))
        num_rejected = sum(by_rule.values())
        return Totals(
            lines=self.num_conversations + num_held_out + num_rejected,
            conversations=self.num_conversations,
            held_out=num_held_out,
            rejected=num_rejected,
            rejected_by_rule=by_rule,
            first_rejected=dict(first_rejected or {}),  # in the order of the input
            other_keys=dict(sorted((other_keys or {}).items())),
            notes=dict(sorted((notes or {}).items())),
            tokens=self.num_tokens,
            trained_tokens=self.num_trained_tokens,
            text_loss=text_loss,
        )

    def _write_packing(self, written: ShardFolder) -> FileEntry:
        settings = self._settings
        lengths, first_trained = self._read_lengths().T.astype(np.int64)
        plan = pack(
            lengths, first_trained, settings.seq_length, settings.packing, settings.overlong, written.has_labels
        )
        if not plan.num_rows:
            raise DataError(
                f"of {counted(self.num_conversations, 'conversation')} none has a trained token within --seq-length "
                f"{settings.seq_length}; raise it, or use --overlong split"
            )
        if plan.num_dropped:
            holds, is_longer = ("holds", "is") if plan.num_dropped == 1 else ("hold", "are")
            cause = (
                f"{holds} no trained token within" if settings.overlong == "truncate" else f"{is_longer} longer than"
            )
            stand = "stands" if plan.num_dropped == 1 else "stand"
            dropped = counted(plan.num_dropped, "conversation")
            log.warning("%s %s %d tokens and %s in no row", dropped, cause, settings.seq_length, stand)
        return write_packing(plan, self.folder / packing_file(settings.seq_length))

    def _read_lengths(self) -> np.ndarray:
        """[documents, 2]: length and first trained token."""
        return np.fromfile(self._lengths_path, "<i4").reshape(-1, 2)

    def write_text(self, name: str, content: str) -> FileEntry:
        """A file beside the shards."""
        path = self.folder / name
        path.write_text(content, encoding="utf-8")
        return FileEntry(file=name, size_bytes=path.stat().st_size, sha256=file_digest(path))

    def _copy_tokenizer(self) -> FileEntry:
        path = self.folder / self._tokenizer.file_name
        shutil.copyfile(self._tokenizer.path, path)
        return FileEntry(file=path.name, size_bytes=path.stat().st_size, sha256=file_digest(path))
