"""Replies of a trained model: chat template, key/value cache, and stop at the end of the turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lumina_ds.config.schema import ModelConfig
from lumina_ds.data.chat_template import encode_prompt
from lumina_ds.data.conversation import Turn
from lumina_ds.data.tokenizer import Tokenizer
from lumina_ds.errors import ConfigError
from lumina_ds.generate.sampling import SamplingSettings, sample
from lumina_ds.model.device import device_and_precision
from lumina_ds.model.kv_cache import LayerCache
from lumina_ds.model.transformer import CausalLM

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "mixed_bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to answer, in plain PyTorch."""

    model: CausalLM
    tokenizer: Tokenizer
    device: torch.device


def load_model(model: ModelConfig, weights: Sequence[Path], tokenizer: Path, precision: str = "auto") -> LoadedModel:
    """Build the model and fill it from safetensors files; on the GPU if there is one."""
    from safetensors.torch import load_file

    device_name, resolved, _ = device_and_precision(precision)
    device = torch.device(device_name)
    with torch.device("meta"):
        network = CausalLM(model)
    network.to_empty(device="cpu")
    state = {name: tensor for path in weights for name, tensor in load_file(path).items()}
    if model.tie_word_embeddings:
        network.lm_head.weight = network.model.embed_tokens.weight
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    network.load_state_dict(state)
    return LoadedModel(network.to(device, DTYPES[resolved]).eval(), Tokenizer.load(tokenizer), device)


@torch.inference_mode()
def generate_ids(loaded: LoadedModel, prompt_ids: Sequence[int], settings: SamplingSettings) -> Iterator[int]:
    """New token ids one by one, until the end of the turn, max_new_tokens, or the context is full."""
    settings.check()
    context = loaded.model.config.max_position_embeddings
    if len(prompt_ids) >= context:
        raise ConfigError(
            f"the prompt has {len(prompt_ids)} tokens and the model's context is {context}; shorten the prompt"
        )
    generator = torch.Generator(device=loaded.device)
    if settings.seed is not None:
        generator.manual_seed(settings.seed)
    else:
        generator.seed()
    caches = [LayerCache(context) for _ in range(loaded.model.config.num_hidden_layers)]
    ids = torch.tensor([list(prompt_ids)], device=loaded.device)
    position = 0
    for _ in range(min(settings.max_new_tokens, context - len(prompt_ids))):
        positions = torch.arange(position, position + ids.shape[1], device=loaded.device).unsqueeze(0)
        logits_BSV = loaded.model(ids, positions, caches=caches)
        position += ids.shape[1]
        # The head may be larger than the tokenizer; its unused ids must never be drawn.
        token = sample(logits_BSV[0, -1, : loaded.tokenizer.vocab_size], settings, generator)
        if token == loaded.tokenizer.end_id:
            return
        yield token
        ids = torch.tensor([[token]], device=loaded.device)


def stream_reply(loaded: LoadedModel, turns: Sequence[Turn], settings: SamplingSettings) -> Iterator[str]:
    """Pieces of the assistant's reply as they become certain; joined they are the whole text.

    A character of several bytes can span tokens, so an unfinished one waits for its rest.
    """
    ids: list[int] = []
    shown = ""
    for token in generate_ids(loaded, encode_prompt(turns, loaded.tokenizer), settings):
        ids.append(token)
        text = loaded.tokenizer.decode(ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}") and text.startswith(shown):
            yield text[len(shown) :]
            shown = text
    rest = loaded.tokenizer.decode(ids) if ids else ""
    if rest != shown and rest.startswith(shown):
        yield rest[len(shown) :]
