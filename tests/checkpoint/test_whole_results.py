"""What writes a result over an older one replaces all of it or nothing, whenever it is killed."""

import json
import os
import signal
import stat

import pytest
import torch
from safetensors import safe_open
from test_foreign_checkpoints import make_step

from lumina_ds import files
from lumina_ds.checkpoint import tensor_file
from lumina_ds.checkpoint.consolidate import consolidate
from lumina_ds.checkpoint.format import checkpoint_faults
from lumina_ds.checkpoint.manifest import read_manifest
from lumina_ds.checkpoint.reshard import reshard
from lumina_ds.errors import ConfigError, MachineError

CALLS = ("fsync", "rename", "replace", "rmdir", "unlink", "mkdir", "link")


def kill_at(number):
    """Die by SIGKILL in place of the `number`-th thing done to the disk."""
    done = [0]

    def counted(original):
        def call(*args, **kwargs):
            done[0] += 1
            if done[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    tensor_file.hashlib.sha256 = counted(tensor_file.hashlib.sha256)
    files._exchange = counted(files._exchange)


def killed(number, action):
    """Do `action` in a process of its own that dies at the `number`-th thing; whether it died."""
    child = os.fork()
    if child == 0:
        kill_at(number)
        action()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL
    return status != 0


@pytest.fixture
def steps(tmp_path):
    """Two checkpoints whose parameter has 8 and 4,000 elements."""
    return [make_step(tmp_path / "r", step, values) for step, values in ((1, 8), (2, 4000))]


def held(out):
    """The number of values in a consolidated folder, which is one result: every file of its index, and no other."""
    names = {path.name for path in out.iterdir()}
    index = json.loads((out / files.WEIGHTS_INDEX).read_text())
    assert names == {files.WEIGHTS_INDEX, *index["weight_map"].values()}
    with safe_open(out / index["weight_map"]["a"], framework="pt") as file:
        values = file.get_tensor("a")
    assert torch.equal(values, torch.arange(float(len(values)))) and index["metadata"]["total_size"] == 4 * len(values)
    return len(values)


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_consolidated_folder_is_the_old_one_or_the_new_one(steps, tmp_path, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(files, "_exchange", lambda *names: False)
    survived = []
    for number in range(1, 100):
        out = tmp_path / str(number) / "weights"
        consolidate(steps[0], out, torch.float32)
        died = killed(number, lambda out=out: consolidate(steps[1], out, torch.float32))
        if not exchanges and not out.exists():  # between two renames
            survived.append("aside")
            assert held(out.with_name("weights.replaced")) == 8
            continue
        survived.append(held(out))
        consolidate(steps[1], out, torch.float32)  # what a killed one left is no hindrance
        assert held(out) == 4000 and [path.name for path in out.parent.iterdir()] == ["weights"]
        if not died:
            break
    assert len(survived) > 5 and survived[0] == 8 and survived[-1] == 4000
    assert ("aside" in survived) is not exchanges


def test_a_consolidated_file_is_the_old_one_or_the_new_one(steps, tmp_path):
    survived = []
    for number in range(1, 100):
        out = tmp_path / str(number) / "w.safetensors"
        consolidate(steps[0], out, torch.float32)
        died = killed(number, lambda out=out: consolidate(steps[1], out, torch.float32))
        with safe_open(out, framework="pt") as file:
            survived.append(len(file.get_tensor("a")))
        if not died:
            break
    assert set(survived) == {8, 4000} and [path.name for path in out.parent.iterdir()] == ["w.safetensors"]


def test_a_resharded_checkpoint_is_the_old_one_or_the_new_one(tmp_path):
    worlds = []
    for number in range(1, 200):
        folder = make_step(tmp_path / str(number), 1, 4000)
        wanted = read_manifest(folder).topology.model_copy(update={"world_size": 3})
        died = killed(number, lambda folder=folder, wanted=wanted: reshard(folder, wanted))
        assert checkpoint_faults(folder) == []
        worlds.append(read_manifest(folder).topology.world_size)
        if not died:
            break
    assert worlds[0] == 2 and worlds[-1] == 3 and len(worlds) > 8


def test_a_full_disk_leaves_the_old_result(steps, tmp_path, monkeypatch):
    consolidate(steps[0], tmp_path / "weights", torch.float32)

    def full(folder, pieces):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_file, "_write", full)
    with pytest.raises(MachineError, match="No space left on device; free some space, or set --out"):
        consolidate(steps[1], tmp_path / "weights", torch.float32)
    assert held(tmp_path / "weights") == 8 and not list(tmp_path.glob(".*"))


def test_a_folder_with_other_files_is_not_replaced(steps, tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/config.json").touch()
    with pytest.raises(ConfigError, match=r"weights holds config\.json, which is no weights"):
        consolidate(steps[0], tmp_path / "weights", torch.float32)
    assert (tmp_path / "weights/config.json").exists()


def test_a_link_to_a_folder_stays_one(steps, tmp_path):
    (tmp_path / "disk/weights").mkdir(parents=True)
    (tmp_path / "weights").symlink_to("disk/weights")
    consolidate(steps[0], tmp_path / "weights", torch.float32)
    assert (tmp_path / "weights").is_symlink() and held(tmp_path / "disk/weights") == 8


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_have_the_mode_of_the_umask(steps, tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        consolidate(steps[0], tmp_path / "weights", torch.float32)
        consolidate(steps[0], tmp_path / "w.safetensors", torch.float32)
        wanted = read_manifest(steps[1]).topology.model_copy(update={"world_size": 3})
        made = reshard(steps[1], wanted)
    finally:
        os.umask(before)
    paths = [*(tmp_path / "weights").iterdir(), tmp_path / "w.safetensors", *made.glob("optimizer-*")]
    assert len(paths) == 6 and {stat.S_IMODE(path.stat().st_mode) for path in paths} == {mode}
    assert stat.S_IMODE((tmp_path / "weights").stat().st_mode) == mode | (mode & 0o444) >> 2
