"""Files as people write them: what DeepSpeed reads is read, and what it passes over is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lumina_ds.cli.main import cli, run_command
from lumina_ds.config.deepspeed.check import deepspeed_faults
from lumina_ds.config.deepspeed.compose import compose_deepspeed
from lumina_ds.config.deepspeed.keys import table
from lumina_ds.config.deepspeed.report import report_on_run
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


LIES = [
    ('{"a":' * 100_000, "is nested deeper than 32 levels"),
    ('{"a":' * 60 + "1" + "}" * 60, "it is nested deeper than 32 levels"),
    ("{a: " * 60 + "1\n" + "}" * 60, "it is nested deeper than 32 levels"),
    ('{"gradient_clipping": NaN}', "gradient_clipping is nan; write a finite number"),
    ('{"gradient_clipping": 1e999}', "gradient_clipping is inf; write a finite number"),
    ('{"zero_optimization": {"stage": %s}}' % ("9" * 30), "zero_optimization.stage is 999"),
    ('{"train_batch_size": %s}' % ("9" * 500_000), "a number of 500000 digits is beyond any use"),
    ("{\n" + "".join(f"k{n}: 1\n" for n in range(60_000)) + "}", "it holds above 4000 values"),
    ('{"a": "\xff"}'.encode("latin-1"), "is not UTF-8: byte 0xff in line 1"),
    (" " * (1 << 20) + "{}", "is larger than 1,048,576 bytes"),
]


@pytest.mark.parametrize(("text", "fault"), LIES, ids=range(len(LIES)))
def test_a_file_that_lies_is_one_line(tmp_path, text, fault):
    path = tmp_path / "ds.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as error:
        load_deepspeed_json(str(path))
    assert fault in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500


def test_of_thousands_of_unknown_keys_the_first_are_named(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({f"zero_optimisation{n}": 1 for n in range(3000)} | {"k" * 100_000: "v" * 100_000}))
    with pytest.raises(ConfigError) as error:
        compose_deepspeed(load_config("debug", [Override("deepspeed.config", str(path), "x")]).config, 2, "fp32")
    assert str(error.value).startswith("3001 faults:") and str(error.value).endswith("and 2981 more")
    assert len(str(error.value)) < 5000


def test_every_key_takes_or_refuses_every_kind_of_value(tmp_path):
    """No value of the wrong type, of any key that DeepSpeed reads, is a traceback."""
    path = tmp_path / "ds.json"
    config = load_config("debug", [Override("deepspeed.config", str(path), "x")]).config
    for section, keys in table().sections.items():
        for key in keys:
            for value in (True, None, [], {}, "x", -1, 1.5, 10**17, [1], {"a": 1}):
                tree = value
                for part in reversed(f"{section}.{key}".strip(".").replace("*", "own").split(".")):
                    tree = {part: tree}
                path.write_text(json.dumps(tree))
                report = report_on_run(config, 2, "fp32")
                # Either DeepSpeed gets the JSON, or each fault is one line that names the key or what stands around it.
                assert (report.composed is None) is bool(report.faults), (section, key, value)
                names = [part for part in (*section.split("."), key) if part]
                assert all(any(name in fault for name in names) for fault in report.faults), (report.faults, key, value)
