"""Parameters, memory and FLOPs of a run, by arithmetic: no torch, no GPU, an answer at once."""

from lumina_ds.plan.flops import flops_per_token
from lumina_ds.plan.memory import MemoryPlan, plan_memory
from lumina_ds.plan.parameters import ParameterCounts, count_parameters

__all__ = ["MemoryPlan", "ParameterCounts", "count_parameters", "flops_per_token", "plan_memory"]
