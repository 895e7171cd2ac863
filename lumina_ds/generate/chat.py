"""Replies of a trained model: chat template, key/value cache, and stop at the end of the turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from lumina_ds.data.chat_template import encode_prompt
from lumina_ds.data.conversation import Turn
from lumina_ds.errors import ConfigError
from lumina_ds.generate.load import LoadedModel
from lumina_ds.generate.sampling import SamplingSettings, penalize_repetition, sample
from lumina_ds.model.attention import LayerCache
from lumina_ds.text import counted


@torch.inference_mode()
def generate_ids(
    loaded: LoadedModel, prompt_ids: Sequence[int], settings: SamplingSettings, stop_at_end: bool = True
) -> Iterator[int]:
    """New token ids one by one, until the end of the turn, max_new_tokens, or the context is full."""
    settings.check()
    context = loaded.model.config.max_position_embeddings
    if len(prompt_ids) >= context:
        raise ConfigError(
            f"the prompt has {counted(len(prompt_ids), 'token')} and the model's context is {context}; shorten the prompt"
        )
    generator = torch.Generator(device=loaded.device)
    if settings.seed is not None:
        generator.manual_seed(settings.seed)
    else:
        generator.seed()
    caches = [LayerCache(context) for _ in range(loaded.model.config.num_hidden_layers)]
    ids = torch.tensor([list(prompt_ids)], device=loaded.device)
    seen_V = torch.zeros(loaded.tokenizer.vocab_size, dtype=torch.bool, device=loaded.device)
    position = 0
    for _ in range(min(settings.max_new_tokens, context - len(prompt_ids))):
        positions = torch.arange(position, position + ids.shape[1], device=loaded.device).unsqueeze(0)
        logits_BSV = loaded.model(ids, positions, caches=caches)
        position += ids.shape[1]
        seen_V[ids[0]] = True
        # The head may be larger than the tokenizer; its unused ids must never be drawn.
        logits_V = logits_BSV[0, -1, : loaded.tokenizer.vocab_size]
        logits_V = penalize_repetition(logits_V, seen_V, settings.repetition_penalty)
        token = sample(logits_V, settings, generator)
        if stop_at_end and token in loaded.stop_ids:
            return
        yield token
        ids = torch.tensor([[token]], device=loaded.device)


def stream_reply(
    loaded: LoadedModel, turns: Sequence[Turn], settings: SamplingSettings, tools: Sequence[str] = ()
) -> Iterator[str]:
    """Pieces of the assistant's reply as they become certain; joined they are the whole text.

    A character of several bytes can span tokens, and so can a stop text: an unfinished one waits for its rest. The
    reply ends before the first of `settings.stop`. tools: definitions as JSON text.
    """
    shown, text = 0, ""
    for text in _growing_text(loaded, turns, settings, tools):
        end = _first_stop(text, settings.stop)
        if end is not None:
            yield text[shown:end]
            return
        certain = len(text) - _possible_stop(text, settings.stop)
        if certain > shown:
            yield text[shown:certain]
            shown = certain
    if len(text) > shown:
        yield text[shown:]


def _growing_text(
    loaded: LoadedModel, turns: Sequence[Turn], settings: SamplingSettings, tools: Sequence[str]
) -> Iterator[str]:
    """The reply so far, each a prefix of the next; the last one is the whole reply."""
    ids: list[int] = []
    text = ""
    prompt_ids = encode_prompt(turns, loaded.tokenizer, loaded.template, tools, loaded.train_reasoning)
    for token in generate_ids(loaded, prompt_ids, settings):
        ids.append(token)
        longer = loaded.tokenizer.decode(ids)
        if not longer.endswith("\N{REPLACEMENT CHARACTER}") and longer.startswith(text):
            text = longer
            yield text
    rest = loaded.tokenizer.decode(ids) if ids else ""
    if rest != text and rest.startswith(text):
        yield rest


def _first_stop(text: str, stops: Sequence[str]) -> int | None:
    return min((place for stop in stops if (place := text.find(stop)) >= 0), default=None)


def _possible_stop(text: str, stops: Sequence[str]) -> int:
    """How many of the last characters may be the beginning of a stop text."""
    return max(
        (size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])),
        default=0,
    )
