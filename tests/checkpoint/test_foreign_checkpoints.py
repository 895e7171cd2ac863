"""Checkpoints that somebody else made or resealed: one line that names the fault, and the fall-back to an older one."""

import json

import pytest
import torch
from manifests import make_manifest, manifest_content
from safetensors.torch import save_file

from lumina_ds.checkpoint.consolidate import consolidate
from lumina_ds.checkpoint.format import checkpoint_faults, newest_valid, step_summaries, weight_files
from lumina_ds.checkpoint.manifest import manifest_digest, read_manifest
from lumina_ds.checkpoint.pieces import optimizer_file_name
from lumina_ds.checkpoint.publish import begin, publish
from lumina_ds.checkpoint.saved_state import PieceRecord, SavedState, pieces_metadata
from lumina_ds.checkpoint.state import restore_random_state
from lumina_ds.checkpoint.tensor_file import CheckpointFile
from lumina_ds.cli.main import cli, run_command
from lumina_ds.errors import CheckpointError

FILE = optimizer_file_name(0)


def make_step(run, step, values=8):
    """A sound step folder of one rank with the one parameter `a`, its elements 0, 1, 2, ..."""
    staging = begin(run / "checkpoints", step)
    record = PieceRecord(shape=[values], start=0, numel=values, keys=["weight"], scalars={})
    tensors = {"a/weight": torch.arange(float(values))}
    entry = CheckpointFile(FILE, tensors, pieces_metadata({"a": record})).write(staging)
    return publish(staging, make_manifest(step=step, files={FILE: entry.model_dump()}), keep=9)


@pytest.fixture
def run(tmp_path):
    for step in (1, 2):
        make_step(tmp_path / "r", step)
    return tmp_path / "r"


def reseal(folder, content):
    (folder / "manifest.json").write_text(json.dumps(content | {"digest": manifest_digest(content)}))


def content_of(folder):
    content = json.loads((folder / "manifest.json").read_text())
    return {key: value for key, value in content.items() if key != "digest"}


def faults_of(folder):
    """Those of a folder that must be refused, each in one line."""
    faults = checkpoint_faults(folder)
    assert len(faults) == 1 and "\n" not in faults[0], faults
    return faults[0]


SECTIONS = sorted(manifest_content())
# Those of earlier versions lack it.
LATER = ["filled"]


@pytest.mark.parametrize("section", SECTIONS)
def test_a_manifest_that_lacks_or_mistypes_a_section_is_named_and_an_older_checkpoint_is_taken(run, section, caplog):
    folder = run / "checkpoints" / "step-00000002"
    whole = content_of(folder)
    assert checkpoint_faults(folder) == [] and sorted(whole) == sorted([*SECTIONS, *LATER])
    for wrong in (None, "text", [1], True, {"\n": 1}):
        if (section, wrong) in (("eval_loss", None), ("model", {"\n": 1})):  # no loss; a model of other fields
            continue
        reseal(folder, whole | {section: wrong})
        assert section in faults_of(folder), wrong
    reseal(folder, {key: value for key, value in whole.items() if key != section})
    assert section in faults_of(folder)
    assert newest_valid(run / "checkpoints").name == "step-00000001"
    assert "step-00000002 is damaged and is passed over" in caplog.text


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("filled",), -1), (("filled",), None), (("step",), -1), (("step",), 2.0), (("step",), "2"), (("files",), {}), (("files",), {"../x": None}),
        (("files", FILE, "bytes"), -1), (("files", FILE, "bytes"), "9"), (("files", FILE, "sha256"), 7),
        (("topology", "world_size"), 0), (("topology", "zero_stage"), 7), (("schedule", "rows_per_step"), 0),
        (("schedule", "rows_per_step"), True), (("data", "seed"), None), (("eval_loss",), "low"),
        (("health", "losses"), [None]), (("health", "passed_over"), [[1]]), (("health", "passed_over"), [[-1, 2]]),
        (("config", "train"), []), (("config", "inference"), {}), (("engine", "skipped_steps"), None),
        (("engine", "loss_scaler"), {"cur_scale": "x"}), (("engine", "group_step"), 1.5),
    ],
)  # fmt: skip
def test_a_mistyped_field_is_named(run, place, value):
    folder = run / "checkpoints" / "step-00000002"
    content = content_of(folder)
    section = content
    for key in place[:-1]:
        section = section[key]
    section[place[-1]] = value
    reseal(folder, content)
    assert place[0] in faults_of(folder)


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "3", '"x"', "{}", '{"files": 3}', "[" * 100_000, '{"a":' * 100_000, "9" * 5000, "\x00"]
)
def test_what_is_no_manifest_at_all(run, text, capsys):
    folder = run / "checkpoints" / "step-00000002"
    (folder / "manifest.json").write_text(text)
    assert "manifest.json" in faults_of(folder)
    assert newest_valid(run / "checkpoints").name == "step-00000001"
    assert run_command(cli, ["checkpoint", "list", str(run), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["checkpoints"]
    assert [row["name"] for row in listed if "fault" in row] == ["step-00000002"]
    for verb in (["verify", str(run)], ["consolidate", str(folder), "--out", str(run / "w")]):
        assert run_command(cli, ["checkpoint", *verb]) == 5
    assert run_command(cli, ["generate", str(folder), "--prompt", "x"]) == 5
    assert "Traceback" not in capsys.readouterr().err


def test_another_format_and_what_a_later_version_adds(run):
    folder = run / "checkpoints" / "step-00000002"
    content = content_of(folder)
    reseal(folder, content | {"format": 3})
    assert "has checkpoint format 3, this version reads 2" in faults_of(folder)
    reseal(folder, content | {"later": {"a": [1]}, "health": content["health"] | {"more": 2.5}})
    manifest = read_manifest(folder)
    again = json.loads(manifest.sealed())
    assert again["later"] == {"a": [1]} and again["health"]["more"] == 2.5
    assert again["digest"] == manifest_digest(again)


def test_a_list_of_step_folders(run):
    checkpoints = run / "checkpoints"
    (checkpoints / "step-00000001" / "manifest.json").unlink()
    damaged, sound = step_summaries([checkpoints / f"step-0000000{step}" for step in (1, 2)])
    assert "missing or unreadable" in damaged.fault and damaged.num_bytes is None
    size = (checkpoints / "step-00000002" / FILE).stat().st_size
    assert (sound.step, sound.num_bytes, sound.marks, sound.fault) == (2, size, ("latest",), "")
    assert sound.topology["zero_stage"] == 2


def with_header(path, change):
    """The file with its safetensors header changed by `change`, its values as they were."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def pieces(header, **changes):
    records = json.loads(header["__metadata__"]["lumina_pieces"])
    records["a"].update(changes)
    header["__metadata__"]["lumina_pieces"] = json.dumps(records)


HEADERS = [
    lambda header: header["a/weight"].update(data_offsets=[-16, 16]),
    lambda header: header["a/weight"].update(data_offsets=[4, 36]),
    lambda header: header["a/weight"].update(data_offsets=[0, 1 << 60]),
    lambda header: header["a/weight"].update(data_offsets="ab"),
    lambda header: header["a/weight"].update(dtype="U8", shape=[32]),
    lambda header: header["a/weight"].update(dtype="X7"),
    lambda header: header["a/weight"].update(shape=[-2, -4]),
    lambda header: header["a/weight"].update(shape=[2.0, 4]),
    lambda header: header["a/weight"].pop("dtype"),
    lambda header: header.update({"a/weight": 3}),
    lambda header: header.update(b=header["a/weight"]),
    lambda header: header.pop("__metadata__"),
    lambda header: header["__metadata__"].update(lumina_pieces="[" * 100_000),
    lambda header: header["__metadata__"].update(lumina_pieces="{}x"),
    lambda header: pieces(header, start=-1),
    lambda header: pieces(header, numel=9),
    lambda header: pieces(header, keys=["weight", "exp_avg"]),
    lambda header: pieces(header, keys="weight"),
    lambda header: pieces(header, shape=["8"]),
]


@pytest.mark.parametrize("change", HEADERS)
def test_a_header_that_does_not_fit_its_values_is_refused(run, change, tmp_path):
    folder = run / "checkpoints" / "step-00000002"
    consolidate(folder, tmp_path / "sound.safetensors", torch.float32)
    with_header(folder / FILE, change)
    with pytest.raises(CheckpointError, match=FILE) as raised:
        consolidate(folder, tmp_path / "w.safetensors", torch.float32)
    assert "\n" not in str(raised.value)


def test_a_piece_of_another_shape_is_refused(run):
    saved = SavedState(run / "checkpoints" / "step-00000002", [FILE])
    with pytest.raises(CheckpointError, match="has a as"):
        saved.keys_of("a", (4, 2))


@pytest.mark.parametrize("state", [{}, {"python": 3}, [1], {"python": (3, (1, 2), None), "torch": torch.zeros(3)}])
def test_a_random_state_that_is_none_is_refused(tmp_path, state):
    torch.save(state, tmp_path / "random-rank-0.pt")
    with pytest.raises(CheckpointError, match="is no random state of a run"):
        restore_random_state(tmp_path, 0, seed=1)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../x"}}', "[" * 100_000,
     '{"weight_map": {"a": "gone.safetensors"}}', '{"weight_map": {"a": ".."}}', '{"weight_map": {"a": ""}}'],
)  # fmt: skip
def test_an_index_of_weights_that_cannot_be_followed(tmp_path, content):
    index = tmp_path / "model.safetensors.index.json"
    save_file({"a": torch.zeros(1)}, tmp_path / "model-00001.safetensors")
    index.write_text('{"weight_map": {"a": "model-00001.safetensors"}}')
    assert weight_files(tmp_path) == [tmp_path / "model-00001.safetensors"]
    index.write_text(content)
    with pytest.raises(CheckpointError, match="index"):
        weight_files(tmp_path)
