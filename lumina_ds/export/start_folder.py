"""A folder in Hugging Face's format as the starting point of training: our names, the tokenizer, a configuration.

    model-*.safetensors, model.safetensors.index.json    whole weights in our names, values as they were
    tokenizer.model or tokenizer.json                    the tokenizer's file
    config.yaml                                          for `lumina train --config`: shape, tokenizer, init_from
    import.json                                          written last: shape, family, and what was added

`lumina export` takes such a folder too, and gives back the same bytes.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from lumina_ds.config.schema import ModelConfig
from lumina_ds.data.tokenizer.tokenizer import TOKENIZER_FILES, Tokenizer
from lumina_ds.errors import CheckpointError, ConfigError, DataError
from lumina_ds.export.folder import new_folder, write_json
from lumina_ds.export.foreign_config import model_from_hugging_face
from lumina_ds.export.hugging_face import published_names
from lumina_ds.export.weight_files import (
    MAX_FILE_BYTES,
    Part,
    Planned,
    coverage_faults,
    model_shapes,
    read_headers,
    read_json,
    read_weights,
    refuse,
    write_weights,
)

if TYPE_CHECKING:
    import torch

MARK = "import.json"
FORMAT = 1
# Tables that old checkpoints carry and every program computes.
COMPUTED = "rotary_emb.inv_freq"
VOCABULARY_TENSORS = ("model.embed_tokens.weight", "lm_head.weight")


def import_model(source: Path, out: Path, max_file_bytes: int = MAX_FILE_BYTES) -> dict[str, Any]:
    """Make `out` from the folder `source`; returns what was made.

    The chat template's markers get rows of their own where the vocabulary has no room for them: the mean of all
    rows. Raises ConfigError for a model that ours cannot compute, CheckpointError for weights that are not
    exactly that model's, DataError for a folder without config.json or with a tokenizer that cannot be used.
    """
    config = read_json(source / "config.json")
    model = model_from_hugging_face(config)
    tokenizer = _tokenizer(source)
    num_added = max(0, tokenizer.vocab_size - model.vocab_size) if tokenizer is not None else 0
    planned = _plan(model, source, num_added)
    model = model.model_copy(update={"vocab_size": model.vocab_size + num_added})
    made = {
        "format": FORMAT,
        "family": config["model_type"],
        "source": str(source),
        "model": model.model_dump(),
        "num_added_rows": num_added,
        "tokenizer": None if tokenizer is None else {"sha256": tokenizer.digest, "num_ids": tokenizer.vocab_size},
    }
    with new_folder(out) as staging:
        num_bytes = write_weights(planned, staging, None, max_file_bytes)
        if tokenizer is not None:
            shutil.copyfile(tokenizer.path, staging / tokenizer.file_name)
        settings = _run_settings(model, out.resolve(), tokenizer)
        (staging / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        write_json(staging / MARK, made)
    return {"out": str(out), **made, "tensors": len(planned), "weight_bytes": num_bytes}


def read_published(source: Path) -> tuple[ModelConfig, dict[str, torch.Tensor], Path]:
    """Shape, tensors by our names, and tokenizer file of a folder in Hugging Face's format, all of it in memory.

    Errors as those of import_model, and a ConfigError for a model that has no tokens for the chat template.
    """
    model = model_from_hugging_face(read_json(source / "config.json"))
    tokenizer = _tokenizer(source)
    if tokenizer is None:
        raise DataError(f"{source} holds neither tokenizer.model nor tokenizer.json; copy one of them there")
    if tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(
            f"the model in {source} has no tokens for the turns of a chat; lumina import and train it first"
        )
    return model, read_weights(_plan(model, source, 0)), tokenizer.path


def read_start_folder(folder: Path) -> ModelConfig | None:
    """The shape of an imported model; None where `folder` is something else."""
    if not (folder / MARK).is_file():
        return None
    made = read_json(folder / MARK)
    if made.get("format") != FORMAT:
        raise CheckpointError(f"{folder} has import format {made.get('format')}, this version reads {FORMAT}")
    try:
        return ModelConfig.model_validate(made.get("model"))
    except ValidationError as error:
        raise CheckpointError(f"{folder / MARK} was altered; import the model again") from error


def _tokenizer(source: Path) -> Tokenizer | None:
    """The folder's own tokenizer; None where it has none."""
    if not any((source / name).is_file() for name in TOKENIZER_FILES):
        return None
    return Tokenizer.load(source)


def _plan(model: ModelConfig, source: Path, num_added: int) -> list[Planned]:
    """Every tensor of ours and the published ones that it is made of."""
    found = {name: part for name, part in read_headers(source).items() if not name.endswith(COMPUTED)}
    if model.tie_word_embeddings:
        found.pop("lm_head.weight", None)
    shapes = model_shapes(model)
    expected = {}
    for name, shape in shapes.items():
        for published, row in published_names(name, shape[0], model):
            expected[published] = shape if row is None else shape[1:]
    refuse(source, coverage_faults(found, expected))
    return [
        Planned(
            name,
            _parts(name, shape, model, found),
            stacked=".mlp.experts." in name,
            num_added_rows=num_added if name in VOCABULARY_TENSORS else 0,
        )
        for name, shape in shapes.items()
    ]


def _parts(name: str, shape: tuple[int, ...], model: ModelConfig, found: dict[str, Part]) -> tuple[Part, ...]:
    return tuple(found[published] for published, _ in published_names(name, shape[0], model))


def _run_settings(model: ModelConfig, out: Path, tokenizer: Tokenizer | None) -> dict[str, Any]:
    settings: dict[str, Any] = {"model": model.model_dump(exclude_none=True)}
    if tokenizer is not None:
        settings["data"] = {"tokenizer": str(out / tokenizer.file_name)}
    return {**settings, "train": {"init_from": str(out)}}
