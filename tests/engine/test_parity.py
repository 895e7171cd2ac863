"""ZeRO 0-3 with experts on one or two ranks train exactly like a single process with the plain forward."""

from pathlib import Path

import numpy as np

TOLERANCE = 1e-4


def test_every_layout_trains_like_the_plain_forward(run_ranks):
    curves = run_ranks(Path(__file__).parent / "parity_worker.py", timeout=400)
    plain = curves.pop("plain")
    # A loss that is not a number: skipped by all ranks together, weights untouched, and training goes on.
    for name, (sound, poisoned, again) in curves.pop("poisoned").items():
        assert sound == again == {"skipped": False, "changed": True, "finite": True}, name
        assert poisoned == {"skipped": True, "changed": False, "finite": True}, name
    from_folder = curves.pop("from a folder")
    assert len(from_folder) == 5 and all(from_folder.values()), from_folder
    # Widths that the grouped product refuses train through the loop over experts.
    odd, odd_plain = curves.pop("odd widths"), curves.pop("odd widths plain")
    np.testing.assert_allclose(odd["losses"], odd_plain["losses"], rtol=TOLERANCE)
    low_precision = {name: curves.pop(name) for name in list(curves) if "bf16" in name}
    assert all(curve["exact_start"] for curve in (*curves.values(), *low_precision.values(), odd))
    assert len(curves) == 12 and len(low_precision) == 5
    assert plain["losses"][-1] < 0.8 * plain["losses"][0]  # it learns, so equal curves mean something
    assert np.ptp(plain["norms"]) > 0.1
    worst = {}
    for name, curve in curves.items():
        assert curve["skipped"] == 0, name
        differences = [
            np.max(np.abs(np.array(curve[kind]) - plain[kind]) / np.abs(plain[kind])) for kind in ("losses", "norms")
        ]
        worst[name] = differences
        assert np.shape(curve["usage"]) == (2, 4)
        np.testing.assert_allclose(np.sum(curve["usage"], axis=1), 1.0, rtol=1e-6)
    print("\n".join(f"{name}: loss {loss:.1e}, gradient norm {norm:.1e}" for name, (loss, norm) in worst.items()))
    assert max(max(pair) for pair in worst.values()) < TOLERANCE, worst
    for name, curve in low_precision.items():
        # bf16 keeps eight bits: the curves follow the fp32 one, and differ from it (the precision was really used).
        difference = np.max(np.abs(np.array(curve["losses"]) - plain["losses"]) / np.array(plain["losses"]))
        assert 1e-6 < difference < 2e-2, (name, difference)
