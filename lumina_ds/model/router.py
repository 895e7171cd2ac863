"""The router: which experts a token visits, with what weights, and what that costs in balance.

One class serves the plain model and DeepSpeed's AutoEP layers (engine/deepspeed/expert_parallel.py), so that every policy is
the same in both. Scores, losses and the choice are fp32. What the router learns outside the optimizer (selection
bias, last step's load, dynamic capacity) is the state of balancing.py.

Shape suffixes: T tokens, D width, E experts, K experts per token, N documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumina_ds.config.router_scores import ROUTER_SCORES
from lumina_ds.config.schema import ModelConfig
from lumina_ds.model.graph_breaks import outside_graphs
from lumina_ds.model.placement import UNPLACED, expert_capacity, fill_unplaced, place

# State that a resumed run needs and inference does not.
TRAINING_STATE = ("load", "capacity_factor")
# Added to the choice of an expert that dropout leaves out; above any score and bias.
_LEFT_OUT = -1e4


@dataclass(frozen=True)
class RoutingContext:
    """What a micro-batch's routers know about its tokens beside their vectors.

    token_mask [T]: False where padding stands. document_T [T]: number of each token's document, below
    `num_documents`; padding may have one of its own. row_seeds: one per row of the batch, for the noise of training.
    """

    token_mask: Tensor | None = None
    document_T: Tensor | None = None
    num_documents: int = 1
    row_seeds: tuple[int, ...] | None = None


@dataclass
class RouterStatistics:
    """What one forward pass of one router leaves behind, fp32; sums are over real tokens, not means.

    balance_loss, z_loss: differentiable scalars, for each token what its loss would be, summed: whoever divides by
    the tokens of the whole step gets the same loss however the step is cut into micro-batches.
    measured [2E + 4]: see MEASURED.
    """

    balance_loss: Tensor
    z_loss: Tensor
    measured: Tensor


# The columns of RouterStatistics.measured after the E assignments per expert (choices before any drop) and the E sums
# of probabilities: sum of the tokens' entropy in nats, places dropped, places rerouted, tokens.
MEASURED = ("entropy", "dropped", "rerouted", "tokens")


class RouterGate(nn.Linear):
    """The routing matrix [E, D], multiplied in fp32: bf16 logits tie and flip the choice of experts."""

    def forward(self, x: Tensor) -> Tensor:
        # Autocast would turn the product back into bf16.
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float())


class Router(nn.Module):
    """Top-k choice; dropless, or with a capacity per expert whose overflow is dropped or rerouted.

    Capacity, jitter and expert dropout are for training alone: in eval mode every token reaches its own choice, so
    an evaluation does not depend on what stands beside a token in its batch.
    """

    # Set by configure(), also on routers that AutoEP built.
    config: ModelConfig
    layer: int
    context: RoutingContext
    statistics: RouterStatistics | None

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__()
        self.gate = RouterGate(config.hidden_size, config.num_experts, bias=False)
        self.configure(config, layer)

    def configure(self, config: ModelConfig, layer: int, device: torch.device | None = None) -> None:
        """Take the settings, and register the state that they need, at its start values."""
        self.config, self.layer = config, layer
        self.context, self.statistics = RoutingContext(), None
        for name, value in initial_state(config).items():
            # AutoEP's own router has a plain attribute of one of these names.
            self.__dict__.pop(name, None)
            self.register_buffer(name, value.to(device))

    @property
    def weight(self) -> Tensor:
        """The gate's weight, under the name by which AutoEP looks for it."""
        return self.gate.weight

    def state(self, name: str) -> Tensor | None:
        """A tensor of the state by its name; None when the configuration has no use for it."""
        return self._buffers.get(name)

    def _apply(self, fn: Any, recurse: bool = True) -> Router:
        """Move with the model but stay fp32: a bf16 bias could not take its small steps."""
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self._buffers[name]
            if after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Whole weights leave out what only training needs (consolidate.py); it then keeps its values."""
        state_dict = dict(state_dict)
        for name in TRAINING_STATE:
            if (value := self.state(name)) is not None:
                state_dict.setdefault(prefix + name, value)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(self, x_TD: Tensor, expert_bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Weights [T, K] in fp32, expert indices [T, K], and assignments per expert [E] in int32.

        The contract, and the unused `expert_bias`, are those of deepspeed/moe/ep_router.py, TokenChoiceTopKRouter:
        every one of the T * K places names an expert, so what is dropped, and padding, has a weight of zero.
        """
        config, context = self.config, self.context
        seeds = context.row_seeds if self.training else None
        logits_TE = self.gate(x_TD if seeds is None else self._jittered(x_TD, seeds))
        scores_TE = ROUTER_SCORES[config.scoring_func].function(logits_TE)
        with torch.no_grad():
            choice_TE = scores_TE.detach()
            bias_E = self.state("e_score_correction_bias")
            choice_TE = choice_TE if bias_E is None else choice_TE + bias_E
            if seeds is not None and config.expert_dropout:
                choice_TE = choice_TE + _LEFT_OUT * self._left_out(choice_TE, seeds)
            chosen_TK, placed_TK, indices_TK = self._choose(choice_TE)
        weights_TK = self._weights(scores_TE, chosen_TK, placed_TK)
        self.statistics = self._measure(logits_TE, scores_TE, chosen_TK, placed_TK)
        return weights_TK, indices_TK, count_assignments(indices_TK, logits_TE.shape[1])

    def _choose(self, choice_TE: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """The tokens' own choice; what they get of it or instead, UNPLACED where nothing, None when they get just
        that; and the expert that computes each place."""
        config, top_k = self.config, self.config.num_experts_per_tok
        mask_T, num_experts = self.context.token_mask, choice_TE.shape[1]
        limited = self.training and config.overflow_policy != "dropless"
        if not limited:
            chosen_TK = choice_TE.topk(top_k, dim=-1).indices
            if mask_T is None:
                return chosen_TK, None, chosen_TK
            placed_TK = chosen_TK.masked_fill(~mask_T.unsqueeze(1), UNPLACED)
            return chosen_TK, placed_TK, fill_unplaced(placed_TK, num_experts)
        num_ranks = num_experts if config.overflow_policy == "reroute" else top_k
        preference_TR = choice_TE.topk(num_ranks, dim=-1).indices
        real_T = torch.ones(len(choice_TE), dtype=torch.bool, device=choice_TE.device) if mask_T is None else mask_T
        dynamic = self.state("capacity_factor")
        factor = config.capacity_factor if dynamic is None else dynamic
        capacity = expert_capacity(factor, real_T.sum(), top_k, num_experts)
        placed_TK = place(preference_TR, real_T, capacity, num_experts, top_k)
        return preference_TR[:, :top_k], placed_TK, fill_unplaced(placed_TK, num_experts)

    def _weights(self, scores_TE: Tensor, chosen_TK: Tensor, placed_TK: Tensor | None) -> Tensor:
        """Scores of the experts that a token gets, zero elsewhere.

        Normalised, they are shares of its own choice under drop (what is dropped is lost, as in GShard) and of what
        it got under reroute.
        """
        weights_TK = own_TK = scores_TE.gather(1, chosen_TK)
        if placed_TK is not None:
            weights_TK = scores_TE.gather(1, placed_TK.clamp(min=0)) * (placed_TK != UNPLACED)
        if not self.config.norm_topk_prob:
            return weights_TK
        total_T1 = (weights_TK if self.config.overflow_policy == "reroute" else own_TK).sum(dim=-1, keepdim=True)
        # A token that got nothing has no weights to normalise.
        return weights_TK / total_T1.clamp(min=1e-20)

    def _measure(
        self, logits_TE: Tensor, scores_TE: Tensor, chosen_TK: Tensor, placed_TK: Tensor | None
    ) -> RouterStatistics:
        context, config = self.context, self.config
        mask_T = context.token_mask
        real_T = logits_TE.new_ones(len(logits_TE)) if mask_T is None else mask_T.to(logits_TE.dtype)
        sums_to_one = ROUTER_SCORES[config.scoring_func].sums_to_one
        probability_TE = scores_TE if sums_to_one else scores_TE / scores_TE.sum(-1, keepdim=True)
        chosen_TE = torch.zeros_like(scores_TE).scatter_(1, chosen_TK, 1.0) * real_T.unsqueeze(1)
        balance = balance_loss(
            probability_TE * real_T.unsqueeze(1), chosen_TE, config.router_aux_loss_scope, self.state("load"), context
        )
        z_loss = (real_T * logits_TE.logsumexp(dim=-1).square()).sum()
        with torch.no_grad():
            num_tokens = real_T.sum()
            entropy = -(real_T @ torch.special.xlogy(probability_TE, probability_TE).sum(-1))
            dropped = rerouted = torch.zeros_like(num_tokens)
            if placed_TK is not None:
                is_placed_TK = placed_TK != UNPLACED
                kept = (chosen_TE.gather(1, placed_TK.clamp(min=0)) * is_placed_TK).sum()
                dropped = num_tokens * chosen_TK.shape[1] - is_placed_TK.sum()
                rerouted = is_placed_TK.sum() - kept
            scalars = torch.stack([entropy, dropped, rerouted, num_tokens])
            measured = torch.cat([chosen_TE.sum(0), real_T @ probability_TE, scalars])
        return RouterStatistics(balance, z_loss, measured)

    def _jittered(self, x_TD: Tensor, seeds: tuple[int, ...]) -> Tensor:
        """Multiplicative noise on the router's input (Switch, arXiv 2101.03961, appendix A.2)."""
        noise = self.config.router_jitter_noise
        return x_TD.float() * (1 + noise * (2 * uniform_by_row(x_TD, seeds, 2 * self.layer) - 1)) if noise else x_TD

    def _left_out(self, choice_TE: Tensor, seeds: tuple[int, ...]) -> Tensor:
        return uniform_by_row(choice_TE, seeds, 2 * self.layer + 1) < self.config.expert_dropout


@outside_graphs
def uniform_by_row(like: Tensor, seeds: tuple[int, ...], stream: int) -> Tensor:
    """Numbers in [0, 1) in fp32 of the shape of `like`, each row's a function of its seed and `stream` alone.

    Not drawn from the global generator: recomputed, resumed, or cut into other micro-batches, a row meets the same.
    """
    generator = torch.Generator(device=like.device)
    rows = []
    for seed in seeds:
        generator.manual_seed((seed + stream * 0x9E3779B97F4A7C15) % (1 << 63))
        shape = (len(like) // len(seeds), like.shape[1])
        rows.append(torch.rand(shape, generator=generator, device=like.device))
    return torch.cat(rows)


def balance_loss(
    probability_TE: Tensor, chosen_TE: Tensor, scope: str, step_load_E: Tensor | None, context: RoutingContext
) -> Tensor:
    """Load-balancing loss times the tokens it is over; 1 per token when balanced, up to E on collapse.

    E * sum_e f_e P_e (Switch, arXiv 2101.03961, eq. 4, with shares f over T*k assignments): P_e the mean probability,
    f_e the share of assignments, over the micro-batch; over each document by itself, weighted by its tokens
    (DeepSeek-V3, arXiv 2412.19437, eq. 17); or over the global batch (arXiv 2501.11873), where f_e is `step_load_E`,
    that of the step before: the one whose counts all ranks and micro-batches know without a further collective.
    Rows of both matrices are zero for padding.
    """
    num_experts = probability_TE.shape[1]
    if scope == "global_batch" and step_load_E is not None:
        return num_experts * (probability_TE.sum(0) @ step_load_E)
    chosen_NE, probability_NE = chosen_TE.sum(0, keepdim=True), probability_TE.sum(0, keepdim=True)
    if scope == "sequence" and context.document_T is not None:
        zeros_NE = probability_TE.new_zeros(context.num_documents, num_experts)
        chosen_NE = zeros_NE.index_add(0, context.document_T, chosen_TE)
        probability_NE = zeros_NE.index_add(0, context.document_T, probability_TE)
    share_NE = chosen_NE / chosen_NE.sum(-1, keepdim=True).clamp(min=1)
    return num_experts * (share_NE * probability_NE).sum()


def count_assignments(indices_TK: Tensor, num_experts: int) -> Tensor:
    """How often each expert was chosen, int32 [E]."""
    flat = indices_TK.reshape(-1)
    counts = torch.zeros(num_experts, dtype=torch.int32, device=flat.device)
    return counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))


def initial_state(config: ModelConfig) -> dict[str, Tensor]:
    """The state of one router by name, at its start values, fp32; only what the settings ask for."""
    state: dict[str, Tensor] = {}
    if config.router_bias_update_rate is not None:
        state["e_score_correction_bias"] = torch.zeros(config.num_experts)
    if config.router_aux_loss_coef and config.router_aux_loss_scope == "global_batch":
        state["load"] = torch.full((config.num_experts,), 1 / config.num_experts)
    if config.min_capacity_factor is not None:
        state["capacity_factor"] = torch.tensor(config.capacity_factor)
    return state
