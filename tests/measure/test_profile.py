"""Attribution of time: a backward pass belongs to the part whose forward call made it, recomputed or not."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.checkpoint import checkpoint

from lumina_ds.measure.profile import PART, PHASE, time_by_part
from lumina_ds.measure.throughput import spread
from lumina_ds.plan.hardware import card_of_device


def large(x, weight):
    with record_function(PART + "large"):
        return x @ weight


def small(x, weight):
    with record_function(PART + "small"):
        return x @ weight


def spent_by(step, num_steps=1):
    with profile(activities=[ProfilerActivity.CPU]) as record:
        for _ in range(num_steps):
            step()
    rows = time_by_part(record, num_steps, "cpu", 0.0)
    return {(row["phase"], row["part"]): row["seconds"] for row in rows}


@pytest.mark.parametrize("recomputed", [False, True])
def test_backward_work_goes_to_the_part_of_its_forward_call(recomputed):
    x = torch.randn(256, 1024)
    wide, narrow = torch.randn(1024, 1024, requires_grad=True), torch.randn(1024, 16, requires_grad=True)

    def step():
        with record_function(PHASE + "forward"):
            hidden = checkpoint(large, x, wide, use_reentrant=False) if recomputed else large(x, wide)
            loss = small(hidden, narrow).sum()
        with record_function(PHASE + "backward"):
            loss.backward()

    step()
    spent = spent_by(step)
    # Two products of 256 x 1024 x 1024 against two of 256 x 1024 x 16; the first also recomputed.
    assert spent["backward", "large"] > 2 * spent["backward", "small"] > 0
    assert spent["forward", "large"] > spent["forward", "small"] > 0
    assert spent["backward", "gradients"] > 0
    assert spent["backward", "large"] > sum(spent.values()) / 4


def test_time_is_of_one_step_and_a_collective_stands_out_of_its_part():
    weight = torch.randn(512, 512)

    def step():
        with record_function(PHASE + "optimizer"), record_function(PART + "communication"):
            weight @ weight

    once = spent_by(step)
    tenth = spent_by(step, num_steps=10)
    assert set(once) == {("optimizer", "communication"), ("optimizer", "other")}
    assert 0.1 < tenth["optimizer", "communication"] / once["optimizer", "communication"] < 10


def test_spread_by_hand():
    assert spread([1.0, 2.0, 3.0, 4.0, 11.0]) == {"median": 3.0, "p10": 1.4, "p90": 8.2, "min": 1.0, "max": 11.0}
    assert spread([2.0]) == dict.fromkeys(("median", "p10", "p90", "min", "max"), 2.0)


@pytest.mark.parametrize(
    ("device", "gigabytes", "name"),
    [
        ("NVIDIA H100 80GB HBM3", 85, "h100-80"),
        ("NVIDIA A100-SXM4-40GB", 42, "a100-40"),
        ("NVIDIA A100 80GB PCIe", 85, "a100-80"),
        ("NVIDIA GeForce RTX 4090", 25, "rtx4090-24"),
        ("Tesla V100-SXM2-32GB", 34, "v100-32"),
        ("NVIDIA H200", 150, "h200-141"),
        ("NVIDIA A10M", 24, None),
        ("NVIDIA GB300", 190, None),
        ("NVIDIA GeForce RTX 3090 Ti", 25, None),
        ("Tesla P4", 16, None),
    ],
)
def test_cards_by_the_drivers_name(device, gigabytes, name):
    card = card_of_device(device, gigabytes * 10**9)
    assert (card.name if card else None) == name
