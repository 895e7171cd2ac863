"""The cheapest layout that fits a card, and the micro-batch and accumulation that reach a global batch with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lumina_ds.config.optimizers import OPTIMIZERS
from lumina_ds.config.schema import RunConfig
from lumina_ds.errors import ConfigError
from lumina_ds.plan.communication import Communication, communication_bytes
from lumina_ds.plan.hardware import cards_that_fit
from lumina_ds.plan.layout import Composer, Fixed, Layout, apply_layout, layout_json, layouts
from lumina_ds.plan.memory import MemoryPlan, plan_memory
from lumina_ds.plan.parameters import count_parameters
from lumina_ds.plan.shape import PARAMETER_BYTES
from lumina_ds.plan.states import ZeroSettings, optimizer_groups
from lumina_ds.text import counted, format_bytes

# An expert's matrix products are bound by computation from about this many rows on.
_ROWS_PER_EXPERT = 512
_MAX_MICRO_BATCH = 256
_LAST_RESORTS = 12

Batch = tuple[int, int]


@dataclass(frozen=True)
class Choice:
    """One layout with its batch, the memory it takes and what it communicates in a step."""

    layout: Layout
    config: RunConfig
    plan: MemoryPlan
    communication: Communication
    deepspeed_json: Mapping[str, Any]

    @property
    def tokens_per_step(self) -> int:
        plan = self.plan
        return plan.micro_batch_size * plan.gradient_accumulation_steps * plan.world_size * plan.seq_length


@dataclass(frozen=True)
class SearchResult:
    """`choice` is None when nothing fits; then `smallest` is the layout that came closest. `binding` names what
    limits the micro-batch, `advice` what to change next."""

    choice: Choice | None
    smallest: Choice
    num_tried: int
    binding: str
    advice: list[str] = field(default_factory=list)


def find_cheapest(
    config: RunConfig,
    world_size: int,
    precision: str,
    limit_bytes: int,
    gpus_per_node: int | None = None,
    fixed: Fixed | None = None,
    global_batch_tokens: int | None = None,
    composer: Composer | None = None,
) -> SearchResult:
    """The first layout, in the order of cost, whose peak is at most `limit_bytes` on each of `world_size` GPUs.

    With `global_batch_tokens` micro-batch and accumulation are solved for it (within 2 %, or to whole rows per GPU);
    without, they stay as configured. `composer` is one that has composed layouts of the run already. Raises
    ConfigError where no layout can run at all.
    """
    batches = _batches(config, world_size, global_batch_tokens)
    composer = composer or Composer(config, precision)
    search = _Search(config, world_size, precision, limit_bytes, batches, composer)
    options = list(layouts(config, world_size, gpus_per_node or world_size, precision, fixed or Fixed()))
    tried, hopeless = [], []
    refusal: ConfigError | None = None
    for place, layout in enumerate(options, start=1):
        if search.floor_bytes(layout) > limit_bytes:
            hopeless.append(layout)
            continue
        try:
            first = search.choice(layout, batches[0])
        except ConfigError as error:
            refusal = error
            continue
        tried.append(first)
        if first.plan.peak_bytes <= limit_bytes:
            choice = search.largest_batch(first)
            binding = search.binding(choice, solved=global_batch_tokens is not None)
            return SearchResult(choice, choice, place, binding, search.advice(choice, options[place:]))
    # The most thorough savings come last.
    for layout in hopeless[-_LAST_RESORTS:]:
        try:
            tried.append(search.choice(layout, batches[0]))
        except ConfigError as error:
            refusal = error
    if not tried:
        raise refusal or ConfigError("no layout is left to try; give fewer of --zero, --expert-parallel and --offload")
    smallest = min(tried, key=lambda choice: choice.plan.peak_bytes)
    return SearchResult(None, smallest, len(options), *search.nothing_fits(smallest))


def _batches(config: RunConfig, world_size: int, tokens: int | None) -> list[Batch]:
    """(micro-batch, accumulation) whose step holds `tokens` within 2 %, smallest micro-batch first."""
    if tokens is None:
        return [(config.train.micro_batch_size, config.train.gradient_accumulation_steps)]
    row = config.seq_length * world_size
    if tokens < row:
        raise ConfigError(
            f"--global-batch-tokens {tokens} is below one row of {config.seq_length} tokens on each of {counted(world_size, 'GPU')}; "
            f"use at least {row}, fewer GPUs, or a shorter --seq-length"
        )
    rows = tokens / row
    found = []
    for micro_batch in range(1, min(round(rows), _MAX_MICRO_BATCH) + 1):
        accumulation = round(rows / micro_batch)
        if abs(micro_batch * accumulation - rows) <= 0.02 * rows or micro_batch == 1:
            found.append((micro_batch, accumulation))
    return found


@dataclass(frozen=True)
class _Search:
    """One run on one number of GPUs, with the batches that it may have and the bytes that a GPU gives."""

    config: RunConfig
    world_size: int
    precision: str
    limit: int
    batches: list[Batch]
    composer: Composer

    def floor_bytes(self, layout: Layout) -> int:
        """Parameters and optimizer states alone, without padding: no plan of this layout is below it."""
        if layout.zero_stage is None or self.config.deepspeed.config is not None:
            # The file may offload what would lie on the GPU.
            return 0
        counts = count_parameters(self.config.model)
        width, size = PARAMETER_BYTES[self.precision], layout.expert_parallel_size
        held = counts.total - counts.experts + counts.experts // size
        share = counts.total // self.world_size
        optimizer = OPTIMIZERS[self.config.train.optimizer]
        # Muon's momentum is narrower than Adam's moments, by how much depends on the layout.
        width_of_states = 4 if optimizer.own_kinds else 4 + optimizer.moment_bytes
        states = width_of_states * share if layout.offload == "none" else 0
        if layout.zero_stage == 0:
            return (width + optimizer.moment_bytes) * held
        return states + (width * held if layout.zero_stage < 3 else 0 if "params" in layout.offload else width * share)

    def choice(self, layout: Layout, batch: Batch, factor: int = 1) -> Choice:
        """Plan a layout with a batch, on `factor` times as many GPUs."""
        micro_batch, accumulation = batch
        world_size = factor * self.world_size
        run = apply_layout(self.config, layout, micro_batch, accumulation)
        json = layout_json(run, layout, world_size, self.composer)
        plan = plan_memory(run, world_size, self.precision, deepspeed_json=json)
        experts = layout.expert_parallel_size
        communication = communication_bytes(
            run.model,
            optimizer_groups(run.model, world_size, experts, run.train.optimizer),
            ZeroSettings.from_json(json, PARAMETER_BYTES[self.precision]),
            PARAMETER_BYTES[self.precision],
            micro_batch * run.seq_length,
            accumulation,
            experts,
            layout.activation_checkpointing in ("full", "experts"),
            4 if self.precision == "fp32" else 2,
        )
        return Choice(layout, run, plan, communication, json)

    def fits(self, choice: Choice) -> bool:
        return choice.plan.peak_bytes <= self.limit

    def largest_batch(self, first: Choice) -> Choice:
        """`first` with the largest micro-batch that fits."""
        best = first
        for batch in self.batches[1:]:
            larger = self.choice(first.layout, batch)
            if not self.fits(larger):
                break
            best = larger
        return best

    def larger_batch(self, choice: Choice) -> Batch | None:
        """The next batch above that of `choice`."""
        return next((batch for batch in self.batches if batch[0] > choice.plan.micro_batch_size), None)

    def binding(self, choice: Choice, solved: bool) -> str:
        """What limits the micro-batch of `choice`."""
        above = self.larger_batch(choice)
        if above is None and not solved:
            return "micro-batch and accumulation are as configured; --global-batch-tokens solves for them"
        if above is None and choice.plan.gradient_accumulation_steps == 1:
            rows = choice.plan.micro_batch_size
            fit = "the only row of a GPU fits" if rows == 1 else f"all {rows} rows of a GPU fit"
            return f"the token budget: {fit} one micro-batch"
        if above is None:
            return "the token budget: no larger micro-batch comes within 2 % of it"
        larger = self.choice(choice.layout, above)
        return (
            f"memory: a micro-batch of {above[0]} peaks at {format_bytes(larger.plan.peak_bytes)} in "
            f"{larger.plan.peak_phase}, and the card has {format_bytes(self.limit)}"
        )

    def advice(self, choice: Choice, dearer: list[Layout]) -> list[str]:
        """What gives the next larger micro-batch, and whether the experts have enough to do."""
        advice: list[str] = []
        larger = self.larger_batch(choice)
        for layout in dearer if larger else []:
            # Offload for a larger micro-batch alone costs more than it brings.
            if layout.offload != choice.layout.offload or self.floor_bytes(layout) > self.limit:
                continue
            assert larger is not None
            if self.fits(self.choice(layout, larger)):
                advice.append(f"a micro-batch of {larger[0]} fits with {layout.label}")
                break
        advice += self._less_communication(choice, dearer)
        model, size = self.config.model, choice.layout.expert_parallel_size
        if model.num_experts:
            tokens = choice.plan.micro_batch_size * self.config.seq_length * model.num_experts_per_tok * size
            if tokens / model.num_experts < _ROWS_PER_EXPERT:
                advice.append(
                    f"an expert sees {counted(tokens // model.num_experts, 'row')} of a micro-batch, and {_ROWS_PER_EXPERT} keep "
                    "a GPU busy: a larger micro-batch or more expert parallelism"
                )
        return advice

    def _less_communication(self, choice: Choice, dearer: list[Layout]) -> list[str]:
        """Expert parallelism also keeps experts from being gathered and reduced over all ranks: at ZeRO-3 a lot."""
        batch = (choice.plan.micro_batch_size, choice.plan.gradient_accumulation_steps)
        own = choice.layout
        others = [layout for layout in dearer if replace(layout, expert_parallel_size=own.expert_parallel_size) == own]
        fitting = [other for layout in others if self.fits(other := self.choice(layout, batch))]
        best = min(fitting, key=lambda other: other.communication.network_bytes, default=None)
        sent = choice.communication.network_bytes
        if best is None or best.communication.network_bytes > 0.7 * sent:
            return []
        return [
            f"{format_bytes(best.communication.network_bytes)} instead of {format_bytes(sent)} between the GPUs: "
            f"{best.layout.label}"
        ]

    def nothing_fits(self, smallest: Choice) -> tuple[str, list[str]]:
        """(what is too large, what to change) where no layout fits."""
        plan = smallest.plan
        component, size = max(plan.breakdown.items(), key=lambda item: item[1])
        binding = (
            f"memory: the smallest layout ({smallest.layout.label}) peaks at {format_bytes(plan.peak_bytes)} in "
            f"{plan.peak_phase}, {format_bytes(size)} of it {component}, and the card has {format_bytes(self.limit)}"
        )
        advice = []
        cards = cards_that_fit(plan.peak_bytes)
        if cards:
            advice.append(f"cards of {cards[0].label} hold it")
        batch = (plan.micro_batch_size, plan.gradient_accumulation_steps)
        for factor in (2, 4, 8, 16, 32):
            if self.fits(self.choice(smallest.layout, batch, factor)):
                advice.append(f"{self.world_size * factor} GPUs of this size hold it")
                break
        if plan.micro_batch_size > 1:
            advice.append("a smaller --micro-batch, or --global-batch-tokens, which solves for it")
        if component.startswith(("activations", "logits")) and plan.seq_length > 512:
            advice.append(f"a --seq-length below {plan.seq_length} lowers {component}")
        return binding, advice
