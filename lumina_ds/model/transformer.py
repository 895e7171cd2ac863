"""The decoder: embedding, blocks of attention and feed-forward or MoE, norm, head. Plain PyTorch.

Modules carry Hugging Face's names, so a checkpoint maps one to one onto Llama, Qwen3, Mixtral,
Qwen3-MoE or GLM-4-MoE (export/hugging_face.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lumina_ds.config.schema import ModelConfig
from lumina_ds.model.attention import Attention, LayerCache
from lumina_ds.model.attention_backends import DocumentLayout
from lumina_ds.model.feed_forward import RMSNorm, SwiGLU
from lumina_ds.model.kernels import PLAIN, Kernels
from lumina_ds.model.loss import LanguageHead
from lumina_ds.model.moe import MoE
from lumina_ds.model.rope import rotary_tables
from lumina_ds.model.router import RoutingContext

RouterOutput = tuple[Tensor, Tensor, Tensor]


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(
        self, config: ModelConfig, layer: int, backend: str, recomputed: str = "none", kernels: Kernels = PLAIN
    ) -> None:
        """`recomputed` names what the backward pass computes anew: none, full, attention, or experts."""
        super().__init__()
        self.recomputed = recomputed
        self.is_moe = config.is_moe_layer(layer)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels.rms_norm)
        self.self_attn = Attention(config, backend, kernels)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels.rms_norm)
        if self.is_moe:
            self.mlp: nn.Module = MoE(config, layer, kernels)
        else:
            assert config.intermediate_size is not None
            self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, kernels.swiglu)

    def forward(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
        documents: DocumentLayout | None,
        routing: RoutingContext,
        cache: LayerCache | None,
    ) -> tuple[Tensor, RouterOutput | None]:
        """The new residual stream and, for an MoE block, what its router measured.

        Router losses are returned, not kept on the side: as outputs of the block they stay right under
        activation checkpointing, where the block runs twice.
        """
        if self.recomputed == "full" and torch.is_grad_enabled():
            return checkpoint(self._forward, x_BSD, rotary, documents, routing, cache, use_reentrant=False)
        return self._forward(x_BSD, rotary, documents, routing, cache)

    def _forward(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
        documents: DocumentLayout | None,
        routing: RoutingContext,
        cache: LayerCache | None,
    ) -> tuple[Tensor, RouterOutput | None]:
        attention, feed_forward = self._attention, self._feed_forward
        if torch.is_grad_enabled():
            if self.recomputed == "attention":
                attention = partial(checkpoint, attention, use_reentrant=False)
            elif self.recomputed == "experts":
                feed_forward = partial(checkpoint, feed_forward, use_reentrant=False)
        return feed_forward(attention(x_BSD, rotary, documents, cache), routing)

    def _attention(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
        documents: DocumentLayout | None,
        cache: LayerCache | None,
    ) -> Tensor:
        return x_BSD + self.self_attn(self.input_layernorm(x_BSD), rotary, documents, cache)

    def _feed_forward(self, x_BSD: Tensor, routing: RoutingContext) -> tuple[Tensor, RouterOutput | None]:
        normed_BSD = self.post_attention_layernorm(x_BSD)
        if not self.is_moe:
            return x_BSD + self.mlp(normed_BSD), None
        router: Any = self.mlp.router
        router.context = routing
        device = normed_BSD.device.type
        if torch.is_autocast_enabled(device):
            # Autocast does not know the grouped product of the experts, which follows its input's type.
            normed_BSD = normed_BSD.to(torch.get_autocast_dtype(device))
        try:
            x_BSD = x_BSD + self.mlp(normed_BSD)
            measured = router.statistics
        finally:
            # Recomputation leaves by an exception once it has what the backward needs; what the router measured would
            # then keep the recomputed block alive until the next step.
            router.statistics = None
        return x_BSD, (measured.balance_loss, measured.z_loss, measured.measured)


class Decoder(nn.Module):
    """Token ids [B, S] to normed hidden states [B, S, D]."""

    def __init__(
        self,
        config: ModelConfig,
        backend: str,
        activation_checkpointing: str = "none",
        checkpoint_interval: int = 1,
        kernels: Kernels = PLAIN,
    ) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, layer, backend, "none" if layer % checkpoint_interval else activation_checkpointing, kernels)
            for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels.rms_norm)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        documents: DocumentLayout | None = None,
        padding_mask: Tensor | None = None,
        caches: Sequence[LayerCache] | None = None,
        row_seeds: tuple[int, ...] | None = None,
    ) -> tuple[Tensor, list[RouterOutput]]:
        x_BSD = self.embed_tokens(input_ids)
        rotary = rotary_tables(position_ids, self.config.attention_head_dim, self.config.rope_theta)
        routing = routing_context(self.config, input_ids, documents, padding_mask, row_seeds)
        router_outputs: list[RouterOutput] = []
        for layer, block in enumerate(self.layers):
            cache = None if caches is None else caches[layer]
            x_BSD, measured = block(x_BSD, rotary, documents, routing, cache)
            if measured is not None:
                router_outputs.append(measured)
        return self.norm(x_BSD), router_outputs


class CausalLM(nn.Module):
    """The language model; `forward` gives logits, or the parts of a training step's loss."""

    def __init__(
        self,
        config: ModelConfig,
        backend: str = "sdpa",
        activation_checkpointing: str = "none",
        checkpoint_interval: int = 1,
        loss_chunk_tokens: int | None = None,
        kernels: Kernels = PLAIN,
    ) -> None:
        """`activation_checkpointing` (none, full, attention, experts) holds for every `checkpoint_interval`-th block."""
        super().__init__()
        self.config = config
        self.model = Decoder(config, backend, activation_checkpointing, checkpoint_interval, kernels)
        self.lm_head = LanguageHead(config.hidden_size, config.vocab_size, loss_chunk_tokens, kernels.cross_entropy)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        documents: DocumentLayout | None = None,
        labels: Tensor | None = None,
        padding_mask: Tensor | None = None,
        caches: Sequence[LayerCache] | None = None,
        row_seeds: tuple[int, ...] | None = None,
        row_groups: Tensor | None = None,
        num_groups: int = 0,
    ) -> Tensor | tuple[Tensor, ...]:
        """Logits [B, S, V] without labels; with labels [B, S] (-100: not trained) a tuple of

        summed negative log-likelihood (fp32 scalar), load-balancing loss and router z-loss (sums over real tokens,
        means over the MoE layers), and what the routers measured [MoE layers, 2E + 4]. One forward serves both so
        that DeepSpeed's hooks, which sit on it, see every use. `row_seeds`, one per row, give the routers' noise in
        training. With `row_groups` [B], a number below `num_groups` for every row with labels, the first sum of each
        group, fp64 [groups] without a gradient, follows the four.
        """
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        hidden_BSD, router_outputs = self.model(input_ids, position_ids, documents, padding_mask, caches, row_seeds)
        if labels is None:
            return self.lm_head(hidden_BSD)
        by_group: tuple[Tensor, ...] = ()
        if row_groups is None:
            loss = self.lm_head(hidden_BSD, labels)
        else:
            loss, *by_group = self.lm_head(hidden_BSD, labels, row_groups, num_groups)
        if not router_outputs:
            zero = loss.new_zeros(())
            return loss, zero, zero, loss.new_zeros((0, 0)), *by_group
        balance, z_loss, measured = (torch.stack(parts) for parts in zip(*router_outputs, strict=True))
        return loss, balance.mean(), z_loss.mean(), measured, *by_group


def routing_context(
    config: ModelConfig,
    input_ids: Tensor,
    documents: DocumentLayout | None,
    padding_mask: Tensor | None,
    row_seeds: tuple[int, ...] | None,
) -> RoutingContext:
    """What the routers of one forward pass share; documents are numbered only where their loss asks for it."""
    token_mask_T = None if padding_mask is None else padding_mask.flatten()
    if not config.num_experts or config.router_aux_loss_scope != "sequence":
        return RoutingContext(token_mask_T, row_seeds=row_seeds)
    rows, length = input_ids.shape
    lengths = torch.tensor((length,) * rows if documents is None else documents.lengths)
    # Numbered on the host, where the lengths are: the device would have to be asked how long the result is.
    document_T = torch.arange(len(lengths)).repeat_interleave(lengths).to(input_ids.device, non_blocking=True)
    return RoutingContext(token_mask_T, document_T, len(lengths), row_seeds)
