"""The one-step way: from a run's configuration to a tokenizer and shards that training can open.

`lumina train --train-data chats.jsonl --tokenizer auto` calls this once, before any rank starts. What it makes
lies in a cache under names that are digests of everything it depends on, so a second run finds it, and a
changed input, tokenizer, template or setting cannot be mistaken for an old one. A file lock lets two runs
prepare the same data at once: the second waits and reuses.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lumina_ds.config.chat_templates import ALIASES, AUTO_TEMPLATE, TEMPLATES
from lumina_ds.config.schema import DataConfig, RunConfig
from lumina_ds.data.shards.folder import EVAL_FOLDER, ShardFolder
from lumina_ds.data.shards.manifest import READING, VERSION, InputEntry, Manifest, Settings, read_manifest
from lumina_ds.data.shards.text_loss import describe_loss
from lumina_ds.data.templates.find import certified_template, find_template, is_same, tokenizer_for
from lumina_ds.data.tokenizer.tokenizer import Tokenizer, check_vocabulary, tokenizer_in
from lumina_ds.errors import ConfigError, DataError
from lumina_ds.files import shown_path
from preprocess.pipeline import Limits, check_totals, preprocess_files
from preprocess.sources import STDIN, resolve_inputs, warn_of_shared_files
from preprocess.summary import summary_lines, summary_record
from preprocess.text_check import check_unknown
from preprocess.train_tokenizer import RECIPE, train_tokenizer

log = logging.getLogger("lumina_ds.preprocess")

AUTO = "auto"


@dataclass(frozen=True)
class PreparedData:
    """Shard folders and the tokenizer they were made with. `reused`: nothing had to be tokenized."""

    shards: Path
    eval_shards: Path | None
    tokenizer: Path
    reused: bool


def prepare_training_data(config: RunConfig, cache: Path) -> PreparedData:
    """Open the configured shards, or make them from `data.train_data` in `cache` unless they are there.

    Raises ConfigError when no data is named, or the vocabulary is too small for the tokenizer; DataError when
    shards and tokenizer do not belong together, or the data cannot be used.
    """
    data = config.data
    check_sources(config)
    if data.shards:
        return _open_shards(config, cache)
    tokenizer = _tokenizer(config, cache)
    _check_tokenizer(config, tokenizer)
    _check_evaluation_shards(config, tokenizer)  # before minutes of work
    eval_fraction = 0.0 if data.eval_data or data.eval_shards else data.eval_fraction
    settings = _settings(config, data.max_conversations, eval_fraction)
    shards, reused = _cached_shards(data.train_data, tokenizer, settings, cache, data)
    eval_shards, eval_reused = _evaluation_shards(config, shards, tokenizer, cache)
    return PreparedData(shards, eval_shards, tokenizer_in(shards), reused and eval_reused)


def check_training_data(config: RunConfig) -> None:
    """Everything that prepare_training_data refuses before it reads a conversation."""
    check_sources(config)
    data = config.data
    if data.shards:
        _check_evaluation_shards(config, _checked_shards(config)[1])
    elif data.tokenizer != AUTO:
        tokenizer = Tokenizer.load(data.tokenizer)
        _check_tokenizer(config, tokenizer)
        _template_key(data.chat_template, tokenizer)
        _check_evaluation_shards(config, tokenizer)


def preprocessing_record(data: PreparedData) -> dict[str, Any]:
    """What preprocessing did to the training and the evaluation data, for the run folder."""
    folders = {"train": data.shards, "eval": data.eval_shards}
    return {name: summary_record(folder) for name, folder in folders.items() if folder is not None}


def tokenizer_of_run(config: RunConfig, cache: Path) -> Path:
    """The configured model, or the one trained on data.train_data, which lies in `cache`."""
    return _tokenizer(config, cache).path


def check_sources(config: RunConfig) -> None:
    """Refuse data that is not named, named twice, or not there; nothing is read beyond a folder's manifest."""
    data = config.data
    if data.shards and data.train_data:
        raise ConfigError("both --data and --train-data are given; keep the one to train on")
    if not data.shards and not data.train_data:
        raise ConfigError(
            "no training data; give JSONL files with --train-data, a shard folder with --data, or data.sources"
        )
    if STDIN in (*data.train_data, *data.eval_data):
        raise ConfigError("training cannot read standard input; use `lumina preprocess -` and give --data its folder")
    for folder in filter(None, (data.shards, data.eval_shards)):
        _look_into(folder)
    for files in filter(None, (data.train_data, data.eval_data)):
        resolve_inputs(files)
    warn_of_shared_files(data.train_data, data.eval_data)


def _check_tokenizer(config: RunConfig, tokenizer: Tokenizer) -> None:
    chosen = find_template(config.data.chat_template, tokenizer)
    check_vocabulary(tokenizer_for(tokenizer, chosen.template), config.model.vocab_size)


def _open_shards(config: RunConfig, cache: Path) -> PreparedData:
    folder, tokenizer = _checked_shards(config)
    eval_shards, reused = _evaluation_shards(config, folder.path, tokenizer, cache)
    return PreparedData(folder.path, eval_shards, folder.tokenizer_path, reused)


def _checked_shards(config: RunConfig) -> tuple[ShardFolder, Tokenizer]:
    data = config.data
    assert data.shards is not None
    folder = _look_into(data.shards)
    tokenizer = folder.tokenizer()
    if data.tokenizer != AUTO:
        _check_same_tokenizer(folder, Tokenizer.load(data.tokenizer))
    _check_folder(folder, data)
    check_vocabulary(tokenizer, config.model.vocab_size)
    return folder, tokenizer


def _evaluation_shards(config: RunConfig, shards: Path, tokenizer: Tokenizer, cache: Path) -> tuple[Path | None, bool]:
    """The folder to evaluate on, if any, and whether it was there already: eval_shards, eval_data, or the split."""
    data = config.data
    if data.eval_shards:
        return _check_evaluation_shards(config, tokenizer), True
    if data.eval_data:
        return _cached_shards(data.eval_data, tokenizer, _settings(config), cache, data)
    held_out = shards / EVAL_FOLDER
    return (_look_into(held_out).path, True) if held_out.is_dir() else (None, True)


def _check_evaluation_shards(config: RunConfig, tokenizer: Tokenizer) -> Path | None:
    """The folder to evaluate on, made like the one to train on; None where none is named."""
    if not config.data.eval_shards:
        return None
    folder = _look_into(config.data.eval_shards)
    _check_same_tokenizer(folder, tokenizer)
    _check_template(folder, config.data)
    return folder.path


def _look_into(folder: str | Path) -> ShardFolder:
    """A folder of which only the manifest and the files' sizes are read: training reads the rest where it runs."""
    return ShardFolder.open(folder, force_streaming=True)


def _check_same_tokenizer(folder: ShardFolder, tokenizer: Tokenizer) -> None:
    if tokenizer.digest != folder.manifest.tokenizer.digest:
        raise DataError(
            f"the shards in {folder.path} were made with another tokenizer than {tokenizer.path} (digest "
            f"{folder.manifest.tokenizer.digest[:12]}, not {tokenizer.digest[:12]}); use {folder.tokenizer_path}, "
            "or preprocess again"
        )


def _check_folder(folder: ShardFolder, data: DataConfig) -> None:
    """Refuse settings that the shards cannot follow (the template, and packing where it was set explicitly) and trained
    unknown ids without --allow-unknown, and say what the tokenizer lost."""
    _check_template(folder, data)
    manifest, totals = folder.manifest, folder.manifest.totals
    check_unknown(totals.text_loss, data.allow_unknown, totals.lines, f"of {folder.path}")
    if totals.text_loss is None or totals.text_loss.is_any:
        for line in describe_loss(totals.text_loss, totals.tokens, totals.trained_tokens):
            log.warning("%s: %s", folder.path, line)
    for name in ("packing", "overlong", "train_turns", "train_reasoning"):
        made, wanted = getattr(manifest.settings, name), getattr(data, name)
        if name in data.model_fields_set and made != wanted:
            raise ConfigError(
                f"data.{name} is {wanted}, but the shards in {folder.path} were made with {made}; "
                f"set --data.{name} {made}, or preprocess again"
            )


def _check_template(folder: ShardFolder, data: DataConfig) -> None:
    made, wanted = folder.manifest.template, ALIASES.get(data.chat_template, data.chat_template)
    own = folder.template
    if own is not None and (wanted == AUTO_TEMPLATE or is_same(own, wanted)):
        return
    known = None if own is None else own.name if own.name in TEMPLATES else AUTO_TEMPLATE
    remedy = f"set --chat-template {known}, or preprocess again" if known else "preprocess again"
    other = "another version of it" if made.version == wanted else f"not {wanted}"
    raise DataError(f"the shards in {folder.path} were made with chat template {made.version}, {other}; {remedy}")


def _settings(config: RunConfig, max_conversations: int | None = None, eval_fraction: float = 0.0) -> Settings:
    data = config.data
    return Settings(
        seq_length=config.seq_length,
        packing=data.packing,
        overlong=data.overlong,
        shard_size_mb=data.shard_size_mb,
        disable_sharding=data.disable_sharding,
        max_conversations=max_conversations,
        eval_fraction=eval_fraction,
        train_turns=data.train_turns,
        train_reasoning=data.train_reasoning,
        format=data.format,
    )


def _tokenizer(config: RunConfig, cache: Path) -> Tokenizer:
    """The configured model, or one of model.vocab_size ids trained on the training files."""
    data = config.data
    if data.tokenizer != AUTO:
        return Tokenizer.load(data.tokenizer)
    key: dict[str, object] = {
        "recipe": RECIPE,
        "sentencepiece": version("sentencepiece"),
        "inputs": _input_digests(data.train_data),
        "vocab_size": config.model.vocab_size,
        "max_conversations": data.max_conversations,
        **({"format": data.format} if data.format else {}),
    }
    path = cache / "tokenizers" / f"{_key_digest(key)}.model"
    with _locked(path):
        if path.is_file():
            return Tokenizer.load(path)
        log.info(
            "training a tokenizer of %d ids on %s", config.model.vocab_size, ", ".join(map(shown_path, data.train_data))
        )
        return train_tokenizer(
            data.train_data,
            config.model.vocab_size,
            path,
            max_conversations=data.max_conversations,
            format_name=data.format,
        )


def _cached_shards(
    files: Sequence[str], tokenizer: Tokenizer, settings: Settings, cache: Path, data: DataConfig
) -> tuple[Path, bool]:
    key = {
        "format": [VERSION, READING],
        "inputs": _input_digests(files),
        "tokenizer": tokenizer.digest,
        "template": _template_key(data.chat_template, tokenizer),
        "settings": settings.model_dump(),
    }
    folder = cache / "shards" / _key_digest(key)
    with _locked(folder):
        if folder.exists() and _is_intact(folder):
            log.info("reusing the shards in %s", folder)
            manifest = read_manifest(folder)
            _show(folder, manifest)
            check_totals(manifest.totals, Limits(data.max_rejected, data.allow_unknown), folder)
            return folder, True
        log.info("preprocessing %s into %s", ", ".join(map(shown_path, files)), folder)
        manifest = preprocess_files(
            files, tokenizer.path, folder, settings,
            num_workers=data.num_workers, max_rejected=data.max_rejected,
            allow_unknown=data.allow_unknown, overwrite=True,
            chat_template=data.chat_template,
        )  # fmt: skip
        _show(folder, manifest)
        return folder, False


def _template_key(name: str, tokenizer: Tokenizer) -> str:
    chosen = certified_template(name, tokenizer)
    return " ".join(filter(None, (chosen.digest, chosen.certificate)))


def _show(folder: Path, manifest: Manifest) -> None:
    for line in summary_lines(folder, manifest):
        log.info("%s", line)


def _is_intact(folder: Path) -> bool:
    """A cache may be rebuilt at will, so damage that opening notices is a reason to, not an error."""
    try:
        _look_into(folder)
        held_out = folder / EVAL_FOLDER
        if held_out.is_dir():
            _look_into(held_out)
    except DataError as error:
        log.warning("%s; making it again", error)
        return False
    return True


def _input_digests(files: Sequence[str]) -> list[dict[str, object]]:
    entries: list[InputEntry] = [file.entry() for file in resolve_inputs(files)]
    return [entry.model_dump() for entry in entries]


def _key_digest(key: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of one cache entry; the kernel frees it however the process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
