"""Files as people write them: what DeepSpeed reads is read, and what it passes over is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lumina_ds.cli.main import cli, run_command
from lumina_ds.config.deepspeed.check import deepspeed_faults
from lumina_ds.config.deepspeed.compose import compose_deepspeed
from lumina_ds.config.deepspeed.tree import load_deepspeed_json
from lumina_ds.config.load import Override, load_config
from lumina_ds.errors import ConfigError
from lumina_ds.plan.states import ZeroSettings


@pytest.fixture
def written(tmp_path: Path):
    def write(text: str) -> str:
        path = tmp_path / "ds.json"
        path.write_text(text)
        return str(path)

    return write


def composed(path: str, **fields: object) -> dict:
    overrides = [Override("deepspeed.config", path, "--deepspeed_config"), Override("deepspeed.zero_stage", None, "-")]
    overrides += [Override(name.replace("__", "."), value, name) for name, value in fields.items()]
    return compose_deepspeed(load_config("debug", overrides).config, 2, "fp32")


@pytest.mark.parametrize(
    ("zero", "remedy"), [(3, '{"stage": 3}'), ("3", '{"stage": 3}'), ([], '{"stage": 2}'), (None, '{"stage": 2}')]
)
def test_a_stage_in_the_place_of_the_section_is_refused(written, capsys, zero, remedy):
    """DeepSpeed reads no stage from it; the run would train at its default stage."""
    [fault] = deepspeed_faults({"zero_optimization": zero})
    assert fault == f"zero_optimization is {zero!r}; it must be an object, such as {remedy}"
    path = written(json.dumps({"zero_optimization": zero}))
    with pytest.raises(ConfigError, match=r"zero_optimization is .* must be an object"):
        composed(path)
    assert run_command(cli, ["plan", "--config", "debug", "--gpus", "2", "--deepspeed_config", path]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and remedy in err
    assert run_command(cli, ["plan", "check", path]) == 2


def test_names_of_zero_3_stand_without_their_prefix_too(written):
    """DeepSpeed's model of the section is populated by name; so is ours, and the plan reads the same numbers."""
    short = {"stage": 3, "max_live_parameters": 11, "max_reuse_distance": 12, "prefetch_bucket_size": 13}
    short |= {"param_persistence_threshold": 14, "gather_16bit_weights_on_model_save": True}
    path = written(json.dumps({"zero_optimization": short}))
    assert deepspeed_faults(load_deepspeed_json(path)) == []
    json_of_run = composed(path)
    zero = ZeroSettings.from_json(json_of_run, 4)
    assert (zero.max_live_parameters, zero.max_reuse_distance) == (11, 12)
    assert (zero.prefetch_bucket_size, zero.persistence_threshold) == (13, 14)
    assert json_of_run["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
    model = pytest.importorskip("deepspeed").runtime.zero.config.DeepSpeedZeroConfig
    by_name, by_alias = model(**short), model(**json_of_run["zero_optimization"])
    for name in short:
        assert getattr(by_name, name) == getattr(by_alias, name), name


def test_both_names_of_one_setting_are_refused(written):
    path = written('{"zero_optimization": {"max_live_parameters": 1, "stage3_max_live_parameters": 2}}')
    with pytest.raises(ConfigError, match="max_live_parameters is stage3_max_live_parameters, and both are there"):
        load_deepspeed_json(path)


HJSON = """{
  // DeepSpeed reads Hjson: comments of three kinds,
  # words without quotes, and trailing commas.
  "zero_optimization": {"stage": 2, /* as most do */ "overlap_comm": false,},
  gradient_clipping: auto
}
"""


def test_comments_and_trailing_commas_are_read_as_deepspeed_reads_them(written):
    path = written(HJSON)
    expected = {"zero_optimization": {"stage": 2, "overlap_comm": False}, "gradient_clipping": "auto"}
    assert load_deepspeed_json(path) == expected
    with open(path) as stream:
        assert pytest.importorskip("hjson").load(stream) == expected
    assert composed(path)["zero_optimization"]["stage"] == 2


@pytest.mark.parametrize("text", ['{"a": 1, // x\n "a": 2,}', '{"a": {', "// nothing", ""])
def test_what_neither_reader_takes_is_refused(written, text):
    with pytest.raises(ConfigError, match="is not valid JSON"):
        load_deepspeed_json(written(text))
