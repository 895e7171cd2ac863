"""Folders in Hugging Face's format that lie: every field, name and size is right, or one line, at once. faults.md S3."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_export_and_import import FOREIGN, MODELS, write_weights

from lumina_ds.cli.main import cli, run_command
from lumina_ds.errors import CheckpointError, ConfigError
from lumina_ds.export.folder import export_model
from lumina_ds.export.foreign_config import KINDS, model_from_hugging_face

NO_EXPERTS = {name: value for name, value in FOREIGN.items() if "expert" not in name}
FAMILIES = {
    "mixtral": FOREIGN,
    "llama": NO_EXPERTS | {"model_type": "llama"},
    "qwen3": NO_EXPERTS | {"model_type": "qwen3", "head_dim": 8},
    "qwen3_moe": NO_EXPERTS
    | {"model_type": "qwen3_moe", "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2}
    | {"moe_intermediate_size": 16, "norm_topk_prob": True},
    "glm4_moe": NO_EXPERTS
    | {"model_type": "glm4_moe", "head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
    | {"moe_intermediate_size": 16, "norm_topk_prob": True, "first_k_dense_replace": 1, "partial_rotary_factor": 1.0},
}
OF_ROPE = ("rope_theta", "rope_type", "partial_rotary_factor")
NAMES = [
    *KINDS,
    "model_type",
    "quantization_config",
    *(f"rope_parameters.{name}" for name in OF_ROPE),
    "rope_scaling.type",
]
# Right for no field.
NEVER = [-1, math.nan, math.inf, 10**400, "x", "8", [1, "a"], [[]], {"rope_type": 5}]
SOMETIMES = [None, True, False, 0, 1, 2.5, 10**9, 1e-320, [], {}]


def changed(config: dict, name: str, value: object) -> dict:
    section, _, key = name.rpartition(".")
    return config | ({section: {key: value}} if section else {key: value})


@pytest.mark.parametrize("family", FAMILIES)
def test_no_value_of_any_field_is_a_traceback(family):
    config = FAMILIES[family]
    assert model_from_hugging_face(config).hidden_size == 48
    for name in NAMES:
        for value in (*NEVER, *SOMETIMES):
            try:
                model = model_from_hugging_face(changed(config, name, value))
            except ConfigError as error:
                assert len(str(error)) < 1500
                continue
            assert not any(value is each for each in NEVER), (name, value)
            assert model.num_experts <= 65_536 and model.num_hidden_layers <= 10_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"hidden_size": "48"},
            "config.json has hidden_size '48', and it must be a whole number, 0 or above; take the file",
        ),
        ({"hidden_size": True}, "hidden_size True, and it must be a whole number"),
        ({"hidden_size": 48.0}, "hidden_size 48.0, and it must be a whole number"),
        ({"rope_theta": math.nan}, "rope_theta nan, and it must be a number"),
        ({"rms_norm_eps": 0}, "config.json has rms_norm_eps 0: Input should be greater than 0"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings 1, and it must be true or false"),
        ({"rope_parameters": [1]}, r"rope_parameters \[1\], and it must be an object"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_parameters.rope_theta 'x', and it must be a number"),
        (
            {"rope_parameters": {"rope_theta": 1e4}},
            "rope_theta 1000000.0, and 10000.0 in rope_parameters; keep the right",
        ),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor 0.5, and this model rotates the whole",
        ),
        ({"num_hidden_layers": 20_000}, "num_hidden_layers 20000: Input should be less than or equal to 10000; take"),
        ({"num_local_experts": 10**9}, "num_local_experts 1000000000: Input should be less than or equal to 65536"),
        ({"num_local_experts": 0}, r"no experts \(num_local_experts 0\), and mixtral is made of them"),
        ({"num_experts": 8}, "num_experts 8 and num_local_experts 4, which say the same thing; keep the right one"),
        ({"hidden_act": None}, "hidden_act None, which this model cannot compute"),
        ({"model_type": {"a": 1}}, "model_type {'a': 1}; only llama"),
        ({"mlp_only_layers": list(range(1, 100_000))}, r"mlp_only_layers \[1, 2, .*\.\.\.; only the first layers"),
        ({"hidden_size": 50}, "config.json does not fit itself: model.hidden_size 50 is not divisible"),
    ],
)
def test_a_field_is_named_with_its_value_and_the_remedy(change, message):
    with pytest.raises(ConfigError, match=message):
        model_from_hugging_face(FOREIGN | change)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, corpus) -> Path:
    folder = tmp_path_factory.mktemp("lies")
    write_weights(MODELS["mixtral"], folder / "ours")
    export_model(MODELS["mixtral"], folder / "ours", corpus.tokenizer, folder / "out")
    return folder / "out"


@pytest.fixture
def folder(exported, tmp_path) -> Path:
    """A copy that a test may damage."""
    (tmp_path / "model").mkdir()
    for path in exported.iterdir():
        (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "model"


def refused(capsys, code: int, *words: object) -> str:
    capsys.readouterr()
    assert run_command(cli, [str(word) for word in words]) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and len(error) < 700
    return error


@pytest.mark.parametrize(
    "change",
    [{"num_hidden_layers": 9_999}, {"num_local_experts": 65_000}, {"vocab_size": 2**31}, {"hidden_size": 2**20}],
)
def test_a_model_beyond_its_weights_is_refused_before_it_is_built(change, folder, tmp_path, capsys, monkeypatch):
    """That nothing of the declared size is made shows in that a model cannot be made here at all."""
    monkeypatch.setattr("lumina_ds.model.transformer.CausalLM.__init__", None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    for verb in (["import", folder, "--out", tmp_path / "start"], ["generate", folder, "--prompt", "x"]):
        line = refused(capsys, CheckpointError.exit_code, *verb)
        assert f"{folder} declares " in line and "and its weights hold" in line and "from one source again" in line
    (tmp_path / "llama.cpp").mkdir()
    gguf = ["gguf", folder, "--llama-cpp", tmp_path / "llama.cpp", "--out", tmp_path / "x.gguf"]
    assert "and its weights hold" in refused(capsys, CheckpointError.exit_code, *gguf)


def test_an_imported_model_beyond_its_weights_is_refused_before_it_is_built(folder, tmp_path, capsys, monkeypatch):
    assert run_command(cli, ["import", str(folder), "--out", str(tmp_path / "start")]) == 0
    made = json.loads((tmp_path / "start" / "import.json").read_text())
    monkeypatch.setattr("lumina_ds.model.transformer.CausalLM.__init__", None)
    for change in ({"num_hidden_layers": 9_999}, {"hidden_size": 6 * 2**16}):
        (tmp_path / "start" / "import.json").write_text(json.dumps(made | {"model": made["model"] | change}))
        for verb in (
            ["generate", tmp_path / "start", "--prompt", "x"],
            ["export", tmp_path / "start", "--out", tmp_path / "e"],
        ):
            assert "and its weights hold" in refused(capsys, CheckpointError.exit_code, *verb)


JSON = [
    ('{"a":' * 100_000, "nested deeper than 100"),
    ("[1]", "holds no JSON object"),
    ('{"vocab_size": ' + "9" * 100_000 + "}", "a number of more than 4300 digits"),
    (b'{"a": "\xff"}', "invalid UTF-8 at byte 7"),
    ("", "invalid JSON: Expecting value"),
]


@pytest.mark.parametrize(("text", "fault"), JSON, ids=range(len(JSON)))
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_json_file_that_lies_is_one_line(text, fault, name, folder, tmp_path, capsys):
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    code = 3 if name == "config.json" else 5
    line = refused(capsys, code, "import", folder, "--out", tmp_path / "start")
    assert str(folder / name) in line and (fault in line or "is no index of weight files" in line)


def test_names_and_links_stay_in_the_folder(folder, tmp_path, capsys):
    save_file({"x": torch.ones(2)}, tmp_path / "other.safetensors")
    index = folder / "model.safetensors.index.json"
    written = index.read_text()
    words = ("import", folder, "--out", tmp_path / "start")
    for name in ("../other.safetensors", str(tmp_path / "other.safetensors"), "..", "", "a/b", 5, None, ["x"]):
        index.write_text(json.dumps({"weight_map": {"x": name}}))
        assert "damaged" in refused(capsys, 5, *words)
    index.write_text(written)
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    for place in (tmp_path / "other.safetensors", "/dev/zero", "/etc/passwd"):
        weights.unlink()
        weights.symlink_to(place)
        assert (
            "is a link that leads out of the folder" in (line := refused(capsys, 5, *words))
            or "a device, not a plain file" in line
        )
        index.unlink()
        assert (
            "is a link that leads out of the folder" in (line := refused(capsys, 5, *words))
            or "a device, not a plain file" in line
        )
        index.write_text(written)
    for name in ("model.safetensors", "model.safetensors.index.json", "config.json"):
        before = content if name == "model.safetensors" else (folder / name).read_bytes()
        (folder / name).unlink()
        os.mkfifo(folder / name)
        assert "is a FIFO, not a plain file" in refused(capsys, 3 if name == "config.json" else 5, *words)
        (folder / name).unlink()
        (folder / name).write_bytes(before)
    assert run_command(cli, [str(word) for word in words]) == 0


def test_the_hubs_cache_of_links_is_read(folder, tmp_path, capsys):
    """models--x/snapshots/REVISION holds links to models--x/blobs."""
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "main"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(folder.iterdir()):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(blobs / str(number))
    assert run_command(cli, ["import", str(snapshot), "--out", str(tmp_path / "start")]) == 0
