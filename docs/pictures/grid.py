"""ZeRO and expert parallelism: what each of eight ranks holds, from the planner's groups and bytes."""

from __future__ import annotations

from canvas import GROUPS, LINE, MUTED, PADDING, WIDTH, Canvas

from lumina_ds.config.load import Override, load_config
from lumina_ds.plan.memory import plan_memory
from lumina_ds.plan.states import OptimizerGroup, optimizer_groups

PRESET = "m70_memory"
RANKS = 8
EXPERT_PARALLEL = 4
ZERO = 2
MARGIN = 16
COLUMN = (WIDTH - 2 * MARGIN) / RANKS
OTHERS = ("#dfe3e8", "#8a949e")


def draw() -> str:
    """The whole picture."""
    overrides = [
        Override("deepspeed.zero_stage", ZERO, "--zero"),
        Override("deepspeed.expert_parallel_size", EXPERT_PARALLEL, "--expert-parallel"),
    ]
    config = load_config(PRESET, overrides).config
    groups = optimizer_groups(config.model, RANKS, EXPERT_PARALLEL)
    experts = next(group for group in groups if group.name == "experts")
    others = next(group for group in groups if group.name == "decay")
    held = config.model.num_experts // EXPERT_PARALLEL
    canvas = Canvas(
        f"ZeRO-{ZERO} with expert parallelism {EXPERT_PARALLEL} on {RANKS} ranks",
        "Each rank holds the whole of the parameters that are no experts, its share of the experts, and partitions of the "
        "gradients and optimizer states of both.",
    )
    canvas.text(MARGIN, 26, f"{PRESET}: ZeRO-{ZERO}, expert parallelism {EXPERT_PARALLEL}, {RANKS} ranks", bold=True)
    y = _rank_heads(canvas, 40)
    y = _row(canvas, y, "weights without experts: all of them on every rank")
    for rank in range(RANKS):
        _cell(canvas, rank, y, 26, OTHERS)
    y = _row(canvas, y + 26, f"weights of the {config.model.num_experts} experts of a layer: {held} on each rank")
    for rank in range(RANKS):
        _cell(canvas, rank, y, 30, GROUPS[_share(rank)])
        numbers = range(_share(rank) * held, (_share(rank) + 1) * held)
        canvas.text(_middle(rank), y + 20, " ".join(map(str, numbers)), anchor="middle")
    size = others.data_parallel_size
    y = _row(canvas, y + 30, f"gradients and optimizer states without experts: 1/{size} each")
    _partitions(canvas, y, others, [OTHERS] * RANKS, list(range(RANKS)))
    size = experts.data_parallel_size
    y = _row(canvas, y + 30, f"gradients and optimizer states of its experts: 1/{size} each")
    _partitions(canvas, y, experts, [GROUPS[_share(rank)] for rank in range(RANKS)], [_copy(r) for r in range(RANKS)])
    y = _row(canvas, y + 30, "expert-parallel groups exchange tokens in every layer")
    for first in range(0, RANKS, EXPERT_PARALLEL):
        left, right = MARGIN + first * COLUMN + 3, MARGIN + (first + EXPERT_PARALLEL) * COLUMN - 3
        canvas.rect(left, y, right - left, 26, ("#ffffff", MUTED), 13)
        canvas.text((left + right) / 2, y + 18, f"ranks {first} to {first + EXPERT_PARALLEL - 1}", anchor="middle")
    plan = plan_memory(config, RANKS, "bf16")
    total = sum(plan.states.values()) / 2**20
    _row(canvas, y + 26, f"planned for each rank in bf16: {total:.0f} MiB of all these")
    return canvas.svg()


def _share(rank: int) -> int:
    """Which share of the experts a rank has: neighbours form an expert-parallel group."""
    return rank % EXPERT_PARALLEL


def _copy(rank: int) -> int:
    """Which of the ranks with the same experts it is."""
    return rank // EXPERT_PARALLEL


def _middle(rank: int) -> float:
    return MARGIN + (rank + 0.5) * COLUMN


def _rank_heads(canvas: Canvas, y: float) -> float:
    for rank in range(RANKS):
        canvas.text(_middle(rank), y + 14, f"rank {rank}", size=12.5, anchor="middle", colour=MUTED)
    canvas.line(MARGIN, y + 22, WIDTH - MARGIN, y + 22, LINE)
    return y + 18


def _row(canvas: Canvas, y: float, text: str) -> float:
    canvas.text(MARGIN, y + 26, text)
    return y + 34


def _cell(canvas: Canvas, rank: int, y: float, height: float, colours: tuple[str, str]) -> None:
    canvas.rect(MARGIN + rank * COLUMN + 3, y, COLUMN - 6, height, colours)


def _partitions(
    canvas: Canvas, y: float, group: OptimizerGroup, colours: list[tuple[str, str]], places: list[int]
) -> None:
    """A box for the group's states as a whole, of which a rank has the part at its place."""
    parts = group.data_parallel_size
    height = 30 / parts
    for rank in range(RANKS):
        _cell(canvas, rank, y, 30, PADDING)
        canvas.rect(MARGIN + rank * COLUMN + 3, y + places[rank] * height, COLUMN - 6, height, colours[rank], 0)
