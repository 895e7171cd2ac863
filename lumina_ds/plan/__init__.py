"""Parameters, memory, communication and FLOPs of a run, by arithmetic: no torch, no GPU, an answer at once.

Everything here takes a RunConfig (lumina_ds.config.load.load_config) and returns frozen dataclasses.
"""

from lumina_ds.plan.calibration import Calibration, read_calibration, write_calibration
from lumina_ds.plan.communication import Communication
from lumina_ds.plan.duration import CheckpointBytes, TimePlan, checkpoint_bytes, plan_time
from lumina_ds.plan.explain import Explanation, explain
from lumina_ds.plan.flops import flops_per_token
from lumina_ds.plan.hardware import GPUS, Card, Gpu, cards, cards_that_fit, find_gpu
from lumina_ds.plan.layout import Fixed, Layout
from lumina_ds.plan.memory import MemoryPlan, plan_memory
from lumina_ds.plan.parameters import ParameterCounts, count_parameters
from lumina_ds.plan.search import Choice, SearchResult, find_cheapest

__all__ = [
    "GPUS",
    "Calibration",
    "Card",
    "CheckpointBytes",
    "Choice",
    "Communication",
    "Explanation",
    "Fixed",
    "Gpu",
    "Layout",
    "MemoryPlan",
    "ParameterCounts",
    "SearchResult",
    "TimePlan",
    "cards",
    "cards_that_fit",
    "checkpoint_bytes",
    "count_parameters",
    "explain",
    "find_cheapest",
    "find_gpu",
    "flops_per_token",
    "plan_memory",
    "plan_time",
    "read_calibration",
    "write_calibration",
]
