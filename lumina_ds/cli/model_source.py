"""Options shared by generate, chat and evaluate: which checkpoint, which precision, how to sample."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from lumina_ds.config.schema import ModelConfig, Precision

PRECISIONS = click.Choice(list(Precision.__args__))  # type: ignore[attr-defined]


def source_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """RUN and --inference-precision."""
    function = click.option("--inference-precision", type=PRECISIONS, help="the run's inference.precision when unset")(
        function
    )
    return click.argument("run", metavar="RUN", type=click.Path(path_type=Path))(function)


def sampling_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--temperature, --top-p, --top-k, --max-new-tokens, --seed, --system."""
    for option in (
        click.option("--system", help="system turn before the conversation"),
        click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="the same seed gives the same reply"),
        click.option("--max-new-tokens", type=int, default=256, show_default=True),
        click.option("--top-k", type=int, default=0, show_default=True, help="keep the k likeliest tokens; 0 all"),
        click.option("--top-p", type=float, default=0.95, show_default=True, help="keep this mass of tokens"),
        click.option("--temperature", type=float, default=0.8, show_default=True, help="0 is greedy"),
    ):
        function = option(function)
    return function


def load_run(run: Path, precision: str | None) -> tuple[Any, dict[str, Any]]:
    """The model of a run folder's newest sound checkpoint, or of a step folder, and that checkpoint's manifest."""
    from lumina_ds.data.tokenizer import tokenizer_in
    from lumina_ds.generate.chat import load_model
    from lumina_ds.train.checkpoint import find_checkpoint, read_manifest, weight_files

    folder = find_checkpoint(run)
    manifest = read_manifest(folder)
    model = ModelConfig.model_validate(manifest["model"])
    precision = precision or manifest["config"]["inference"]["precision"]
    return load_model(model, weight_files(folder), tokenizer_in(folder), precision), manifest


def clean_text(text: str) -> str:
    """Text from the command line or standard input, with bytes that are no UTF-8 replaced."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
