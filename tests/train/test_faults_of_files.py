"""Rows of the fault table that concern files, saving and loading, each by its real fault."""

import contextlib
import errno
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from lumina_ds.checkpoint import tensor_file
from lumina_ds.checkpoint.format import (
    checkpoint_faults,
    find_checkpoint,
    newest_valid,
    pointer_target,
    step_folders,
)
from lumina_ds.checkpoint.manifest import Digest, manifest_digest, read_manifest
from lumina_ds.checkpoint.publish import best_loss, prune
from lumina_ds.checkpoint.saved_state import SavedState
from lumina_ds.checkpoint.state import restore_random_state
from lumina_ds.checkpoint.tensor_file import CheckpointFile
from lumina_ds.cli.main import cli, run_command
from lumina_ds.config.schema import TrainConfig
from lumina_ds.errors import CheckpointError, ConfigError, MachineError
from lumina_ds.files import file_digest
from lumina_ds.monitor.records import StepRecord
from lumina_ds.monitor.writers import MetricsWriter, read_records
from lumina_ds.train import saves
from lumina_ds.train.resume import refuse_another_run
from lumina_ds.train.run_folder import RunFolder

CHECKOUT = Path(__file__).parents[2]
MODEL = {
    "vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "num_experts": 4, "moe_intermediate_size": 32, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def command(tmp_path_factory, corpus):
    """command(runs_dir, *options): `launch/train.py` as one rank on a tiny model, run r."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    train = {"micro_batch_size": 2, "max_steps": 4, "save_every_n_batches": 1, "keep_checkpoints": 4}
    path.write_text(yaml.safe_dump({"model": MODEL, "train": train, "deepspeed": {"zero_stage": 1}}))
    words = [sys.executable, CHECKOUT / "launch/train.py", "--config", path, "--data", corpus.shards]
    return lambda runs_dir, *options: [
        str(word) for word in (*words, "--experiment-name", "r", "--runs-dir", runs_dir, *options)
    ]


def start(words, **kwargs):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT)}
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(words):
    process = start(words)
    printed, _ = process.communicate(timeout=240)
    return process.returncode, printed


@pytest.fixture(scope="module")
def trained(command, tmp_path_factory):
    """A run of four steps with a checkpoint at each. Copied by tests, never changed."""
    runs = tmp_path_factory.mktemp("trained")
    code, printed = finished(command(runs))
    assert code == 0, printed
    return runs / "r"


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "r")
    return tmp_path / "r"


@contextlib.contextmanager
def tmpfs(folder, options):
    """A small file system of its own; where it is mounted at the end may have been renamed."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        for mount in mounts:
            if mount.endswith(folder.name) and mount.startswith(str(folder.parent.parent)):
                subprocess.run(["umount", "-l", mount], check=True)


def newest(run):
    return step_folders(run / "checkpoints")[-1]


@pytest.mark.slow
def test_row_02_03_04_a_kill_at_any_moment_of_a_save_leaves_a_sound_checkpoint(tmp_path):
    survived, best = set(), set()
    for number in range(1, 200):
        checkpoints = tmp_path / str(number)
        code = subprocess.run(
            [sys.executable, CHECKOUT / "tests/checkpoint/killed_save.py", checkpoints, str(number)],
            env=os.environ | {"PYTHONPATH": f"{CHECKOUT}{os.pathsep}{CHECKOUT / 'tests'}"},
        ).returncode
        found = newest_valid(checkpoints)
        assert found is not None and checkpoint_faults(found) == []
        for pointer in ("latest", "best"):
            target = pointer_target(checkpoints, pointer)
            assert target is not None and checkpoint_faults(target) == []
        survived.add(found.name)
        best.add(best_loss(checkpoints))
        if code == 0:
            break
        assert code == -signal.SIGKILL
    else:
        pytest.fail("the save did not come to its end")
    assert number > 12 and survived == {"step-00000001", "step-00000002"} and best == {2.0, 1.0}


@pytest.mark.slow
def test_row_05_a_full_disk_costs_the_new_checkpoint_only(command, tmp_path):
    with tmpfs(tmp_path / "small", "size=2m") as disk:
        code, printed = finished(command(disk))
        assert code == 4 and "Traceback" not in printed, printed
        assert "earlier checkpoints stay" in printed and "free some space" in printed
        [*_, last] = step_folders(disk / "r" / "checkpoints")
        assert checkpoint_faults(last) == [] and pointer_target(last.parent, "latest") == last
        assert not list(last.parent.glob("*.tmp"))
        assert [record["step"] for record in read_records(disk / "r" / "metrics.jsonl")] == [1, 2, 3, 4]


@pytest.mark.slow
def test_row_05_a_disk_without_room_for_one_checkpoint_refuses_the_run(command, tmp_path):
    with tmpfs(tmp_path / "small", "size=300k") as disk:
        code, printed = finished(command(disk))
        assert code == 4 and "Traceback" not in printed, printed
        assert "free, and one checkpoint with the metrics takes" in printed
        assert not step_folders(disk / "r" / "checkpoints") and not (disk / "r" / "metrics.jsonl").exists()


def test_row_05_what_the_disk_must_hold(tmp_path, caplog, monkeypatch):
    """Of 5 saves the 2 newest, the best and the one being written stay: 4 x 100 bytes, and 10 lines of metrics."""
    train = TrainConfig(keep_checkpoints=2, save_every_n_batches=2)
    free = saves.METRICS_BYTES * 10 + 400
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(saves.shutil, "disk_usage", lambda path: usage._replace(free=free))
    saves.check_disk_space(tmp_path, train, 100, 10)
    assert not caplog.records
    saves.check_disk_space(tmp_path, train, 101, 10)
    assert "up to 4 checkpoints with the metrics take" in caplog.text
    with pytest.raises(MachineError, match="one checkpoint with the metrics takes"):
        saves.check_disk_space(tmp_path, train, 401, 10)
    saves.check_disk_space(tmp_path, train, 401, 0)  # nothing is left to train


def test_row_05_metrics_wait_for_room_on_a_full_disk(tmp_path, caplog):
    with tmpfs(tmp_path / "small", "size=64k") as disk:
        writer = MetricsWriter(disk, 0)
        writer.write(StepRecord(step=1, loss=1.5))
        filler = disk / "filler"
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as stream:
            while stream.write(b"x" * 512):
                pass
        for step in range(2, 40):  # the page that is begun has room for some
            writer.write(StepRecord(step=step, loss=1.5, others={"text": "x" * 400}))
        assert caplog.text.count("No space left on device; training goes on") == 1
        written = read_records(disk / "metrics.jsonl")
        assert [record["step"] for record in written] == list(range(1, len(written) + 1)) and len(written) < 39
        assert (disk / "metrics.jsonl").read_text().endswith("\n")
        filler.unlink()
        writer.close()
        assert [record["step"] for record in read_records(disk / "metrics.jsonl")] == list(range(1, 40))
        assert len((disk / "metrics.csv").read_text().splitlines()) == 40


def test_row_05_a_disk_that_fills_up_while_writing_raises(tmp_path):
    with tmpfs(tmp_path / "small", "size=64k") as disk, pytest.raises(OSError) as raised:
        CheckpointFile("optimizer-00000.safetensors", {"a": torch.ones(1 << 20)}).write(disk)
    assert raised.value.errno == errno.ENOSPC


def test_row_06_a_read_only_folder_is_refused_at_the_start(tmp_path):
    with tmpfs(tmp_path / "runs", "size=1m,ro") as disk, pytest.raises(ConfigError, match="Read-only file system"):
        RunFolder(disk / "r").create()


def test_row_07_every_file_truncated_is_found(run):
    folder = newest(run)
    for name in [*read_manifest(folder).files, "manifest.json"]:
        content = (folder / name).read_bytes()
        for share in (0, 0.1, 0.5, 0.999):
            (folder / name).write_bytes(content[: int(len(content) * share)])
            assert checkpoint_faults(folder), (name, share)
            assert newest_valid(run / "checkpoints").name == "step-00000003"
        (folder / name).write_bytes(content)
    assert checkpoint_faults(folder) == []


def test_row_08_every_one_of_500_flipped_bits_is_found(run):
    folder = newest(run)
    draw = random.Random(1)
    names = [*read_manifest(folder).files, "manifest.json"]
    for _ in range(500):
        path = folder / draw.choice(names)
        content = path.read_bytes()
        place, bit = draw.randrange(len(content)), draw.randrange(8)
        with open(path, "r+b") as stream:
            stream.seek(place)
            stream.write(bytes([content[place] ^ (1 << bit)]))
        assert checkpoint_faults(folder), (path.name, place, bit)
        path.write_bytes(content)
    assert checkpoint_faults(folder) == []


@pytest.mark.slow
def test_row_07_08_09_10_a_run_goes_on_from_the_newest_sound_one_exactly(run, trained, command, caplog):
    """Step 4 has a flipped bit, step 3 lacks a rank's file, and the pointer is garbage: on from step 2."""
    checkpoints = run / "checkpoints"
    with open(checkpoints / "step-00000004" / "model-00001.safetensors", "r+b") as stream:
        stream.seek(1000)
        stream.write(b"\xff\x00\xff")
    (checkpoints / "step-00000003" / "optimizer-00000.safetensors").unlink()
    (checkpoints / "latest").write_bytes(b"\x80garbage\x00")
    code, printed = finished(command(run.parent))
    assert code == 0, printed
    assert "step-00000004 is damaged and is passed over: model-00001.safetensors was altered" in printed
    assert "step-00000003 is damaged and is passed over: optimizer-00000.safetensors is missing" in printed
    assert "resumed from" in printed and "step-00000002" in printed
    exact = [[r[key].hex() for key in ("loss", "grad_norm")] for r in read_records(trained / "metrics.jsonl")]
    assert [[r[key].hex() for key in ("loss", "grad_norm")] for r in read_records(run / "metrics.jsonl")] == exact


def test_row_09_a_missing_file_is_named(run):
    folder = newest(run)
    (folder / "random-rank-0.pt").unlink()
    with pytest.raises(CheckpointError, match=r"random-rank-0\.pt is missing"):
        find_checkpoint(folder)


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"step-99999999", b"../step-00000004"])
def test_row_10_without_a_usable_pointer_the_folders_are_searched(run, content):
    pointer = run / "checkpoints" / "latest"
    pointer.unlink()
    if content is not None:
        pointer.write_bytes(content)
    assert pointer_target(run / "checkpoints", "latest") is None
    assert newest_valid(run / "checkpoints") == newest(run)


def test_row_11_nothing_outside_the_run_folder_is_followed(run, tmp_path):
    checkpoints, folder = run / "checkpoints", newest(run)
    outside = tmp_path / "step-00000009"
    folder.rename(outside)
    (checkpoints / "step-00000009").symlink_to(outside)
    (checkpoints / "latest").write_text("step-00000009")
    assert pointer_target(checkpoints, "latest") is None
    (checkpoints / "latest").unlink()
    (tmp_path / "pointer").write_text("step-00000003")
    (checkpoints / "latest").symlink_to(tmp_path / "pointer")
    assert pointer_target(checkpoints, "latest") is None
    folder = newest_valid(checkpoints)
    assert folder.name == "step-00000003"
    (folder / "random-rank-0.pt").rename(tmp_path / "elsewhere")
    (folder / "random-rank-0.pt").symlink_to(tmp_path / "elsewhere")
    assert checkpoint_faults(folder) == ["random-rank-0.pt is a link, not a plain file"]


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def test_row_12_a_pickle_is_not_executed_even_with_a_right_digest(run, tmp_path):
    folder, marker = newest(run), tmp_path / "executed"
    (folder / "random-rank-0.pt").write_bytes(pickle.dumps(Payload(marker)))
    assert checkpoint_faults(folder)
    reseal(folder)
    assert checkpoint_faults(folder) == []
    with pytest.raises(CheckpointError, match=r"random-rank-0\.pt .* nothing of it was run"):
        restore_random_state(folder, 0, seed=1)
    torch.save(Payload(marker), folder / "random-rank-0.pt")
    with pytest.raises(CheckpointError):
        restore_random_state(folder, 0, seed=1)
    for name in ("optimizer-00000.safetensors", "model-00001.safetensors", "model.safetensors.index.json"):
        (folder / name).write_bytes(pickle.dumps(Payload(marker)))
        reseal(folder)
        assert run_command(cli, ["generate", str(run), "--prompt", "hello"]) == (0 if name.startswith("opt") else 5)
    with pytest.raises(CheckpointError, match=r"optimizer-00000\.safetensors is no safetensors file"):
        SavedState(folder, read_manifest(folder).files)
    (folder / "manifest.json").write_bytes(pickle.dumps(Payload(marker)))
    assert newest_valid(run / "checkpoints").name == "step-00000003"
    assert not marker.exists()


def reseal(folder):
    """The manifest of someone who knows how to make one."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        path = folder / name
        manifest["files"][name] = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
    manifest["digest"] = manifest_digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.slow
def test_row_14_15_sigusr1_saves_and_a_second_signal_in_the_save_does_no_damage(command, tmp_path):
    process = start(command(tmp_path, "--max-steps", "100000", "--save-every-n-batches", "0"))
    try:
        deadline = time.monotonic() + 120
        while len(read_records(tmp_path / "r/metrics.jsonl")) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGUSR1)
        while process.poll() is None and not list((tmp_path / "r/checkpoints").glob("step-*")):
            time.sleep(0.001)
        process.send_signal(signal.SIGTERM)
        signalled = time.monotonic()
        printed, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 75 and time.monotonic() - signalled < 30, printed
    assert checkpoint_faults(newest(tmp_path / "r")) == []


def test_row_19_weights_that_are_no_numbers_are_found_before_a_file_is_written():
    sound, bad = torch.ones(4), torch.tensor([1.0, float("nan")])
    assert CheckpointFile("f", {"sound": sound}).first_not_finite() is None
    assert CheckpointFile("f", {"sound": sound, "bad": bad}).first_not_finite() == "bad"


@pytest.mark.slow
def test_row_28_29_another_model_optimizer_and_tokenizer_are_named_field_by_field(
    run, command, corpus, lumina, tmp_path
):
    lumina("tokenizer", "train", corpus.train, "--vocab-size", 300, "--out", tmp_path / "other.model")
    options = ("--tokenizer", tmp_path / "other.model", "--seq-length", 64, "--out", tmp_path / "other-shards")
    lumina("preprocess", corpus.train, *options)
    model = ["--model.hidden_size", "64", "--model.num_hidden_layers", "1", "--model.num_experts", "2"]
    changed = [*model, "--model.vocab_size", "500", "--train.weight_decay", "0.5", "--optimizer", "muon"]
    before = {path: path.read_bytes() for path in newest(run).iterdir()}
    code, printed = finished([*command(run.parent), *changed, "--data", str(tmp_path / "other-shards")])
    assert code == 5 and "Traceback" not in printed, printed
    for difference in (
        "model.hidden_size was 32, is now 64", "model.num_hidden_layers was 2, is now 1",
        "model.num_experts was 4, is now 2", "model.vocab_size was 400, is now 500",
        "optimizer.weight_decay was 0.1, is now 0.5", "optimizer.name was 'adamw', is now 'muon'",
        "tokenizer.sha256 was ", "data.sha256 was ",
    ):  # fmt: skip
        assert difference in printed
    assert {path: path.read_bytes() for path in newest(run).iterdir()} == before
    saved = read_manifest(newest(run))
    with pytest.raises(CheckpointError, match=r"template\.sha256 was \w+\.\.\., is now 'other'"):
        refuse_another_run(newest(run), saved, saved.model_copy(update={"template": Digest(sha256="other")}))


@pytest.mark.slow
def test_row_25_shards_that_changed_since_the_checkpoint_are_refused(run, command, corpus, lumina, tmp_path):
    other = tmp_path / "other-shards"
    options = ("--tokenizer", corpus.tokenizer, "--seq-length", 64, "--out", other)
    lumina("preprocess", corpus.eval, *options)
    code, printed = finished([*command(run.parent), "--data", str(other)])
    assert code == 5 and "data.sha256 was" in printed and "Traceback" not in printed, printed


def test_row_33_a_clock_that_jumps_does_not_change_which_is_newest(run):
    for days, folder in enumerate(reversed(step_folders(run / "checkpoints"))):
        os.utime(folder, (0, 86400 * days))
    prune(run / "checkpoints", keep=2)
    assert [folder.name[-1] for folder in step_folders(run / "checkpoints")] == ["3", "4"]


def test_a_checkpoint_is_never_consolidated_into_nor_moves_latest_back(run):
    older, latest = (run / "checkpoints" / f"step-0000000{step}" for step in (2, 4))
    for out in (latest, latest / "whole.safetensors"):
        assert run_command(cli, ["checkpoint", "consolidate", str(run), "--out", str(out)]) == 2
    assert run_command(cli, ["checkpoint", "reshard", str(older), "--world-size", "1", "--zero", "2"]) == 0
    assert read_manifest(older).topology.zero_stage == 2
    assert pointer_target(run / "checkpoints", "latest") == latest
    (latest / "random-rank-0.pt").write_bytes(b"")
    assert run_command(cli, ["checkpoint", "reshard", str(older), "--world-size", "1"]) == 0
    assert pointer_target(run / "checkpoints", "latest") == older
    assert [checkpoint_faults(folder) == [] for folder in step_folders(run / "checkpoints")] == [True] * 3 + [False]


def test_pruning_waits_until_a_kept_checkpoint_verifies(run):
    checkpoints = run / "checkpoints"
    for step in (3, 4):
        (checkpoints / f"step-0000000{step}" / "random-rank-0.pt").write_bytes(b"")
    prune(checkpoints, keep=2)
    assert [folder.name[-1] for folder in step_folders(checkpoints)] == ["1", "2", "3", "4"]


def test_row_37_a_folder_that_cannot_be_deleted_stops_nothing(run):
    checkpoints = run / "checkpoints"
    (checkpoints / "step-00000001" / "mounted").mkdir()
    with tmpfs(checkpoints / "step-00000001" / "mounted", "size=64k"):
        prune(checkpoints, keep=2)
        assert [folder.name[-1] for folder in step_folders(checkpoints)] == ["3", "4"]
        assert checkpoint_faults(pointer_target(checkpoints, "latest")) == []
    assert run_command(cli, ["checkpoint", "verify", str(run)]) == 0


def test_row_38_two_transient_errors_are_tried_again(tmp_path, monkeypatch, caplog):
    """The third attempt succeeds; its file is whole, and its digest that of the content."""
    failures = [errno.EIO, errno.EIO]
    real = os.fsync

    def failing(descriptor):
        if failures:
            raise OSError(failures.pop(), "Input/output error")
        real(descriptor)

    monkeypatch.setattr(tensor_file.os, "fsync", failing)
    entry = CheckpointFile("a.safetensors", {"a": torch.arange(5.0)}).write(tmp_path)
    assert entry.sha256 == file_digest(tmp_path / "a.safetensors") and not failures
    failures[:] = [errno.ENOSPC]
    with pytest.raises(OSError):
        CheckpointFile("b.safetensors", content=b"b").write(tmp_path)
