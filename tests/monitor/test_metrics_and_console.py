import csv
import io
import json
import math

import pytest
from rich.console import Console

from lumina_ds.monitor.console import TrainingConsole, training_figures
from lumina_ds.monitor.records import EvaluationRecord, StepRecord
from lumina_ds.monitor.writers import MetricsWriter, append_record, csv_columns, read_records, set_records_aside

RECORD = {
    "step": 7,
    "epoch": 0.25,
    "loss": 1 / 3,
    "perplexity": math.exp(1 / 3),
    "learning_rate": 3e-4,
    "grad_norm": 1.25,
    "load_balancing_loss": 1.0,
    "router_z_loss": 0.5,
    "tokens": 4096,
    "tokens_per_second": 12345.6,
    "memory_bytes": 3 * 2**29,
    "skipped": 0,
    "expert_usage": [[0.5, 0.5]],
}


def test_floats_keep_all_their_digits_in_both_files(tmp_path):
    MetricsWriter(tmp_path, 0).write(StepRecord(**RECORD))
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == RECORD
    with open(tmp_path / "metrics.csv", newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert float(row["loss"]) == 1 / 3 and list(row) == csv_columns()


def test_resuming_takes_out_the_steps_that_no_checkpoint_holds(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    for step in (1, 2, 3):
        writer.write(StepRecord(**RECORD | {"step": step}))
    with open(tmp_path / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 4, "lo')  # cut short by a crash
    MetricsWriter(tmp_path, 2).write(StepRecord(**RECORD | {"step": 3, "loss": 9.0}))
    records = read_records(tmp_path / "metrics.jsonl")
    assert [(record["step"], record["loss"]) for record in records] == [(1, 1 / 3), (2, 1 / 3), (3, 9.0)]
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 4


def test_non_finite_numbers_become_null(tmp_path):
    append_record(tmp_path / "m.jsonl", {"step": 1, "loss": math.nan, "perplexity": math.inf})
    assert json.loads((tmp_path / "m.jsonl").read_text()) == {"step": 1, "loss": None, "perplexity": None}


FIGURES = "epoch 0.25|step 7/100|loss 0.3333|PPL 1.40|LR 3.00e-04|grad 1.250|12,346 tok/s|mem 1.50 GiB|ZeRO-2 EP2 fp32"


def test_the_figures_hold_everything():
    assert training_figures(StepRecord(**RECORD), 100, "ZeRO-2 EP2 fp32", 2) == [*FIGURES.split("|"), "2 ranks"]


@pytest.mark.parametrize("width", [50, 80, 100, 120, 200])
def test_on_a_terminal_nothing_wraps_inside_a_figure(width):
    console, written = TrainingConsole(100, 100, "ZeRO-2 EP2 fp32", 2), io.StringIO()
    console._console = Console(file=written, force_terminal=True, width=width, color_system=None)
    console.start(6)
    console.show(StepRecord(**RECORD))
    console.stop()
    lines = [line.rstrip() for line in written.getvalue().replace("\x1b", "\n\x1b").splitlines()]
    [history] = [line for line in lines if "epoch" in line and "step" in line]
    figures = [*FIGURES.split("|"), "2 ranks"]
    shown = history[history.index("epoch") :].split("  ")
    assert shown == figures[: len(shown)] and len("  ".join(shown)) <= width
    # As many as fit, and beside the bar all of them.
    assert shown == figures or len("  ".join(figures[: len(shown) + 1])) > width
    assert all(any(figure in line for line in lines) for figure in figures)
    assert any("7/100" in line and "left" in line for line in lines)


def test_plain_lines_in_a_pipe_first_last_and_one_a_second(capsys):
    console = TrainingConsole(60, 50, "ZeRO-1 EP1 fp32", 1)
    console.start(0)
    for step in range(1, 51):
        console.show(StepRecord(**RECORD | {"step": step}))
    console.say("saved")
    console.stop()
    lines = capsys.readouterr().out.splitlines()
    assert "step 1/60" in lines[0] and "step 50/60" in lines[-2] and lines[-1] == "saved"
    assert len(lines) < 10


def test_records_of_an_earlier_life_are_set_aside_under_the_first_number_that_is_free(tmp_path):
    assert set_records_aside(tmp_path) == (0, [])
    for life, last in ((1, 3), (2, 2)):
        writer = MetricsWriter(tmp_path, 0)
        writer.write_evaluation(EvaluationRecord(0, 2.0, 7.4, 10))
        for step in range(1, last + 1):
            writer.write(StepRecord(step=step, loss=1.0 * life))
        writer.close()
        names = [f"metrics.{life}.jsonl", f"metrics.{life}.csv", f"evaluations.{life}.jsonl"]
        assert set_records_aside(tmp_path) == (last, names)
        assert [record["loss"] for record in read_records(tmp_path / names[0])] == [life] * last
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(f"evaluations.{life}.jsonl" for life in (1, 2)),
        *(f"metrics.{life}.{end}" for life in (1, 2) for end in ("csv", "jsonl")),
    ]  # fmt: skip


def test_empty_files_of_a_life_without_a_step_are_not_kept(tmp_path):
    MetricsWriter(tmp_path, 0).close()
    assert set_records_aside(tmp_path) == (0, [])
