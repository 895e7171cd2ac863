"""A checkpoint under another world size, ZeRO stage and expert-parallel size: the same state, the same samples."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lumina_ds.checkpoint.format import checkpoint_faults, step_folders, weight_files
from lumina_ds.checkpoint.manifest import read_manifest
from lumina_ds.checkpoint.saved_state import SavedState
from lumina_ds.cli.main import cli, run_command
from lumina_ds.monitor.writers import read_records

WORKER = Path(__file__).parent / "layout_worker.py"
ORIGIN = "zero2-ep2-world2"
OTHERS = ["zero1-ep1-world2", "zero3-ep2-world2"]
ALONE = ["zero3-ep1-world1"]
MORE = ["zero0-ep1-world2", "zero0-ep2-world2", "zero1-ep2-world2", "zero2-ep1-world2", "zero3-ep1-world2"]
MORE_ALONE = ["zero2-ep1-world1", "zero0-ep1-world1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture
def ranks(run_ranks, corpus, folder):
    """ranks(world_size, task, ...) runs the tasks in one spawn. Layouts are written zeroS-epE-worldW."""

    def run(world_size, *tasks):
        words = [{"runs_dir": str(folder), **task} for task in tasks]
        run_ranks(
            WORKER, json.dumps(words), str(corpus.shards), str(corpus.eval_shards), world_size=world_size
        )  # fmt: skip

    return run


def copy(folder, source, target, into=None):
    """The task: load the newest checkpoint of `source` into the layout that `target` spells, and save it `into`."""
    stage, expert_parallel = (int(part[-1]) for part in target.split("-")[:2])
    return {
        "copy": str(folder / source), "into": str(folder / (into or target)), "stage": stage,
        "expert_parallel": expert_parallel,
    }  # fmt: skip


def copies(folder, targets, source=ORIGIN):
    return [copy(folder, source, target) for target in targets]


def back(folder, sources):
    return [copy(folder, source, ORIGIN, into=f"back-from-{source}") for source in sources]


@pytest.fixture
def trained(ranks, folder):
    """One run straight through, one in three layouts, and copies of its step 4 in others: once, in three spawns."""
    if (folder / "whole").exists():
        return
    ranks(
        2,
        {"name": "whole", "stage": 2, "expert_parallel": 2},
        {"name": "parts", "stage": 2, "expert_parallel": 2, "stop_at_step": 4, "keep_checkpoints": 9},
        copy(folder, "parts/checkpoints", ORIGIN),
        *copies(folder, OTHERS),
    )
    ranks(
        1,
        {"name": "parts", "stage": 3, "expert_parallel": 1, "stop_at_step": 6, "keep_checkpoints": 9},
        *copies(folder, ALONE),
    )
    ranks(
        2,
        {"name": "parts", "stage": 1, "expert_parallel": 2, "stop_at_step": 8, "keep_checkpoints": 9},
        {"name": "parts", "stage": 0, "expert_parallel": 2, "keep_checkpoints": 9},
        *back(folder, [*OTHERS, *ALONE]),
    )


def whole_state(folder):
    """{parameter/key: whole tensor or number} of the step folder in `folder`."""
    return state_of(step_folders(folder)[-1])


def state_of(step):
    saved = SavedState(step, read_manifest(step).files)
    state = {}
    for name, shape in saved.shapes.items():
        for key in saved.keys_of(name, shape):
            values = torch.empty(shape)
            saved.read_into(values.view(-1), name, key, 0)
            state[f"{name}/{key}"] = values
        state |= {f"{name}/{key}": torch.tensor(value) for key, value in saved.scalars_of(name).items()}
    return state


def assert_same_state(found, expected):
    assert found.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]


def test_row_30_31_32_the_run_goes_on_under_other_layouts_with_the_same_samples(trained, folder):
    """World 2 to 1 to 2, expert parallelism 2 to 1 to 2, ZeRO 2 to 3 to 1 to 0, in one run folder."""
    whole, parts = (read_records(folder / name / "metrics.jsonl") for name in ("whole", "parts"))
    assert [record["step"] for record in parts] == list(range(1, 11))
    for expected, found in zip(whole, parts, strict=True):
        assert sorted(expected["samples"]) == sorted(found["samples"])
        assert found["loss"] == pytest.approx(expected["loss"], rel=2e-3)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2e-2)
        assert found["tokens"] == expected["tokens"]
    assert [record["loss"].hex() for record in whole[:4]] == [record["loss"].hex() for record in parts[:4]]


def test_row_31_32_weights_and_moments_are_bit_identical_through_other_layouts_and_back(trained, folder):
    assert_identical(folder, OTHERS + ALONE)


@pytest.mark.faults
def test_row_31_32_weights_and_moments_are_bit_identical_through_every_layout_and_back(ranks, trained, folder):
    ranks(2, *copies(folder, MORE), *back(folder, MORE))
    ranks(1, *copies(folder, MORE_ALONE))
    ranks(2, *back(folder, MORE_ALONE))
    assert_identical(folder, MORE + MORE_ALONE)


def assert_identical(folder, layouts):
    """Every copy has ORIGIN's whole state, and each copy back has its very files."""
    expected = whole_state(folder / ORIGIN)
    assert_same_state(state_of(folder / "parts/checkpoints/step-00000004"), expected)
    assert {name.split("/")[1] for name in expected} == {"weight", "exp_avg", "exp_avg_sq", "step"}
    digests = {name: entry for name, entry in files(folder / ORIGIN).items() if not name.startswith("random")}
    assert len(digests) >= 5
    for name in layouts:
        assert_same_state(whole_state(folder / name), expected)
        found = files(folder / f"back-from-{name}")
        assert {file: found[file] for file in digests} == digests, name


def test_consolidate_and_reshard_from_the_command_line(trained, ranks, folder, lumina, tmp_path):
    step = step_folders(folder / "whole" / "checkpoints")[-1]
    lumina("checkpoint", "consolidate", folder / "whole", "--out", tmp_path / "whole.safetensors")
    lumina("checkpoint", "consolidate", step, "--out", tmp_path / "half", "--dtype", "bf16")
    expected = {}
    for path in weight_files(step):
        expected |= load_file(path)
    found, half = load_file(tmp_path / "whole.safetensors"), load_file(tmp_path / "half" / "model-00001.safetensors")
    assert found.keys() == half.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor) and torch.equal(half[name], tensor.to(torch.bfloat16))
    before = whole_state(step.parent)
    for world_size, expert_parallel, zero in ((4, 4, 2), (2, 2, 2), (1, 1, 3)):
        layout = ["--world-size", world_size, "--expert-parallel", expert_parallel, "--zero", zero]
        lumina("checkpoint", "reshard", folder / "whole", *layout)
        assert checkpoint_faults(step) == []
        manifest = read_manifest(step)
        assert [getattr(manifest.topology, key) for key in ("world_size", "expert_parallel_size", "zero_stage")] == [
            *(world_size, expert_parallel, zero)
        ]
        assert sum(name.startswith("optimizer-") for name in manifest.files) == world_size
        assert_same_state(whole_state(step.parent), before)
    words = ["checkpoint", "reshard", str(folder / "whole"), "--world-size", "3", "--expert-parallel", "1"]
    assert run_command(cli, words) == 2
    ranks(1, {"name": "whole", "stage": 3, "expert_parallel": 1})  # nothing is left to train, and it is accepted


def files(folder):
    return read_manifest(step_folders(folder)[-1]).files
