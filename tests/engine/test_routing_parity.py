"""Every routing policy does under DeepSpeed's expert parallelism what the plain model does."""

from pathlib import Path

import numpy as np

TOLERANCE = 1e-4


def test_every_policy_trains_like_the_plain_forward(run_ranks):
    found = run_ranks(Path(__file__).parent / "routing_worker.py", timeout=400)
    stored, started = found.pop("started")
    assert stored == started and len(stored) == 2
    losses = {}
    for policy, curves in found.items():
        plain = curves.pop("plain")
        assert len(curves) == (8 if policy == "all" else 2)
        losses[policy] = plain["losses"]
        for layout, curve in curves.items():
            where = f"{policy}, {layout}"
            assert curve["skipped"] == 0, where
            for kind in ("losses", "norms"):
                np.testing.assert_allclose(curve[kind], plain[kind], rtol=TOLERANCE, err_msg=where)
            for step, (measured, expected) in enumerate(zip(curve["routing"], plain["routing"], strict=True)):
                for name, value in expected.items():
                    np.testing.assert_allclose(
                        measured[name], value, rtol=TOLERANCE, atol=1e-9, err_msg=f"{where}, step {step}, {name}"
                    )
            assert curve["state"].keys() == plain["state"].keys()
            for name, value in plain["state"].items():
                np.testing.assert_allclose(curve["state"][name], value, rtol=1e-6, err_msg=f"{where}, {name}")
    # Each policy did something of its own.
    assert len({tuple(curve) for curve in losses.values()}) == len(losses)
    assert np.max(metric(found, "drop", "dropped_share")) > 0.02
    assert np.max(metric(found, "drop", "rerouted_share")) == 0
    assert np.max(metric(found, "reroute", "rerouted_share")) > 0.02
    assert np.ptp(metric(found, "dynamic", "capacity_factor")) > 0
    bias = next(iter(found["bias"].values()))["state"]["model.layers.1.mlp.router.e_score_correction_bias"]
    assert np.max(np.abs(bias)) > 0.05


def metric(found, policy, name):
    curve = next(iter(found[policy].values()))
    return [step[name] for step in curve["routing"]]
