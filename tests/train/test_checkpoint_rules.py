"""Rules of checkpoints that need no ranks: identity, pointers, pruning, verification."""

import json

import pytest

from lumina_ds.errors import CheckpointError
from lumina_ds.files import file_digest
from lumina_ds.train.checkpoint import (
    FORMAT,
    _prune,
    checkpoint_faults,
    find_checkpoint,
    newest_valid,
    pointer_target,
    step_folders,
)
from lumina_ds.train.resume import identity_differences


def make_step(checkpoints, step, content=b"weights"):
    folder = checkpoints / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "data.bin").write_bytes(content)
    entry = {"bytes": len(content), "sha256": file_digest(folder / "data.bin")}
    (folder / "manifest.json").write_text(json.dumps({"format": FORMAT, "step": step, "files": {"data.bin": entry}}))
    return folder


def test_faults_are_named(tmp_path):
    folder = make_step(tmp_path, 1)
    assert checkpoint_faults(folder) == []
    (folder / "data.bin").write_bytes(b"weightz")
    assert checkpoint_faults(folder) == ["data.bin was altered (its digest differs)"]
    (folder / "data.bin").write_bytes(b"weig")
    assert checkpoint_faults(folder) == ["data.bin has 4 bytes instead of 7"]
    (folder / "data.bin").unlink()
    assert checkpoint_faults(folder) == ["data.bin is missing"]
    (folder / "manifest.json").write_text("{")
    assert "missing or unreadable" in checkpoint_faults(folder)[0]


def test_the_newest_sound_one_is_found_and_never_a_silent_fresh_start(tmp_path, caplog):
    assert newest_valid(tmp_path) is None
    first, second = make_step(tmp_path, 5), make_step(tmp_path, 10)
    (tmp_path / "step-00000015.tmp").mkdir()  # what a crash in the middle of a save leaves
    assert newest_valid(tmp_path) == second
    (second / "data.bin").unlink()
    assert newest_valid(tmp_path) == first
    (first / "data.bin").unlink()
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
        newest_valid(tmp_path)


def test_pointers_outside_the_folder_are_not_followed(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    folder = make_step(checkpoints, 5)
    make_step(tmp_path, 7)
    for content, expected in (("step-00000005", folder), ("../step-00000007", None), ("/etc", None), ("", None)):
        (checkpoints / "latest").write_text(content)
        assert pointer_target(checkpoints, "latest") == expected


def test_pruning_keeps_latest_and_best(tmp_path):
    for step in (1, 2, 3, 4, 5):
        make_step(tmp_path, step)
    (tmp_path / "latest").write_text("step-00000005")
    (tmp_path / "best").write_text("step-00000002")
    _prune(tmp_path, keep=2)
    assert [folder.name[-1] for folder in step_folders(tmp_path)] == ["2", "4", "5"]


def test_identity_differences_name_both_values():
    saved = {section: {} for section in ("topology", "model", "optimizer", "tokenizer", "data", "schedule")}
    saved["topology"] = {"world_size": 4}
    present = {**saved, "topology": {"world_size": 2}}
    assert identity_differences(saved, present) == ["topology.world_size was 4, is now 2"]
    assert identity_differences(saved, saved) == []


def test_what_is_neither_run_nor_step_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="neither a run folder nor a checkpoint"):
        find_checkpoint(tmp_path / "nowhere")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint yet"):
        find_checkpoint(tmp_path)
