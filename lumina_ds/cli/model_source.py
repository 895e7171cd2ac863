"""Options shared by generate, chat and evaluate: which checkpoint, which precision, how to sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lumina_ds.cli.completers import complete_run
from lumina_ds.config.chat_templates import AUTO_TEMPLATE
from lumina_ds.config.schema import InferencePrecision
from lumina_ds.errors import ConfigError, DataError

if TYPE_CHECKING:
    from lumina_ds.data.templates.find import NamedTemplate

PRECISIONS = click.Choice(list(InferencePrecision.__args__))  # type: ignore[attr-defined]


def source_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """RUN and --inference-precision."""
    function = click.option("--inference-precision", type=PRECISIONS, help="the run's inference.precision when unset")(
        function
    )
    return click.argument("run", metavar="RUN", type=click.Path(path_type=Path), shell_complete=complete_run)(function)


def sampling_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--temperature, --top-p, --top-k, --repetition-penalty, --max-new-tokens, --stop, --seed, --system."""
    for option in (
        click.option("--system", help="system turn before the conversation"),
        click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="the same seed gives the same reply"),
        click.option("--stop", multiple=True, metavar="TEXT", help="end a reply before TEXT; may be given again"),
        click.option("--max-new-tokens", type=int, default=256, show_default=True),
        click.option(
            "--repetition-penalty", type=float, default=1.0, show_default=True, help="above 1: repeat less; 1 none"
        ),
        click.option("--top-k", type=int, default=0, show_default=True, help="keep the k likeliest tokens; 0 all"),
        click.option("--top-p", type=float, default=0.95, show_default=True, help="keep this mass of tokens"),
        click.option("--temperature", type=float, default=0.8, show_default=True, help="0 is greedy"),
    ):
        function = option(function)
    return function


def sampling_settings(options: Mapping[str, Any]) -> Any:
    """The SamplingSettings of a verb's options; ConfigError for a value out of range."""
    from lumina_ds.generate.sampling import SamplingSettings

    names = SamplingSettings.__dataclass_fields__
    settings = SamplingSettings(**{name: value for name, value in options.items() if name in names})
    settings.check()
    return settings


def load_run(run: Path, precision: str | None) -> tuple[Any, dict[str, Any]]:
    """The model of a run folder's newest sound checkpoint, of a step folder, or of a folder in Hugging Face's format.

    With it what is known of it: {"step": of its checkpoint or None, "tokenizer": {"sha256": ...},
    "template", "template_digest": its chat template's name and digest}.
    """
    from lumina_ds.checkpoint.format import find_checkpoint, weight_files
    from lumina_ds.checkpoint.manifest import read_manifest
    from lumina_ds.data.templates.find import certified_template
    from lumina_ds.data.tokenizer.tokenizer import Tokenizer, tokenizer_in
    from lumina_ds.export.start_folder import read_published, read_start_folder, start_weights
    from lumina_ds.generate.load import build_model, load_model
    from lumina_ds.generate.precision import inference_precision

    if (run / "config.json").is_file():
        # Asked first: what this machine cannot do is known before any weight is read.
        inference_precision(precision or "auto")
        published, state, tokenizer, template = read_published(run)
        loaded = build_model(published, state, tokenizer, precision or "auto", template.template)
        return loaded, _known(None, template, loaded.tokenizer.digest)
    if (model := read_start_folder(run)) is not None:
        weights = start_weights(run, model)
        tokenizer = tokenizer_in(run)
        template = certified_template(AUTO_TEMPLATE, Tokenizer.load(tokenizer))
        loaded = load_model(model, weights, tokenizer, precision or "auto", template.template)
        return loaded, _known(None, template, loaded.tokenizer.digest)
    folder = find_checkpoint(run)
    manifest = read_manifest(folder)
    template = manifest.chat_template(folder)
    precision = precision or manifest.config.inference.precision
    loaded = load_model(manifest.shape(), weight_files(folder), tokenizer_in(folder), precision, template.template)
    loaded = replace(loaded, train_reasoning=manifest.config.data.train_reasoning)
    return loaded, _known(manifest.step, template, manifest.tokenizer.sha256)


def _known(step: int | None, template: NamedTemplate, tokenizer_digest: str) -> dict[str, Any]:
    return {
        "step": step,
        "template": template.name,
        "template_digest": template.digest,
        "tokenizer": {"sha256": tokenizer_digest},
    }


def evaluation_rows_of(
    data: Path, loaded: Any, manifest: Mapping[str, Any], run: Path, seq_length: int | None = None
) -> Any:
    """PackedRows of the shard folder `data` for a loaded model; its context long when `seq_length` is unset.

    Raises DataError for shards of another tokenizer or chat template, ConfigError for rows longer than the context.
    """
    from lumina_ds.data.loader import PackedRows
    from lumina_ds.data.shards.folder import ShardFolder

    folder = ShardFolder.open(data)
    if folder.manifest.tokenizer.digest != manifest["tokenizer"]["sha256"]:
        raise DataError(f"{data} was made with another tokenizer than {run}; preprocess it with the tokenizer in {run}")
    if folder.manifest.template.digest != manifest["template_digest"]:
        raise DataError(
            f"{data} was made with chat template {folder.manifest.template.version}, and {run} was trained with "
            f"{manifest['template']}; preprocess it with --chat-template {manifest['template']}"
        )
    context = loaded.model.config.max_position_embeddings
    if (seq_length or context) > context:
        raise ConfigError(f"--seq-length {seq_length} is above the model's context of {context} tokens; lower it")
    return PackedRows(folder, seq_length or context)


def clean_text(text: str) -> str:
    """Text from the command line or standard input, with bytes that are no UTF-8 replaced."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
