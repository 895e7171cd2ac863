"""A model ready to answer, in plain PyTorch and in the precision asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from lumina_ds.config.chat_templates import DEFAULT_TEMPLATE, TEMPLATES
from lumina_ds.config.schema import ModelConfig
from lumina_ds.data.chat_template import Template, stop_ids
from lumina_ds.data.templates.find import tokenizer_for
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from lumina_ds.data.turns import TrainReasoning
from lumina_ds.errors import CheckpointError
from lumina_ds.generate.precision import convert, inference_precision
from lumina_ds.model.transformer import CausalLM


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to answer, in plain PyTorch. `template` is the one it was trained with."""

    model: CausalLM
    tokenizer: Tokenizer
    device: torch.device
    precision: str = "fp32"
    template: Template = TEMPLATES[DEFAULT_TEMPLATE]
    train_reasoning: TrainReasoning = "yes"  # of earlier turns, `last` leaves it out of a prompt too

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """The ids each of which ends a reply."""
        return stop_ids(self.tokenizer, self.template)


def load_model(
    model: ModelConfig,
    weights: Sequence[Path],
    tokenizer: Path,
    precision: str = "auto",
    template: Template = TEMPLATES[DEFAULT_TEMPLATE],
) -> LoadedModel:
    """Build the model and fill it from safetensors files of ours; on the GPU if there is one.

    Raises CheckpointError when a file is none.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    # Asked first: what this machine cannot do is known before any weight is read.
    inference_precision(precision)
    state: dict[str, Tensor] = {}
    for path in weights:
        try:
            state |= load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path} is no safetensors file: {error}") from error
    return build_model(model, state, tokenizer, precision, template)


def build_model(
    model: ModelConfig,
    state: Mapping[str, Tensor],
    tokenizer: Path,
    precision: str = "auto",
    template: Template = TEMPLATES[DEFAULT_TEMPLATE],
) -> LoadedModel:
    """The same from tensors by our names; a tied head need not be among them."""
    device_name, resolved, _ = inference_precision(precision)
    device = torch.device(device_name)
    with torch.device("meta"):
        network = CausalLM(model)
    network.to_empty(device="cpu")
    state = dict(state)
    if model.tie_word_embeddings:
        network.lm_head.weight = network.model.embed_tokens.weight
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        fault = " ".join(str(error).split())[:300]
        raise CheckpointError(f"the weights are not those of the configured model: {fault}") from error
    reader = tokenizer_for(Tokenizer.load(tokenizer), template)
    return LoadedModel(convert(network.eval(), resolved, device), reader, device, resolved, template)
