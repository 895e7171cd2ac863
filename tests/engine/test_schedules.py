"""Learning rates worked out by hand for a run of 10 steps with peak 1."""

import pytest

from lumina_ds.config.schema import TrainConfig
from lumina_ds.engine.schedules import learning_rate


def rates(kind, warmup=0.2, floor=0.1, num_steps=10):
    train = TrainConfig(learning_rate=1.0, lr_scheduler_type=kind, warmup_ratio=warmup, min_lr_ratio=floor)
    return [learning_rate(step, num_steps, train) for step in range(num_steps)]


def test_linear():
    found = rates("linear")
    assert found[:3] == pytest.approx([0.5, 1.0, 1.0])  # two steps of warm-up, then the peak
    assert found[9] == pytest.approx(0.1)
    assert found[2] - found[3] == pytest.approx(0.9 / 7)


def test_cosine():
    found = rates("cosine", warmup=0.0, num_steps=9)
    assert found[0] == pytest.approx(1.0)
    assert found[4] == pytest.approx(0.55)  # half way between peak and floor
    assert found[8] == pytest.approx(0.1)


def test_constant_keeps_the_peak():
    assert rates("constant") == pytest.approx([0.5] + [1.0] * 9)


def test_onecycle_rises_from_a_twentyfifth_and_falls_to_the_floor():
    found = rates("onecycle", warmup=0.4, floor=0.0)
    assert found[0] == pytest.approx(0.04)
    assert found[4] == pytest.approx(1.0)
    assert found[9] == pytest.approx(0.0)
    assert max(found) == found[4]


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "onecycle", "wsd"])
def test_one_step_run_and_full_warmup_stay_positive(kind):
    assert rates(kind, num_steps=1)[0] > 0
    assert all(rate > 0 for rate in rates(kind, warmup=1.0))


def test_wsd_stays_at_the_peak_and_falls_at_the_end():
    found = rates("wsd", warmup=0.2, floor=0.0, num_steps=10)  # two steps of warm-up, two of decay
    assert found[:8] == pytest.approx([0.5] + [1.0] * 7)
    assert found[8:] == pytest.approx([1 - 0.5**0.5, 0.0])
