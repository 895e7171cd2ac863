"""`lumina gguf`: an exported folder as a file for llama.cpp."""

from __future__ import annotations

from pathlib import Path

import click

from lumina_ds.text import format_bytes

EXAMPLES = """Example:

\b
  lumina gguf exported --llama-cpp llama.cpp --out model.gguf --outtype q8_0
"""


@click.command(epilog=EXAMPLES)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--llama-cpp", required=True, type=click.Path(path_type=Path), help="checkout with convert_hf_to_gguf.py")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="new file to write")
@click.option("--outtype", type=click.Choice(["auto", "f32", "f16", "bf16", "q8_0"]), default="auto", show_default=True)
def command(folder: Path, llama_cpp: Path, out: Path, outtype: str) -> None:
    """Convert FOLDER, which `lumina export` wrote with a SentencePiece BPE model, by llama.cpp's own converter.

    That converter alone refuses the tokenizer of Qwen3-MoE and GLM-4-MoE folders, and gives Qwen3 ones other tokens.
    """
    from lumina_ds.export.gguf import write_gguf

    write_gguf(folder, llama_cpp, out, outtype)
    click.echo(f"wrote {out}: {format_bytes(out.stat().st_size)}")
