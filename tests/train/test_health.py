"""Spikes, skips and what follows them, by hand-made series."""

import math

import pytest

from lumina_ds.checkpoint.manifest import SavedHealth
from lumina_ds.config.schema import HealthConfig
from lumina_ds.train.health import SpikeDetector, StepHealth


def test_scores_by_hand():
    detector = SpikeDetector(6.0, window=8, warmup=5, noise_floor=0.01)
    for value in (1.0, 2.0, 3.0, 4.0):
        assert detector.score(100.0) == 0.0  # not warm yet
        detector.learn(value)
    detector.learn(5.0)
    # The median is 3, the deviations 2 1 0 1 2 have the median 1: (10 - 3) / 1.4826.
    assert detector.score(10.0) == pytest.approx(7 / 1.4826)
    assert detector.score(2.0) == 0.0
    assert detector.score(math.nan) == math.inf and not detector.is_spike(math.nan)
    assert not detector.is_spike(11.0) and detector.is_spike(12.0)


def test_a_flat_series_has_the_noise_floor_and_old_values_leave_the_window():
    detector = SpikeDetector(6.0, window=4, warmup=2, noise_floor=0.1)
    for _ in range(4):
        detector.learn(2.0)
    assert detector.score(3.0) == pytest.approx(1.0 / 0.2)
    for _ in range(4):
        detector.learn(10.0)
    assert detector.score(10.0) == 0.0
    assert detector.values == [10.0] * 4


def health(**fields):
    return StepHealth(HealthConfig(spike_warmup_steps=4, **fields))


def warm(judge, count=6):
    for step in range(count):
        assert judge.observe(step, 2.0 + 0.01 * (step % 2), 1.0, skipped=False).message is None
    return judge


@pytest.mark.parametrize(("policy", "bad_steps"), [("warn", 0), ("skip", 0), ("rollback", 2)])
def test_a_spike_by_policy(policy, bad_steps):
    judge = warm(health(spike_policy=policy, rollback_skip_steps=2))
    verdict = judge.observe(7, 100.0, 1.0, skipped=False)
    assert "step 7 is a spike: loss 100 is" in verdict.message and verdict.bad_steps == bad_steps
    assert judge.judges_before_the_update is (policy == "skip")
    assert judge.refuses_loss(100.0) and not judge.refuses_loss(2.1) and judge.refuses_norm(50.0)
    # It was not learned from: the next one is as wild as the first.
    assert judge.observe(8, 100.0, 1.0, skipped=False).anomaly_score == verdict.anomaly_score > 6


def test_the_gradient_norm_is_judged_too():
    verdict = warm(health()).observe(7, 2.0, 80.0, skipped=False)
    assert "gradient norm 80 is" in verdict.message and "loss" not in verdict.message


def test_skips_in_a_row_end_the_run_or_go_back():
    judge = warm(health(max_consecutive_skips=2))
    for step in (7, 8):
        assert "was skipped on all ranks" in judge.observe(step, math.nan, math.inf, skipped=True).message
    verdict = judge.observe(9, math.nan, math.inf, skipped=True)
    assert verdict.ends_run and "3 steps in a row were skipped, the last at step 9" in verdict.message
    judge = warm(health(max_consecutive_skips=2, spike_policy="rollback"))
    found = [judge.observe(step, math.nan, math.inf, skipped=True).bad_steps for step in (7, 8, 9)]
    assert found == [0, 0, 3]


def test_a_sound_step_ends_the_row_and_the_state_goes_through_json():
    judge = warm(health(max_consecutive_skips=2))
    judge.observe(7, math.nan, math.inf, skipped=True)
    saved = SavedHealth(losses=judge.losses, grad_norms=judge.grad_norms, skips_in_a_row=judge.skips_in_a_row)
    resumed = StepHealth(judge.config, SavedHealth.model_validate_json(saved.model_dump_json()))
    assert (resumed.losses, resumed.grad_norms, resumed.skips_in_a_row) == (judge.losses, judge.grad_norms, 1)
    resumed.observe(8, 2.0, 1.0, skipped=False)
    assert resumed.skips_in_a_row == 0
