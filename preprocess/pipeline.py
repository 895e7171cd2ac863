"""The offline stage from end to end: inputs -> blocks -> encoded rows -> shards, packing plan, manifest.

The output depends on the inputs, the tokenizer, the template and the settings, and on nothing else: the
same bytes for any number of workers, in any folder, at any time. Everything is written into OUT.partial and
renamed last, so OUT is finished or absent. A killed run leaves OUT.partial, and the same command goes on from the
last sealed block (journal.py).

With an eval fraction, OUT/eval is a shard folder of its own that holds the conversations held out; a hash of
the content chooses them, so a conversation that stands twice never lands on both sides.
"""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lumina_ds.config.chat_templates import AUTO_TEMPLATE, DEFAULT_TEMPLATE, ChatTemplate
from lumina_ds.data.formats import check_format
from lumina_ds.data.shards.folder import EVAL_FOLDER, REJECTED_FILE, ShardFolder
from lumina_ds.data.shards.manifest import (
    MANIFEST_FILE,
    READING,
    VERSION,
    FileEntry,
    InputEntry,
    Manifest,
    Settings,
    TemplateEntry,
    TokenizerEntry,
    Totals,
    describe_difference,
    read_manifest,
    reading_of,
)
from lumina_ds.data.shards.writer import partial_folder, publish, shard_schema, staging_folder
from lumina_ds.data.templates.find import STORED_TEMPLATE, certified_template, stored_text, tokenizer_for
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from lumina_ds.errors import DataError, MachineError
from lumina_ds.text import counted
from preprocess.encode import EncodedBlock, EncodeOptions
from preprocess.journal import Journal, SealedBlock, pass_over_sealed
from preprocess.other_keys import add_other_keys
from preprocess.progress import show_progress
from preprocess.quarantine import Quarantine, is_too_many, nothing_accepted, too_many_rejected
from preprocess.sources import BLOCK_BYTES, Block, InputFile, UnreadableInput, resolve_inputs
from preprocess.split_writer import SplitWriter
from preprocess.text_check import TextCheck, check_unknown
from preprocess.workers import Workers, encode_blocks, local_workers

log = logging.getLogger("lumina_ds.preprocess")

# Inside OUT.partial.
_RESULT = "result"
_JOURNAL = "journal"


def preprocess_files(
    inputs: Sequence[str],
    tokenizer_path: str | Path,
    out: str | Path,
    settings: Settings,
    *,
    num_workers: int = 1,
    workers: Workers | None = None,
    max_rejected: int | float | None = None,
    allow_unknown: bool = False,
    overwrite: bool = False,
    chat_template: str = DEFAULT_TEMPLATE,
    block_bytes: int = BLOCK_BYTES,
) -> Manifest:
    """Turn JSONL files, globs or `-` into the shard folder `out` and return its manifest.

    A finished folder of the same inputs and settings is kept as it is; one made otherwise needs `overwrite`.
    An unfinished one is gone on with. `workers`: processes to use instead of starting `num_workers`.
    Raises DataError: input missing or damaged, nothing to train in it, more than `max_rejected` lines
    refused, trained ids for unknown characters without `allow_unknown`, or a folder in the way. ConfigError: another run is writing `out`, or no such chat template. MachineError: the output cannot be
    written, or a worker was killed.
    """
    check_format(settings.format)
    limits = Limits(max_rejected, allow_unknown)
    files = resolve_inputs(inputs)
    tokenizer = Tokenizer.load(tokenizer_path)
    run = _Run(files, tokenizer, settings, chat_template, Path(out), block_bytes)
    finished = run.find_finished(overwrite, limits)
    if finished is not None and not partial_folder(run.out).exists():
        return finished
    try:
        with staging_folder(run.out, keep_for=UnreadableInput) as staging:
            # A run may have ended between the look above and the lock, or been killed while it cleared up.
            finished = run.find_finished(overwrite, limits)
            if finished is not None:
                return finished
            pool: AbstractContextManager[Workers] = (
                nullcontext(workers) if workers else local_workers(num_workers, run.tokenizer, run.template)
            )
            with pool as encoders:
                try:
                    manifest = run.compile(staging, encoders, limits)
                except UnreadableInput as error:
                    raise run.unfinished(staging, error) from error
            publish(staging / _RESULT, run.out)
    except OSError as error:
        is_begun = partial_folder(run.out).exists()
        remedy = "make room, and the same command goes on from here" if is_begun else "choose another --out"
        raise MachineError(f"cannot write {out}: {error.strerror or error}; {remedy}") from error
    return manifest


@dataclass(frozen=True)
class Limits:
    """What may be lost before a run ends with an error. It changes no byte of the output."""

    max_rejected: int | float | None = None
    allow_unknown: bool = False


def check_totals(totals: Totals, limits: Limits, folder: Path) -> None:
    """Raises DataError where the finished `folder` lost more than is allowed now."""
    max_rejected = limits.max_rejected
    if max_rejected is not None and is_too_many(totals.rejected, totals.lines, max_rejected):
        raise too_many_rejected(totals, max_rejected, folder / REJECTED_FILE)
    check_unknown(totals.text_loss, limits.allow_unknown, totals.lines, "of " + str(folder))


class _Outputs:
    """The three things that are written block by block, and the journal over them."""

    def __init__(self, staging: Path, tokenizer: Tokenizer, settings: Settings, sealed: list[SealedBlock]) -> None:
        """Begin, or go on after `sealed`; then ValueError says that some file is not as it was left."""
        result = staging / _RESULT
        if not sealed:
            _remove_all_but_journal(staging)
        elif not sealed[-1].held_out.num_conversations:
            shutil.rmtree(result / EVAL_FOLDER, ignore_errors=True)
        result.mkdir(exist_ok=True)
        self.train = SplitWriter(result, staging / "train.lengths", tokenizer, settings)
        self.held_out = SplitWriter(result / EVAL_FOLDER, staging / "eval.lengths", tokenizer, settings)
        if sealed:
            self.train.resume([block.train for block in sealed])
            self.held_out.resume([block.held_out for block in sealed])
        self.quarantine = Quarantine(result / REJECTED_FILE, sealed[-1].quarantine if sealed else None)
        self.other_keys = Counter(sealed[-1].other_keys if sealed else {})
        self.notes = Counter(sealed[-1].notes if sealed else {})
        self.text_check = TextCheck(sealed[-1].text_loss if sealed else None)

    @property
    def num_conversations(self) -> int:
        return self.train.num_conversations + self.held_out.num_conversations

    @property
    def num_tokens(self) -> int:
        return self.train.num_tokens + self.held_out.num_tokens

    def add(self, block: EncodedBlock) -> SealedBlock:
        """Write the block; the record says how far all files reach then."""
        self.quarantine.add(block.rejections)
        self.train.add(block.train)
        self.held_out.add(block.held_out)
        add_other_keys(self.other_keys, block.other_keys)
        self.notes.update(block.notes)
        self.text_check.add(block.text_check)
        return SealedBlock(
            place=block.place,
            train=self.train.position(),
            held_out=self.held_out.position(),
            quarantine=self.quarantine.position(),
            other_keys=dict(self.other_keys),
            notes=dict(self.notes),
            text_loss=self.text_check.loss(),
        )

    def sync(self) -> None:
        for output in (self.train, self.held_out, self.quarantine):
            output.sync()


def _remove_all_but_journal(staging: Path) -> None:
    for path in staging.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _JOURNAL:
            path.unlink()


class _Run:
    """One compilation: what goes in, and where it goes."""

    def __init__(
        self,
        files: list[InputFile],
        tokenizer: Tokenizer,
        settings: Settings,
        chat_template: str,
        out: Path,
        block_bytes: int,
    ) -> None:
        chosen = certified_template(chat_template, tokenizer)
        if chat_template == AUTO_TEMPLATE and chosen.name == DEFAULT_TEMPLATE:
            log.info("%s comes without a chat template, so %s is used", tokenizer.path, DEFAULT_TEMPLATE)
        self.template = chosen.template
        self.template_entry = TemplateEntry(
            version=chosen.name, digest=chosen.digest, certificate=chosen.certificate,
            day=None if isinstance(chosen.template, ChatTemplate) else chosen.template.day,
        )  # fmt: skip
        self.files = files
        self.tokenizer = tokenizer_for(tokenizer, chosen.template)
        self.settings = settings
        self.out = out
        self.block_bytes = block_bytes
        self.input_names = ", ".join(file.shown for file in files)

    def find_finished(self, overwrite: bool, limits: Limits) -> Manifest | None:
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
        ShardFolder.open(self.out, force_streaming=True)  # sizes only: no shard is read
        check_totals(manifest.totals, limits, self.out)
        log.info("%s is up to date: same inputs, tokenizer and settings", self.out)
        return manifest

    def compile(self, staging: Path, workers: Workers, limits: Limits) -> Manifest:
        """Write everything into `staging`, manifests last."""
        journal = Journal(staging / _JOURNAL, self._journal_header())
        outputs, blocks = self._resume(staging, journal)
        limit = self.settings.max_conversations
        schema = shard_schema(self.tokenizer.vocab_size)
        options = EncodeOptions(
            self.settings.eval_fraction, limit, self.settings.train_turns, self.settings.train_reasoning,
            self.settings.format, self.template,
        )  # fmt: skip
        sizes = [file.size_bytes for file in self.files]
        total_bytes = None if None in sizes else sum(size or 0 for size in sizes)
        self._check_losses(outputs, limits)
        with closing(journal), show_progress(total_bytes) as progress:
            encoded = (
                encode_blocks(blocks, self.tokenizer, options, workers)
                if outputs.num_conversations != limit
                else iter(())
            )
            for block in encoded:
                if limit is not None:
                    block = block.first(limit - outputs.num_conversations, schema)
                journal.add(outputs.add(block), outputs.sync)
                self._check_losses(outputs, limits)
                progress.update(sum(file.bytes_read for file in self.files), outputs.num_tokens)
                if outputs.num_conversations == limit:
                    break
            journal.seal(outputs.sync)
        self._check_losses(outputs, limits, at_end=True)
        return self._finish(outputs)

    def unfinished(self, staging: Path, error: UnreadableInput) -> DataError:
        """The error to end with where an input breaks off: an UnreadableInput if there is something to go on from."""
        if not Journal(staging / _JOURNAL, self._journal_header()).read():
            return DataError(str(error))
        return UnreadableInput(f"{error}; mend it, and the same command goes on after the blocks in {staging}")

    def _resume(self, staging: Path, journal: Journal) -> tuple[_Outputs, Iterator[Block]]:
        """The outputs as an unfinished run left them, and the blocks that are still to be encoded."""
        sealed = journal.read()
        num_sealed, blocks = pass_over_sealed(self._blocks(), sealed)
        if num_sealed < len(sealed):
            log.warning("the input is not that of the unfinished run from its block %d on", num_sealed + 1)
        sealed = sealed[:num_sealed]
        try:
            outputs = _Outputs(staging, self.tokenizer, self.settings, sealed)
        except ValueError as error:
            log.warning("%s: %s; starting from the beginning", staging, error)
            if any(file.path is None for file in self.files):
                raise DataError(f"{staging} is damaged ({error}); delete it and run again") from None
            sealed, blocks = [], self._blocks()
            outputs = _Outputs(staging, self.tokenizer, self.settings, sealed)
        if sealed:
            done = counted(num_sealed, "block"), counted(outputs.num_conversations, "conversation")
            log.info("%s: going on after %s, %s", self.out, *done)
        journal.start(sealed)
        return outputs, blocks

    def _journal_header(self) -> dict[str, Any]:
        """What sealed blocks depend on beside the inputs, which every record names by digest."""
        return {
            "format": [VERSION, READING, version("lumina-ds"), version("pyarrow"), version("sentencepiece")],
            "tokenizer": self.tokenizer.digest,
            "chat template": " ".join(filter(None, (self.template_entry.digest, *self._proof()))),
            "block size": self.block_bytes,
            **self.settings.model_dump(),
        }

    def _finish(self, outputs: _Outputs) -> Manifest:
        train, held_out, quarantine = outputs.train, outputs.held_out, outputs.quarantine
        self._check_splits(outputs)
        rejected = quarantine.close()
        inputs = [file.entry() for file in self.files]
        if held_out.num_conversations:
            held_out.finish(self.manifest(inputs, "eval", held_out.totals()), *self._template_file(held_out))
        totals = self._totals(outputs)
        return train.finish(self.manifest(inputs, "train", totals), rejected, *self._template_file(train))

    def _template_file(self, split: SplitWriter) -> list[FileEntry]:
        """A model's own template, which the shards' readers need."""
        if isinstance(self.template, ChatTemplate):
            return []
        return [split.write_text(STORED_TEMPLATE, stored_text(self.template))]

    def _proof(self) -> tuple[str | None, str | None]:
        return self.template_entry.certificate, self.template_entry.day

    def manifest(self, inputs: list[InputEntry], split: str = "train", totals: Totals | None = None) -> Manifest:
        """The manifest of this run, still without its files."""
        return Manifest(
            split=split,
            reading=reading_of(totals) if totals else READING,
            settings=self.settings,
            tokenizer=TokenizerEntry(digest=self.tokenizer.digest, vocab_size=self.tokenizer.vocab_size),
            template=self.template_entry,
            inputs=inputs,
            totals=totals or Totals(lines=0, conversations=0, tokens=0, trained_tokens=0),
            shards=[],
            files=[],
        )

    def _blocks(self) -> Iterator[Block]:
        for file in self.files:
            yield from file.blocks(self.block_bytes)

    def _totals(self, outputs: _Outputs) -> Totals:
        quarantine = outputs.quarantine
        return outputs.train.totals(
            outputs.held_out.num_conversations, quarantine.by_rule, quarantine.first_by_rule, outputs.other_keys,
            outputs.notes, outputs.text_check.loss(),
        )  # fmt: skip

    def _check_losses(self, outputs: _Outputs, limits: Limits, at_end: bool = False) -> None:
        """A number is checked on the way; of a share nobody knows before the end what it is a share of."""
        loss = outputs.text_check.loss()
        if loss.trained_unknown_ids and not limits.allow_unknown:
            check_unknown(loss, False, self._totals(outputs).lines, str(self.tokenizer.path))
        max_rejected = limits.max_rejected
        if max_rejected is None or not (at_end or isinstance(max_rejected, int)):
            return
        totals = self._totals(outputs)
        # Lines of which none can be used have an error of their own.
        if (not at_end or totals.rejected < totals.lines) and is_too_many(totals.rejected, totals.lines, max_rejected):
            raise too_many_rejected(totals, max_rejected, outputs.quarantine.keep_beside(self.out), at_end)

    def _check_splits(self, outputs: _Outputs) -> None:
        if not outputs.num_conversations:
            raise nothing_accepted(outputs.quarantine, self.input_names, self.out)
        for split, name in ((outputs.train, "training"), (outputs.held_out, "evaluation")):
            if not split.num_conversations and (split is outputs.train or self.settings.eval_fraction):
                raise DataError(
                    f"--eval-fraction {self.settings.eval_fraction} of {counted(outputs.num_conversations, 'conversation')} "
                    f"leaves none for {name}; change the fraction or give more data"
                )
