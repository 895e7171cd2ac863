"""The tokenizer's files of a model with a chat template of its own: written back as they came."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from lumina_ds.data.strict_json import RejectedLine
from lumina_ds.data.templates.jinja_template import JinjaTemplate
from lumina_ds.data.templates.samples import samples
from lumina_ds.data.tokenizer.model_folder import CONFIG_FILE, NAMES_FILE, TEMPLATE_FILE
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from lumina_ds.errors import DataError, MachineError
from lumina_ds.export.fast_tokenizer import as_text, fast_tokenizer_document


def write_own_template(
    tokenizer: Tokenizer, template: JinjaTemplate, out: Path, context: int, with_fast: bool = True
) -> None:
    """Write the tokenizer, tokenizer_config.json and chat_template.jinja.

    context: tokens of the model's window. A tokenizer.json is copied; with_fast makes one of a SentencePiece model, and
    raises DataError where its ids would be others than training saw.
    """
    shutil.copyfile(tokenizer.path, out / tokenizer.file_name)
    config = _config(template, context)
    (out / CONFIG_FILE).write_text(
        template.tokenizer_config or json.dumps(config, indent=1, ensure_ascii=False), "utf-8"
    )
    if config.get("chat_template") != template.source:
        (out / TEMPLATE_FILE).write_text(template.source, encoding="utf-8")
    if template.tokenizer_config is None:
        (out / NAMES_FILE).write_text(json.dumps(dict(template.special_tokens), indent=1), encoding="utf-8")
    if with_fast and tokenizer.file_name == "tokenizer.model":
        document = fast_tokenizer_document(tokenizer)
        _check_same_ids(tokenizer, template, document)
        (out / "tokenizer.json").write_text(as_text(document), encoding="utf-8")


def end_ids(tokenizer: Tokenizer, template: JinjaTemplate) -> dict[str, Any]:
    """bos_token_id, eos_token_id (several as a list) and pad_token_id, for config.json and generation_config.json."""
    names, known = dict(template.special_tokens), tokenizer.special_tokens
    stops = [known[stop] for stop in template.stops]
    return {
        "bos_token_id": known.get(names.get("bos_token", ""), tokenizer.bos_id),
        "eos_token_id": stops[0] if len(stops) == 1 else stops,
        "pad_token_id": known.get(names.get("pad_token", ""), stops[0]),
    }


def _config(template: JinjaTemplate, context: int) -> dict[str, Any]:
    if template.tokenizer_config is not None:
        return json.loads(template.tokenizer_config)
    own = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    return {**own, "model_max_length": context, **dict(template.special_tokens)}


def _check_same_ids(tokenizer: Tokenizer, template: JinjaTemplate, document: dict[str, Any]) -> None:
    try:
        import tokenizers
    except ImportError:
        raise MachineError(
            "a fast tokenizer needs the package tokenizers; pip install 'lumina-ds[hf]', or --no-fast-tokenizer"
        ) from None
    fast = tokenizers.Tokenizer.from_str(json.dumps(document))
    writer = template.with_tokenizer(tokenizer)
    for sample in samples():
        try:
            ours, text = writer.prompt(sample.messages, sample.tools), writer.text(sample.messages, sample.tools, True)
        except RejectedLine:
            continue
        if fast.encode(text, add_special_tokens=False).ids != ours:
            raise DataError(
                f"a fast tokenizer made from {tokenizer.path} gives other ids than training saw of {text[:60]!r}; "
                "--no-fast-tokenizer exports without one"
            )
