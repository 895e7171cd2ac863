"""`lumina presets` and `lumina plan`: their JSON, their screens, their errors, and that they answer at once."""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import pytest

from lumina_ds.config.load import preset_names


def test_list_as_json_is_sorted_by_size(run_cli):
    code, out, _ = run_cli("presets", "list", "--json")
    records = json.loads(out)
    assert code == 0
    assert sorted(record["name"] for record in records) == preset_names()
    totals = [record["parameters"]["total"] for record in records]
    assert totals == sorted(totals)
    assert run_cli("presets", "--json")[1] == out


def test_presets_alone_lists(run_cli):
    code, out, _ = run_cli("presets")
    assert code == 0
    assert all(name in out for name in preset_names())
    assert "7.06B" in out and "16 (top 2)" in out


def test_show_as_json(run_cli):
    code, out, _ = run_cli("presets", "show", "debug", "--json")
    record = json.loads(out)
    assert code == 0
    assert record["parameters"]["total"] == 501_376
    assert record["parameters"]["active"] == 366_208
    assert record["parameters"]["embedding"] == 131_072
    assert record["parameters"]["attention"] == 98_304
    assert record["parameters"]["experts"] == 270_336
    assert record["parameters"]["bf16_bytes"] == 1_002_752
    assert record["model"]["num_experts"] == 4


def test_show_as_text(run_cli):
    code, out, _ = run_cli("presets", "show", "b7")
    assert code == 0
    assert "7,055,632,384" in out and "rope_theta" in out


def test_show_of_an_unknown_preset(run_cli):
    code, out, err = run_cli("presets", "show", "b77")
    assert (code, out) == (2, "")
    assert err == "error: no preset 'b77'; did you mean b7? (see: lumina presets list)\n"


def test_plan_as_json(run_cli):
    code, out, _ = run_cli("plan", "--config", "b7", "--gpus", "8", "--zero", "3", "--expert-parallel", "4", "--json")
    record = json.loads(out)
    assert code == 0
    assert (record["zero_stage"], record["world_size"], record["expert_parallel_size"]) == (3, 8, 4)
    assert record["precision"] == "bf16"
    assert record["peak_bytes"] == sum(record["phases"][record["peak_phase"]].values())
    assert record["peak_bytes"] == max(sum(phase.values()) for phase in record["phases"].values())
    cells = {(cell["zero_stage"], cell["expert_parallel_size"], cell["gpus"]): cell for cell in record["grid"]}
    # EP 1, 2, 4, 8 and 16 of 16 experts.
    assert len(cells) == 4 * 5 * 7
    assert cells[3, 4, 8]["peak_bytes"] == record["peak_bytes"]
    assert cells[0, 1, 8]["peak_bytes"] is None and not cells[0, 1, 8]["fits"]
    # Two ranks cannot share experts among four.
    assert cells[3, 4, 2]["peak_bytes"] is None
    assert cells[1, 8, 8]["peak_bytes"] < cells[1, 1, 8]["peak_bytes"]
    assert record["moments"]["step"] == "step of the largest group"


def test_plan_takes_every_setting(run_cli):
    args = "--config debug --gpus 2 --micro-batch 3 --seq-length 128 --precision mixed_bf16 --device cpu --json"
    record = json.loads(run_cli("plan", *args.split(), "--activation-checkpointing", "full")[1])
    assert (record["micro_batch_size"], record["seq_length"]) == (3, 128)
    assert (record["precision"], record["device"], record["activation_checkpointing"]) == ("mixed_bf16", "cpu", "full")
    assert record["grid"] == [] and record["fits_on_gb"] is None


def test_plan_as_text(run_cli):
    code, out, _ = run_cli("plan", "--config", "b7", "--gpus", "8")
    assert code == 0
    for text in ("7.06B parameters", "ZeRO 2", "master weights", "Peak ", "Fits on cards of: ", "✔", "✖"):
        assert text in out


def test_a_larger_card_fits_more(run_cli):
    def fitting(memory):
        out = run_cli("plan", "--config", "b14", "--gpu-memory", memory, "--json")[1]
        return sum(cell["fits"] for cell in json.loads(out)["grid"])

    assert fitting("24") < fitting("80") < fitting("192")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--config", "b77"), "--config b77 is neither a preset nor a file; did you mean b7?"),
        (("--config", "b7", "--seq-length", "9000"), "data.seq_length 9000 is above the context of 4096 tokens"),
        (("--config", "b7", "--gpus", "13", "--expert-parallel", "8"), "use 8 or 16 ranks, or --expert-parallel 1"),
        (("--config", "b7", "--zero", "0"), "ZeRO stage 0 with bf16"),
        (("--config", "b7", "--gpus", "0"), "0 is not in the range x>=1"),
        (("--config", "b7", "--deepspeed_config", "zero9"), "is neither a file nor a shipped configuration"),
    ],
)
def test_errors_are_one_line_with_code_2(run_cli, args, message):
    code, out, err = run_cli("plan", *args)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_fp16_on_a_cpu_is_the_machines_fault(run_cli):
    code, _, err = run_cli("plan", "--config", "debug", "--device", "cpu", "--precision", "fp16")
    assert code == 4
    assert "fp16 is not possible on a CPU" in err


def test_plan_answers_at_once_and_without_torch():
    script = (
        "import sys; from lumina_ds.cli.main import cli, run_command;"
        "code = run_command(cli, ['plan', '--config', 'b300', '--gpus', '64', '--json']);"
        "assert not {'torch', 'deepspeed', 'numpy'} & set(sys.modules); sys.exit(code)"
    )
    imports = "import click, pydantic, yaml"  # what every command needs

    def seconds(program: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # A ratio, since a busy or slow machine needs more of the CPU for both; about 5.4 on an idle one.
    assert min(seconds(script) for _ in range(3)) < 8 * min(seconds(imports) for _ in range(3))


@pytest.mark.parametrize("args", [("presets", "--help"), ("presets", "show", "--help"), ("plan", "--help")])
def test_help_has_an_example(run_cli, args):
    code, out, _ = run_cli(*args)
    assert code == 0
    assert "Example: lumina " in out
