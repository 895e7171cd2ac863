"""`lumina config`: what it shows, writes and explains is what the reader takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lumina_ds.cli.config import dotted_values
from lumina_ds.cli.main import cli, run_command
from lumina_ds.config.config_file import commented_yaml, json_schema
from lumina_ds.config.fields import all_fields
from lumina_ds.config.load import dotted_fields, load_config, preset_names
from lumina_ds.config.schema import RunConfig


def printed(capsys: Any, *words: str, code: int = 0) -> str:
    capsys.readouterr()
    assert run_command(cli, ["config", *words]) == code
    out, err = capsys.readouterr()
    assert (err == "") is (code == 0) and err.count("\n") <= 1, err
    return out + err


def test_every_field_has_words() -> None:
    fields = all_fields()
    assert list(fields) == dotted_fields(RunConfig)
    assert all(field.kind and field.meaning and field.default_text for field in fields.values())


def test_show(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    everything = json.loads(printed(capsys, "show", "debug", "--json"))
    assert list(everything) == dotted_fields(RunConfig)
    changed = json.loads(printed(capsys, "show", "debug", "train.seed=7", "--epochs", "3", "--changed", "--json"))
    assert changed["train.seed"] == {"value": 7, "default": 42, "origin": "command line --train.seed"}
    assert changed["model.num_experts"]["origin"] == "preset debug" and "train.weight_decay" not in changed
    assert all(row["value"] != row["default"] for row in changed.values())
    monkeypatch.setenv("COLUMNS", "120")
    assert "train.seed" in printed(capsys, "show", "--config", "debug", "--train.seed", "8")
    Path("run").mkdir()
    Path("run/config.yaml").write_text("preset: debug\ntrain: {seed: 5}\n")
    assert json.loads(printed(capsys, "show", "run", "--json"))["train.seed"]["value"] == 5
    assert "unknown field train.sed" in printed(capsys, "show", "debug", "train.sed=7", code=2)


@pytest.mark.parametrize("preset", preset_names())
def test_init_says_what_the_preset_says(preset: str, tmp_path: Path, capsys: Any) -> None:
    text = commented_yaml(preset)
    (tmp_path / "run.yaml").write_text(text)
    assert load_config(str(tmp_path / "run.yaml")).config == load_config(preset).config
    # With every field's # taken away it says the same, in full.
    lines = text.splitlines()
    fields = {name.rpartition(".")[2] for name in all_fields()}
    whole = []
    for line in lines:
        head = line.lstrip(" ")
        begins = head.startswith("# ") and head[2:].partition(":")[0] in fields and "(" not in head.partition(":")[0]
        goes_on = (whole and head.startswith("# - ")) or head.startswith("#   ")
        whole.append(line.replace("# ", "", 1) if (begins or goes_on) and line.startswith(" ") else line)
    (tmp_path / "whole.yaml").write_text("\n".join(whole))
    assert load_config(str(tmp_path / "whole.yaml")).config == load_config(preset).config
    assert sum(len(section) for section in yaml.safe_load("\n".join(whole)).values() if isinstance(section, dict)) > 80
    assert max(map(len, lines)) <= 120


def test_init_writes_once(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "run.yaml"
    assert f"train with: lumina train {out}" in printed(capsys, "init", "b1", "--out", str(out))
    assert out.read_text() == commented_yaml("b1")
    assert out.read_text().startswith("# yaml-language-server: $schema=lumina.schema.json\n")
    assert json.loads((tmp_path / "lumina.schema.json").read_text()) == json_schema()
    assert "exists; give another --out" in printed(capsys, "init", "b7", "--out", str(out), code=2)
    assert "did you mean b1?" in printed(capsys, "init", "b1x", code=2)


def test_the_schema_takes_what_the_reader_takes(capsys: Any) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(printed(capsys, "schema"))
    judge = jsonschema.Draft202012Validator(schema)
    judge.check_schema(schema)
    for preset in preset_names():
        judge.validate(load_config(preset).config.model_dump(mode="json"))
        judge.validate(yaml.safe_load(commented_yaml(preset)))
    judge.validate({"train": {"save_every_n_steps": 5}})
    wrong = [
        {"train": {"sed": 1}}, {"train": {"seed": "x"}}, {"model": {"num_experts": -1}}, {"modl": {}},
        {"train": {"optimizer": "adamv"}}, {"deepspeed": {"zero_stage": 4}}, {"run": {"name": "a/b"}},
    ]  # fmt: skip
    for values in wrong:
        assert not judge.is_valid(values), values
        with pytest.raises(ValueError):
            RunConfig.model_validate(values)


def test_diff(tmp_path: Path, capsys: Any) -> None:
    found = json.loads(printed(capsys, "diff", "b1", "b7", "--json"))
    one, other = (dotted_values(load_config(name).config.model_dump()) for name in ("b1", "b7"))
    assert found == {name: [one[name], other[name]] for name in one if one[name] != other[name]}
    assert "model.hidden_size" in printed(capsys, "diff", "b1", "b7")
    (tmp_path / "config.yaml").write_text("preset: b1\ntrain: {seed: 5}\n")
    assert json.loads(printed(capsys, "diff", "b1", str(tmp_path), "--json")) == {"train.seed": [42, 5]}
    assert "b1 and b1 say the same" in printed(capsys, "diff", "b1", "b1")
    assert "neither a preset nor a file" in printed(capsys, "diff", "b1", "b99", code=2)


def test_explain(capsys: Any) -> None:
    text = printed(capsys, "explain", "train.learning_rate")
    assert all(word in text for word in ("train.learning_rate", "above 0", "--learning-rate", "default"))
    assert printed(capsys, "explain", "learning_rate") == text == printed(capsys, "explain", "--learning-rate")
    section = printed(capsys, "explain", "deepspeed")
    assert section.startswith("deepspeed: ") and "deepspeed.zero_stage" in section and "train." not in section
    [record] = json.loads(printed(capsys, "explain", "train.optimizer", "--json"))
    assert record["default"] == "adamw" and "adamw" in record["type"]
    assert "did you mean train.learning_rate?" in printed(capsys, "explain", "train.learning_rat", code=2)
