"""A folder in Hugging Face's format as the starting point of training: our names, the tokenizer, a configuration.

    model-*.safetensors, model.safetensors.index.json    whole weights in our names, values as they were
    tokenizer.model or tokenizer.json                    the tokenizer's file
    chat_template.json                                   the model's own chat template, where it has one
    config.yaml                                          for `lumina train --config`: shape, tokenizer, init_from
    import.json                                          written last: shape, family, and what was added

`lumina export` takes such a folder too, and gives back the same bytes.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from lumina_ds.config.chat_templates import AUTO_TEMPLATE, ChatTemplate
from lumina_ds.config.schema import ModelConfig
from lumina_ds.config.yaml_file import yaml_text
from lumina_ds.data.templates.find import (
    STORED_TEMPLATE,
    NamedTemplate,
    certified_template,
    find_template,
    stored_text,
)
from lumina_ds.data.templates.jinja_template import JinjaTemplate
from lumina_ds.data.tokenizer.tokenizer import TOKENIZER_FILES, Tokenizer
from lumina_ds.errors import CheckpointError, ConfigError, DataError
from lumina_ds.export.folder import new_folder, write_json
from lumina_ds.export.foreign_config import model_from_hugging_face
from lumina_ds.export.hugging_face import published_names
from lumina_ds.export.weight_files import (
    MAX_FILE_BYTES,
    Part,
    Planned,
    check_declared,
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

    A model's own chat template is kept, with its special tokens. Where the folder brings none, the markers of ours get rows
    of their own if the vocabulary has no room for them: the mean of all rows. Raises ConfigError for a model that ours cannot compute, CheckpointError for weights that are not
    exactly that model's, DataError for a folder without config.json or with a tokenizer that cannot be used.
    """
    family, model = published_model(source)
    planned = _plan(model, source)
    tokenizer, template, fault = _tokenizer(source)
    num_added = max(0, tokenizer.vocab_size - model.vocab_size) if tokenizer is not None else 0
    planned = [replace(one, num_added_rows=num_added) if one.name in VOCABULARY_TENSORS else one for one in planned]
    model = model.model_copy(update={"vocab_size": model.vocab_size + num_added})
    made = {
        "format": FORMAT,
        "family": family,
        "source": str(source),
        "model": model.model_dump(),
        "num_added_rows": num_added,
        "chat_template": None if template is None else template.name,
        "chat_template_fault": fault,
        "tokenizer": None if tokenizer is None else {"sha256": tokenizer.digest, "num_ids": tokenizer.vocab_size},
    }
    with new_folder(out) as staging:
        num_bytes = write_weights(planned, staging, None, max_file_bytes)
        if tokenizer is not None:
            shutil.copyfile(tokenizer.path, staging / tokenizer.file_name)
        if template is not None and isinstance(template.template, JinjaTemplate):
            (staging / STORED_TEMPLATE).write_text(stored_text(template.template), encoding="utf-8")
        settings = _run_settings(model, out.resolve(), tokenizer, template)
        (staging / "config.yaml").write_text(yaml_text(settings), encoding="utf-8")
        write_json(staging / MARK, made)
    return {"out": str(out), **made, "tensors": len(planned), "weight_bytes": num_bytes}


def published_model(source: Path) -> tuple[str, ModelConfig]:
    """Family and shape of a folder in Hugging Face's format, by its config.json."""
    config = read_json(source / "config.json")
    try:
        return config.get("model_type", ""), model_from_hugging_face(config)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def read_published(source: Path) -> tuple[ModelConfig, dict[str, torch.Tensor], Path, NamedTemplate]:
    """Shape, tensors by our names, tokenizer file and chat template of a folder in Hugging Face's format, all of it in memory.

    Errors as those of import_model, and a ConfigError for a model that has no tokens for the chat template.
    """
    _, model = published_model(source)
    planned = _plan(model, source)
    tokenizer, template, fault = _tokenizer(source)
    if tokenizer is None or template is None:
        raise DataError(f"{source} holds neither tokenizer.model nor tokenizer.json; copy one of them there")
    if tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(
            f"the model in {source} has no tokens for the turns of a chat; lumina import and train it first"
        )
    if fault is not None:
        raise DataError(fault)
    return model, read_weights(planned), tokenizer.path, template


def start_weights(folder: Path, model: ModelConfig) -> list[Path]:
    """The weight files of an imported model, which hold exactly `model`; CheckpointError otherwise."""
    found = read_headers(folder)
    if model.tie_word_embeddings:
        found.pop("lm_head.weight", None)
    check_declared(folder, model, found)
    refuse(folder, coverage_faults(found, model_shapes(model)))
    return sorted({part.file for part in found.values()})


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


def _tokenizer(source: Path) -> tuple[Tokenizer | None, NamedTemplate | None, str | None]:
    """The folder's tokenizer, None where it has none; its chat template, or ours where it brings none, which takes
    markers; and why the masks of its own are not proven, if so."""
    if not any((source / name).is_file() for name in TOKENIZER_FILES):
        return None, None, None
    tokenizer = Tokenizer.load(source)
    found = find_template(AUTO_TEMPLATE, tokenizer)
    if isinstance(found.template, ChatTemplate):
        return tokenizer, found, None
    fast = source / TOKENIZER_FILES[1]
    if fast.is_file():  # whose ids transformers gives
        tokenizer = Tokenizer.load(fast)
    try:
        return tokenizer.without_markers(), certified_template(AUTO_TEMPLATE, tokenizer), None
    except DataError as fault:
        return tokenizer.without_markers(), found, str(fault)


def _plan(model: ModelConfig, source: Path) -> list[Planned]:
    """Every tensor of ours and the published ones that it is made of."""
    found = {name: part for name, part in read_headers(source).items() if not name.endswith(COMPUTED)}
    if model.tie_word_embeddings:
        found.pop("lm_head.weight", None)
    check_declared(source, model, found)
    shapes = model_shapes(model)
    expected = {}
    for name, shape in shapes.items():
        for published, row in published_names(name, shape[0], model):
            expected[published] = shape if row is None else shape[1:]
    refuse(source, coverage_faults(found, expected))
    return [
        Planned(name, _parts(name, shape, model, found), stacked=".mlp.experts." in name)
        for name, shape in shapes.items()
    ]


def _parts(name: str, shape: tuple[int, ...], model: ModelConfig, found: dict[str, Part]) -> tuple[Part, ...]:
    return tuple(found[published] for published, _ in published_names(name, shape[0], model))


def _run_settings(
    model: ModelConfig, out: Path, tokenizer: Tokenizer | None, template: NamedTemplate | None
) -> dict[str, Any]:
    settings: dict[str, Any] = {"model": model.model_dump(exclude_none=True)}
    if tokenizer is not None:
        settings["data"] = {"tokenizer": str(out / tokenizer.file_name)}
        if template is not None and isinstance(template.template, JinjaTemplate):
            settings["data"]["chat_template"] = AUTO_TEMPLATE
    return {**settings, "train": {"init_from": str(out)}}
