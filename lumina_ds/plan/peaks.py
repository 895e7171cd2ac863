"""The moments of a step at which memory may peak, each with what is alive in it beside the model's states.

Forward: the last block's experts, the decoder's end, the loss, and where the gradient leaves the head. Backward: the
final norm, every block's feed-forward and attention from the last to the first, and the end, where every gradient is
there and activations are gone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lumina_ds.plan.activations import ActivationBytes, LayerBytes
from lumina_ds.plan.gathering import Gathered
from lumina_ds.plan.states import StateBytes

Parts = dict[str, int]


@dataclass(frozen=True)
class Peak:
    """`kind` is one of KINDS; `block` the one at work, in the backward pass; `parts` bytes by component."""

    kind: str
    parts: Parts
    block: int | None = None

    @property
    def label(self) -> str:
        return KINDS[self.kind] + ("" if self.block is None else f" {self.block}")


KINDS = {
    "experts": "experts of the last block",
    "gathering": "gathering of the last parameters",
    "decoder end": "end of the decoder",
    "loss": "head and loss",
    "head weight": "gradient of the head's weight",
    "head input": "gradient of the head's input",
    "final norm": "backward of the final norm",
    "feed-forward": "backward of the feed-forward of block",
    "attention": "backward of the attention of block",
    "reduction": "last reduction of gradients",
    "end": "end of the backward pass",
    "between": "between two micro-batches",
    "step": "step of the largest group",
}


@dataclass(frozen=True)
class GrowingGradients:
    """Parameter gradients that the backward pass makes, in bytes. `head` is there when its gradient leaves the head;
    `waiting` of it stays until the embedding's (tied, or where no bucket takes it). Of every block, `last_matrix` is
    there at its feed-forward's height and `block` after it: zero where buckets take them."""

    head: int
    waiting: int
    tied: bool
    last_matrix: tuple[int, ...]
    block: tuple[int, ...]


def forward_peaks(
    states: StateBytes, activations: ActivationBytes, gathered: Gathered, gradients: GrowingGradients
) -> Iterator[Peak]:
    """In their order. What autocast cast for recomputed parts stays until the forward pass ends."""
    layers = activations.layers
    experts = sum(layer.expert_copies for layer in layers if not layer.feed_forward_anew)
    cast = experts + sum(layer.attention_copies + layer.dense_copies for layer in layers)
    alive = _kept(activations) | {"gradients": states.resident_gradients, "buckets": states.resident_bucket}
    before_norm = alive["activations: other"] - activations.final_norm - activations.hidden
    dispatch = max(layer.expert_dispatch for layer in layers)
    yield Peak(
        "experts",
        alive
        | {
            "activations: other": before_norm,
            "gathered parameters": cast + gathered.decoder_end,
            "all-to-all buffers": 3 * dispatch,
        },
    )
    yield Peak(
        "gathering",
        alive
        | {
            "activations: feed-forward": alive["activations: feed-forward"] - layers[-1].kept_feed_forward,
            "activations: other": before_norm,
            "gathered parameters": cast + gathered.highest,
        },
    )
    yield Peak("decoder end", alive | {"gathered parameters": cast + gathered.decoder_end})
    yield Peak("loss", alive | {"gathered parameters": cast + gathered.head, "logits and loss": activations.loss})
    leaving = alive | {
        # The hidden states themselves are needed no more.
        "activations: other": alive["activations: other"] - activations.hidden,
        "buckets": max(states.resident_bucket, 0 if gradients.tied else states.early_bucket),
        "gathered parameters": gathered.backward + sum(layer.kept_copies for layer in layers),
    }
    yield Peak(
        "head weight",
        leaving
        | {
            "gradients": states.resident_gradients + gradients.head,
            "logits and loss": activations.head_backward // 2,
        },
    )
    yield Peak(
        "head input",
        leaving
        | {
            "gradients": states.resident_gradients + gradients.waiting,
            "logits and loss": activations.head_backward,
        },
    )


def decoder_end(activations: ActivationBytes, gathered: Gathered) -> int:
    """Bytes that the decoder's forward pass leaves: activations, cast weights, and what ZeRO-3 has gathered."""
    experts = sum(layer.expert_copies for layer in activations.layers if not layer.feed_forward_anew)
    cast = experts + sum(layer.attention_copies + layer.dense_copies for layer in activations.layers)
    return sum(_kept(activations).values()) + cast + gathered.decoder_end


def backward_peaks(
    states: StateBytes, activations: ActivationBytes, gathered: Gathered, gradients: GrowingGradients
) -> Iterator[Peak]:
    """In their order."""
    alive = _kept(activations)
    alive["activations: other"] -= activations.hidden
    grown = states.resident_gradients + gradients.waiting
    cast = gathered.decoder + sum(layer.kept_copies for layer in activations.layers)
    early = max(states.resident_bucket, states.early_bucket)
    yield Peak(
        "final norm",
        alive
        | {
            "gradients": grown,
            "buckets": early,
            "gathered parameters": cast,
            # The norm's own output is let go while its gradients are made.
            "activation gradients": activations.norm_backward - activations.normalized,
        },
    )
    alive["activations: other"] -= activations.final_norm
    for number, layer in reversed(list(enumerate(activations.layers))):
        made = {"buckets": early, "gathered parameters": cast + layer.made_copies}
        yield Peak(
            "feed-forward",
            alive
            | made
            | {
                "gradients": grown + gradients.last_matrix[number],
                "activations: recomputed": layer.made_feed_forward,
                "activation gradients": layer.feed_forward_gradients,
                "all-to-all buffers": layer.expert_dispatch,
            },
            number,
        )
        alive = _without_feed_forward(alive, layer)
        yield Peak(
            "attention",
            alive
            | made
            | {
                "gradients": grown + gradients.block[number],
                "activations: recomputed": layer.made_attention,
                "activation gradients": layer.attention_gradients,
            },
            number,
        )
        alive = _without_attention(alive, layer)
        grown += gradients.block[number]
        cast -= layer.kept_copies
    ends = {"activations: other": activations.rotary + activations.hidden}
    yield Peak("reduction", ends | {"gradients": states.reduced_gradients, "buckets": states.bucket + states.flattened})
    yield Peak("end", ends | {"gradients": states.gradients, "buckets": states.bucket})


def _kept(activations: ActivationBytes) -> Parts:
    return {
        "activations: attention": activations.attention,
        "activations: feed-forward": activations.feed_forward,
        "activations: other": activations.other,
    }


def _without_feed_forward(alive: Parts, layer: LayerBytes) -> Parts:
    norm = 0 if layer.feed_forward_anew else layer.norm
    return alive | {
        "activations: feed-forward": alive["activations: feed-forward"] - layer.kept_feed_forward,
        "activations: other": alive["activations: other"] - norm,
    }


def _without_attention(alive: Parts, layer: LayerBytes) -> Parts:
    """And without the block's own input."""
    left = layer.kept_other - (0 if layer.feed_forward_anew else layer.norm)
    return alive | {
        "activations: attention": alive["activations: attention"] - layer.kept_attention,
        "activations: other": alive["activations: other"] - left,
    }
