"""Which numbers make sense in a DeepSpeed JSON: bounds that its models name, and those that its code takes for granted.

DeepSpeed checks few of them when it reads a file; a negative bucket or a step count of 0 shows as an error, or as a
wrong run, much later.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Numbers are counts, sizes, rates and thresholds, none of which is negative but these.
MAY_BE_NEGATIVE = frozenset(
    {
        "module_depth",  # -1: every depth
        "last_batch_iteration",  # -1: at the beginning
        "decay_lr_rate",
        "decay_mom_rate",
        "load_balance_coeff",
        "seed",
        "group_dim",
        "embedding_partition_dim",
    }
)
AT_LEAST_ONE = frozenset(
    {
        "reduce_bucket_size",
        "steps_per_print",
        "sequence_parallel_size",
        "data_parallel_size",
        "loss_scale_window",
        "hysteresis",
        "autoep_size",
        "expert_tensor_parallel_size",
        "top_k",
        "block_size",
        "queue_depth",
        "intra_op_parallelism",
        "profile_step",
        "top_modules",
        "max_out_tokens",
        "inference_tp_size",
        "total_num_steps",
        "cycle_first_step_size",
        "cycle_second_step_size",
        "lr_range_test_step_size",
        "samples_log_interval",
        "io_multiplier",
        "num_epochs",
        "num_bits",
        "q_groups",
        "group_size",
        "tp_size",
        "total_curriculum_step",
        "difficulty_step",
        "root_degree",
        "total_layer_num",
        "seq_per_step",
        "require_steps",
    }
)
# Shares and averages' factors.
AT_MOST_ONE = frozenset(
    {
        "ratio",
        "cpuadam_cores_perc",
        "topk_ratio",
        "auto_ratio",
        "pt_reserved_cores_perc",
        "warmup_min_ratio",
        "cos_min_ratio",
        "cycle_min_mom",
        "cycle_max_mom",
        "eps",
    }
)


def range_faults(section: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Every number at any depth that is out of its range, and factors of averages outside 0 to 1."""
    faults: list[str] = []
    for key, value in section.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            faults += range_faults(value, f"{path}.")
        elif key == "betas" and isinstance(value, list):
            wrong = [beta for beta in value if not isinstance(beta, (int, float)) or not 0 <= beta < 1]
            if len(value) not in (2, 3) or wrong:
                faults.append(f"{path} is {value!r}; it must be two numbers from 0 to below 1")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            low = 1 if key in AT_LEAST_ONE else 0
            if value < low and key not in MAY_BE_NEGATIVE:
                faults.append(f"{path} is {value!r}; it must be at least {low}")
            elif value > 1 and key in AT_MOST_ONE:
                faults.append(f"{path} is {value!r}; it must be at most 1")
    return faults
