"""`lumina export`: a trained model in Hugging Face's format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from lumina_ds.cli.completers import complete_run
from lumina_ds.config.chat_templates import DEFAULT_TEMPLATE, TEMPLATES
from lumina_ds.config.schema import ModelConfig
from lumina_ds.errors import ConfigError
from lumina_ds.text import counted, format_bytes

EXAMPLES = """Examples:

\b
  lumina export runs/debug --out exported
  lumina export runs/debug/checkpoints/step-00000400 --out exported-bf16 --dtype bfloat16
"""


@click.command(epilog=EXAMPLES)
@click.argument("run", type=click.Path(path_type=Path), shell_complete=complete_run)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="new folder to write")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--no-fast-tokenizer", is_flag=True, help="without tokenizer.json, chat template and their check")
@click.option("--json", "as_json", is_flag=True, help="one JSON document")
def command(run: Path, out: Path, dtype: str, no_fast_tokenizer: bool, as_json: bool) -> None:
    """Write a model as a folder that transformers loads, in the layout that vLLM and llama.cpp read.

    RUN is a run folder (its newest sound checkpoint), one of its step folders, or what `lumina import` made.
    """
    from lumina_ds.data.tokenizer.tokenizer import tokenizer_in
    from lumina_ds.export.folder import export_model

    model, weights, step, template = _source(run)
    tokenizer = tokenizer_in(weights)
    made = export_model(
        model, weights, tokenizer, out, dtype, with_fast_tokenizer=not no_fast_tokenizer, template=template
    )
    if as_json:
        click.echo(json.dumps({"run": str(run), "step": step, **made}))
        return
    place = "" if step is None else f" of step {step}"
    size = format_bytes(made["weight_bytes"])
    click.echo(f"wrote {out}: {made['family']}{place}, {counted(made['tensors'], 'tensor')}, {size} in {dtype}")
    if no_fast_tokenizer:
        click.echo("without a fast tokenizer: other programs must not make one themselves, its ids may differ")


def _source(run: Path) -> tuple[ModelConfig, Path, int | None, Any]:
    """Shape, folder of the whole weights, step and chat template of what `run` names."""
    from lumina_ds.checkpoint.format import find_checkpoint
    from lumina_ds.checkpoint.manifest import read_manifest
    from lumina_ds.data.templates.find import read_template
    from lumina_ds.export.start_folder import read_start_folder

    imported = read_start_folder(run)
    if imported is not None:
        return imported, run, None, read_template(run) or TEMPLATES[DEFAULT_TEMPLATE]
    folder = find_checkpoint(run)
    manifest = read_manifest(folder)
    template = manifest.chat_template(folder)
    if template.name in TEMPLATES and template.name != DEFAULT_TEMPLATE:
        raise ConfigError(
            f"{run} was trained with chat template {template.name}, and only {DEFAULT_TEMPLATE} can be exported: other programs "
            "would build other prompts; use `lumina generate` and `lumina chat`"
        )
    return manifest.shape(), folder, manifest.step, template.template
