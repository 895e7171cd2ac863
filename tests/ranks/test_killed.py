"""What a killed rank's end says: the signal behind the code, and the kernel's count of kills for memory."""

import pytest

from lumina_ds.ranks import killed
from lumina_ds.ranks.killed import MemoryKills, meaning


@pytest.mark.parametrize(
    ("code", "said"), [(247, ": SIGKILL"), (250, ": SIGABRT"), (137, ": SIGKILL"), (245, ": SIGSEGV"), (1, ""), (8, "")]
)
def test_codes_of_signals(code, said):
    assert meaning(code) == said


@pytest.mark.parametrize(
    ("line", "folder", "events", "limit", "peak"),
    [
        ("0::/job", "job", "memory.events", "memory.max", "memory.peak"),
        ("0::/", "", "memory.events", "memory.max", "memory.peak"),
        # In a container the group's own path is not to be seen.
        ("4:memory:/docker/abc", "memory", "memory.oom_control", "memory.limit_in_bytes", "memory.max_usage_in_bytes"),
    ],
)
def test_kills_of_this_group_since_the_start(line, folder, events, limit, peak, tmp_path, monkeypatch):
    groups = tmp_path / "cgroup"
    groups.write_text(f"7:cpuset:/elsewhere\n{line}\n")
    monkeypatch.setattr(killed._Group.ours.__func__, "__defaults__", (groups, tmp_path))
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / events).write_text("low 0\noom 1\noom_kill 3\n")
    kills = MemoryKills()
    assert kills.since_then() == ()
    (tmp_path / folder / events).write_text("low 0\noom 2\noom_kill 4\n")
    said = "the kernel ended a process of this control group for want of memory"
    assert kills.since_then() == (said,)
    (tmp_path / folder / limit).write_text(f"{8 << 30}\n")
    (tmp_path / folder / peak).write_text(f"{7 << 30}\n")
    assert kills.since_then() == (f"{said} (limit 8.00 GiB, peak 7.00 GiB)",)
    (tmp_path / folder / limit).write_text("max\n")
    (tmp_path / folder / events).write_text("oom_kill 5\n")
    assert kills.since_then()[0].startswith("the kernel ended 2 processes") and "limit" not in kills.since_then()[0]


def test_no_control_group(tmp_path, monkeypatch):
    monkeypatch.setattr(killed._Group.ours.__func__, "__defaults__", (tmp_path / "none", tmp_path))
    assert MemoryKills().since_then() == ()
