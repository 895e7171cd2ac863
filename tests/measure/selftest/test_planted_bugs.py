"""The self-test names the pair that each of five real bugs tears apart, and no other."""

from pathlib import Path

# What each bug must show, and what it leaves equal: it is the same on both sides there.
EXPECTED = {
    "none": set(),
    "expert gradients": {"plain PyTorch", "expert parallelism"},
    "mean of means": {"plain PyTorch", "accumulation", "packing"},
    "attention": {"plain PyTorch", "packing"},
    "end of turn": {"plain PyTorch"},
    "auxiliary loss": {"plain PyTorch", "accumulation"},
}


def test_each_planted_bug_is_found(run_ranks):
    found = run_ranks(Path(__file__).parent / "planted_worker.py", timeout=500)
    shown = {
        bug: [(topic, each["gradients"], each["parameter"], each["fault"]) for topic, each in pairs.items()]
        for bug, pairs in found.items()
    }
    print(*(f"{bug}: {pairs}" for bug, pairs in shown.items()), sep="\n")
    faults = {bug: {topic for topic, each in pairs.items() if each["fault"]} for bug, pairs in found.items()}
    assert faults == EXPECTED
    assert "experts.w" in found["expert gradients"]["expert parallelism"]["parameter"]
    assert "router" in found["auxiliary loss"]["accumulation"]["parameter"]
    assert "tokens of the same conversations" in found["end of turn"]["plain PyTorch"]["fault"]
