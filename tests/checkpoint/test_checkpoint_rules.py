"""Rules of checkpoints that need no ranks: identity, pointers, pruning, verification."""

import json
import math

import pytest
from manifests import make_manifest, manifest_content

from lumina_ds.checkpoint.format import (
    checkpoint_faults,
    find_checkpoint,
    newest_valid,
    pointer_target,
    set_aside_later_steps,
    step_folders,
)
from lumina_ds.checkpoint.manifest import manifest_digest, read_manifest
from lumina_ds.checkpoint.publish import best_loss, prune
from lumina_ds.config.schema import ModelConfig, RunConfig
from lumina_ds.errors import CheckpointError, ConfigError
from lumina_ds.files import file_digest
from lumina_ds.train.resume import changed_settings, identity_differences
from lumina_ds.train.run_folder import RunFolder


def make_step(checkpoints, step, content=b"weights", eval_loss=None):
    folder = checkpoints / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "data.bin").write_bytes(content)
    entry = {"bytes": len(content), "sha256": file_digest(folder / "data.bin")}
    write_manifest(folder, manifest_content(step=step, files={"data.bin": entry}, eval_loss=eval_loss))
    return folder


def write_manifest(folder, content):
    (folder / "manifest.json").write_text(json.dumps(content | {"digest": manifest_digest(content)}))


def test_faults_are_named(tmp_path):
    folder = make_step(tmp_path, 1)
    assert checkpoint_faults(folder) == []
    (folder / "data.bin").write_bytes(b"weightz")
    assert checkpoint_faults(folder) == ["data.bin was altered (its digest differs)"]
    (folder / "data.bin").write_bytes(b"weig")
    assert checkpoint_faults(folder) == ["data.bin has 4 bytes instead of 7"]
    (folder / "data.bin").unlink()
    assert checkpoint_faults(folder) == ["data.bin is missing"]
    for content, fault in (("{", "missing or unreadable"), ("[]", "was altered"), ('{"files": 3}', "was altered")):
        (folder / "manifest.json").write_text(content)
        assert fault in checkpoint_faults(folder)[0]


def test_a_changed_manifest_or_a_renamed_folder_is_noticed(tmp_path):
    folder = make_step(tmp_path, 3)
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"step": 3', '"step": 7'))
    assert "was altered" in checkpoint_faults(folder)[0]
    renamed = make_step(tmp_path, 4).rename(tmp_path / "step-00000009")
    assert "holds the checkpoint of step 4; it was renamed" in checkpoint_faults(renamed)[0]


def test_best_is_read_as_none_when_absent_damaged_or_not_evaluated(tmp_path):
    assert best_loss(tmp_path) == math.inf
    folder = make_step(tmp_path, 5, eval_loss=2.5)
    (tmp_path / "best").write_text(folder.name)
    assert best_loss(tmp_path) == 2.5
    (folder / "manifest.json").unlink()
    assert best_loss(tmp_path) == math.inf


def test_going_back_sets_the_later_steps_aside(tmp_path, caplog):
    for step in (2, 4, 6):
        make_step(tmp_path, step)
    set_aside_later_steps(tmp_path, 2)
    assert [folder.name for folder in step_folders(tmp_path)] == ["step-00000002"]
    assert newest_valid(tmp_path) == tmp_path / "step-00000002"
    assert (tmp_path / "step-00000006.abandoned" / "data.bin").exists()  # nothing is lost
    assert read_manifest(tmp_path / "step-00000002").step == 2


def test_pointers_let_go_of_what_is_set_aside(tmp_path):
    """Else `best` would name whatever is saved under that step later, evaluated or not."""
    for step, loss in ((2, 3.0), (4, 2.5), (6, None), (8, 2.0)):
        make_step(tmp_path, step, eval_loss=loss)
    for pointer in ("latest", "best"):
        (tmp_path / pointer).write_text("step-00000008")
    set_aside_later_steps(tmp_path, 6)
    assert [(tmp_path / pointer).read_text() for pointer in ("latest", "best")] == ["step-00000006", "step-00000004"]
    set_aside_later_steps(tmp_path, 6)
    assert (tmp_path / "best").read_text() == "step-00000004"
    set_aside_later_steps(tmp_path, 1)
    assert not [path.name for path in tmp_path.iterdir() if not path.name.endswith(".abandoned")]


def test_row_34_two_runs_in_one_folder(tmp_path):
    first, second = RunFolder(tmp_path), RunFolder(tmp_path)
    first.create()
    first.lock()
    with pytest.raises(ConfigError, match="another run is training in"):
        second.lock()
    first.release()
    second.lock()
    second.release()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot create the run folder"):
        RunFolder(tmp_path / "file" / "run").create()


def test_changed_settings_are_named():
    config = RunConfig.model_validate({"train": {"learning_rate": 1e-3, "stop_at_step": 5}})
    saved = make_manifest(config)
    assert changed_settings(saved, config) == []
    later = RunConfig.model_validate({"train": {"learning_rate": 5e-4, "stop_at_step": 9}})
    assert changed_settings(saved, later) == ["train.learning_rate 0.001 -> 0.0005"]


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
    prune(tmp_path, keep=2)
    assert [folder.name[-1] for folder in step_folders(tmp_path)] == ["2", "4", "5"]


def test_identity_differences_name_both_values():
    present = make_manifest()
    saved = make_manifest(topology=present.topology.model_dump() | {"world_size": 4})
    assert identity_differences(saved, present) == ["topology.world_size was 4, is now 2"]
    assert identity_differences(saved, saved) == []


def test_a_model_saved_before_a_field_existed_is_the_same_model():
    model = ModelConfig(num_experts=4).model_dump()
    saved = make_manifest(model={k: v for k, v in model.items() if k not in ("scoring_func", "qk_norm")})
    assert identity_differences(saved, make_manifest(model=model)) == []
    present = make_manifest(model=model | {"scoring_func": "sigmoid"})
    assert identity_differences(saved, present) == ["model.scoring_func was 'softmax', is now 'sigmoid'"]


def test_what_is_neither_run_nor_step_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="neither a run folder nor a checkpoint"):
        find_checkpoint(tmp_path / "nowhere")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint yet"):
        find_checkpoint(tmp_path)
