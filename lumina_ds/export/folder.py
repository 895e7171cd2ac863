"""A whole model as a folder that transformers loads; written aside and renamed when complete."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from lumina_ds.config.chat_templates import DEFAULT_TEMPLATE, TEMPLATES
from lumina_ds.config.schema import ModelConfig
from lumina_ds.data.templates.find import Template, tokenizer_for
from lumina_ds.data.templates.jinja_template import JinjaTemplate
from lumina_ds.data.tokenizer.tokenizer import Tokenizer, check_vocabulary
from lumina_ds.errors import ConfigError, MachineError
from lumina_ds.export.hugging_face import hugging_face_config, hugging_face_family, published_names
from lumina_ds.export.own_template import end_ids, write_own_template
from lumina_ds.export.tokenizer import write_tokenizer
from lumina_ds.export.weight_files import (
    MAX_FILE_BYTES,
    Part,
    Planned,
    check_declared,
    coverage_faults,
    model_shapes,
    read_headers,
    refuse,
    write_weights,
)
from lumina_ds.files import sync_folder


def export_model(
    model: ModelConfig,
    weights: Path,
    tokenizer: Path,
    out: Path,
    dtype: str = "float32",
    with_fast_tokenizer: bool = True,
    max_file_bytes: int = MAX_FILE_BYTES,
    template: Template = TEMPLATES[DEFAULT_TEMPLATE],
) -> dict[str, Any]:
    """Write the model whose whole weights lie in the folder `weights` to the folder `out`; returns what was written.

    dtype: float32 or bfloat16. template: the run's. Memory holds one file of at most `max_file_bytes`, and one tensor more. Raises
    ConfigError for a shape without a published counterpart or an `out` that exists, CheckpointError for weights
    that are not exactly the model's, DataError for a tokenizer whose fast form would give other ids.
    """
    import torch

    family = hugging_face_family(model)
    loaded = tokenizer_for(Tokenizer.load(tokenizer), template)
    check_vocabulary(loaded, model.vocab_size)
    planned = _plan(model, weights)
    with new_folder(out) as staging:
        ids = _write_tokenizer(loaded, template, staging, model.max_position_embeddings, with_fast_tokenizer)
        pad = ids.pop("pad_token_id")
        write_json(staging / "config.json", hugging_face_config(model, dtype) | ids)
        write_json(staging / "generation_config.json", {**ids, "pad_token_id": pad})
        num_bytes = write_weights(planned, staging, getattr(torch, dtype), max_file_bytes)
        _verify(staging, planned)
        names = sorted(path.name for path in staging.iterdir())
    return {
        "out": str(out),
        "family": family,
        "dtype": dtype,
        "tensors": len(planned),
        "weight_bytes": num_bytes,
        "fast_tokenizer": with_fast_tokenizer,
        "files": names,
    }


def _write_tokenizer(
    tokenizer: Tokenizer, template: Template, out: Path, context: int, with_fast: bool
) -> dict[str, Any]:
    """Write the tokenizer's files; returns the ids of bos, eos and pad."""
    if isinstance(template, JinjaTemplate):
        write_own_template(tokenizer, template, out, context, with_fast)
        return end_ids(tokenizer, template)
    write_tokenizer(tokenizer, out, context, with_fast)
    # The end of a turn pads too: without an id for it, batches of unequal prompts cannot be generated.
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.end_id, "pad_token_id": tokenizer.end_id}


def _plan(model: ModelConfig, weights: Path) -> list[Planned]:
    """Every published tensor and where it comes from, in the model's order, which is that of a checkpoint's files."""
    found = read_headers(weights)
    if model.tie_word_embeddings:
        found.pop("lm_head.weight", None)
    check_declared(weights, model, found)
    shapes = model_shapes(model)
    refuse(weights, coverage_faults(found, shapes))
    planned = []
    for name in shapes:
        part = found[name]
        for published, row in published_names(name, part.shape[0], model):
            shape = part.shape if row is None else part.shape[1:]
            planned.append(Planned(published, (Part(part.file, name, shape, part.dtype, row),)))
    if model.tie_word_embeddings and hugging_face_family(model) == "glm4_moe":
        # vLLM does not tie this family's head: without a tensor of that name it computes with what memory holds.
        embedding = next(one for one in planned if one.name == "model.embed_tokens.weight")
        planned.append(replace(embedding, name="lm_head.weight"))
    return planned


def _verify(folder: Path, planned: list[Planned]) -> None:
    """The finished files hold every planned tensor, once and in its shape."""
    refuse(folder, coverage_faults(read_headers(folder), {one.name: one.shape for one in planned}))


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write in that becomes `out` when the block ends well, and vanishes when it does not.

    Raises ConfigError when `out` exists and is not an empty folder, MachineError when it cannot be written.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ConfigError(f"{out} exists already; name a new folder with --out, or remove it")
    staging = out.with_name(f".{out.name}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        yield staging
        # safetensors writes its files for their owner alone.
        readable = 0o666 & ~_umask()
        for path in staging.iterdir():
            path.chmod(readable)
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
        sync_folder(staging)
        staging.replace(out)
        sync_folder(out.parent)
    except OSError as error:
        raise MachineError(
            f"cannot write {out}: {error.strerror or error}; free space or choose another --out"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _umask() -> int:
    """The process's umask, which is only told when it is set."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file for people and programs."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
