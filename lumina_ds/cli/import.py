"""`lumina import`: a model in Hugging Face's format as the start of a training run.

The module's name is a keyword; the verb table loads modules by name, so nothing has to write it as one.
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from lumina_ds.config.chat_templates import TEMPLATES
from lumina_ds.text import counted, format_bytes

EXAMPLES = """Example:

\b
  lumina import exported --out start
  lumina train --config start/config.yaml --train-data chats.jsonl
"""


@click.command("import", epilog=EXAMPLES)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="new folder to write")
@click.option("--json", "as_json", is_flag=True, help="one JSON document")
def command(folder: Path, out: Path, as_json: bool) -> None:
    """Make a Llama, Qwen3, Mixtral, Qwen3-MoE or GLM-4-MoE in FOLDER the starting point of training.

    FOLDER holds config.json and safetensors; its tokenizer is taken along when it has one.
    """
    from lumina_ds.export.start_folder import import_model

    made = import_model(folder, out)
    if as_json:
        click.echo(json.dumps(made))
        return
    click.echo(
        f"wrote {out}: {made['family']}, {counted(made['tensors'], 'tensor')}, {format_bytes(made['weight_bytes'])}"
    )
    if made["num_added_rows"]:
        click.echo(
            f"the vocabulary grew by {counted(made['num_added_rows'], 'row')} for the markers of the chat template, "
            f"to {made['model']['vocab_size']}"
        )
    if made["chat_template_fault"]:
        click.echo(f"its chat template is kept, but cannot be trained with: {made['chat_template_fault']}")
    elif made["chat_template"] in (*TEMPLATES,):
        click.echo(f"its folder brings no chat template of its own, so training uses {made['chat_template']}")
    elif made["chat_template"]:
        click.echo("its own chat template and special tokens are kept, and the template's masks are proven")
    if made["tokenizer"] is None:
        click.echo(f"{folder} holds no tokenizer; name one with --tokenizer when training")
    click.echo(f"start with: lumina train --config {out / 'config.yaml'} --train-data FILE.jsonl")
