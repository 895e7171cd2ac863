"""The table of metrics: typed records to lines and back, and a metric that is added from outside the package."""

import csv
import json
import math
import xml.etree.ElementTree as ET
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest

from lumina_ds.monitor.metrics import Metric
from lumina_ds.monitor.reading import last_step, read_lines
from lumina_ds.monitor.records import METRICS, EvaluationRecord, StepRecord, add_metric
from lumina_ds.monitor.writers import MetricsWriter, read_records

# What other programs read: the keys of a run's lines in their order, and the columns of its CSV.
KEYS = [
    "step",
    "time",
    "epoch",
    "loss",
    "perplexity",
    "learning_rate",
    "grad_norm",
    "load_balancing_loss",
    "router_z_loss",
    "tokens",
    "trained_tokens",
    "step_seconds",
    "tokens_per_second",
    "data_seconds",
    "memory_bytes",
    "skipped",
    "anomaly_score",
    "host_memory_bytes",
    "host_memory_available_bytes",
    "disk_free_bytes",
    "expert_usage",
    "usage_entropy",
    "router_entropy",
    "max_violation",
    "dead_experts",
    "samples",
]
COLUMNS = [
    "step",
    "epoch",
    "loss",
    "perplexity",
    "learning_rate",
    "grad_norm",
    "load_balancing_loss",
    "router_z_loss",
    "tokens",
    "tokens_per_second",
    "data_seconds",
    "memory_bytes",
    "skipped",
    "anomaly_score",
    "host_memory_available_bytes",
    "disk_free_bytes",
]


@pytest.mark.quick
def test_a_metric_from_outside_is_recorded_and_drawn(run_ranks, corpus, tmp_path):
    """Real steps in a process of its own, in which alone the metric exists."""
    runs = tmp_path / "runs"
    worker = Path(__file__).parent / "added_metric_worker.py"
    assert run_ranks(worker, str(runs), str(corpus.shards), world_size=1) == 0
    lines = (runs / "added/metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [list(record) for record in records] == [[*KEYS, "trained_share"]] * 3
    tokens = [0, *(record["tokens"] for record in records)]
    shares = [
        record["trained_tokens"] / (after - before)
        for record, before, after in zip(records, tokens, tokens[1:], strict=False)
    ]
    assert [record["trained_share"] for record in records] == shares and 0 < min(shares) < 1
    with open(runs / "added/metrics.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == [*COLUMNS, "trained_share"]
    assert [float(row["trained_share"]) for row in rows] == shares
    page = (runs / "added/report.html").read_text()
    figure = page[page.index("<h3>Share of label tokens") :]
    drawn = ET.fromstring(figure[figure.index("<svg") : figure.index("</svg>") + len("</svg>")])
    assert len(drawn.find("polyline").attrib["points"].split()) == 3
    assert f"Share of label tokens, step 3: {shares[2] * 100:.5g}" in [title.text for title in drawn.iter("title")]
    assert f"trained {shares[0]:.1%}" in (tmp_path / "rank-0.log").read_text()


@pytest.mark.parametrize(("label_tokens", "loss", "perplexity"), [(4, 0.0, 1.0), (0, None, None)])
def test_a_step_without_label_tokens_has_no_loss(tmp_path, label_tokens, loss, perplexity):
    """A loss of 0 among tokens that were trained stays what it is."""
    facts = SimpleNamespace(outcome=SimpleNamespace(loss=0.0), counts=SimpleNamespace(trained_tokens=label_tokens))
    record = StepRecord(step=1, loss=METRICS["loss"].of(facts), perplexity=METRICS["perplexity"].of(facts))
    with closing(MetricsWriter(tmp_path, 0)) as writer:
        writer.write(record)
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert (line["loss"], line["perplexity"]) == (loss, perplexity)


def test_a_taken_name_is_refused():
    for name in ("loss", "others"):
        with pytest.raises(ValueError, match=f"there is a metric {name} already"):
            add_metric(name, Metric("again", lambda step: 1))


def test_every_metric_says_what_it_is_and_once():
    meanings = [metric.meaning for metric in METRICS.values()]
    assert all(meanings) and len(set(meanings)) == len(meanings)
    titles = [metric.plot.title for metric in METRICS.values() if metric.plot]
    assert len(set(titles)) == len(titles)


def test_a_line_becomes_a_record_and_the_same_line_again():
    line = {"step": 7, "loss": 0.1 + 0.2, "dead_experts": [0, 2], "of_another_version": {"a": [1]}}
    record = StepRecord.read(line)
    assert (record.step, record.loss, record.dead_experts) == (7, 0.30000000000000004, [0, 2])
    assert record.grad_norm is None and record.others == {"of_another_version": {"a": [1]}}
    assert record.values() == line and record.value("of_another_version") == {"a": [1]}


@pytest.mark.parametrize("value", [None, "1", True, [1.0], {}])
def test_a_damaged_number_is_none_of_the_metrics(value):
    assert math.isnan(StepRecord.read({"step": 1, "loss": value}).loss)
    assert math.isnan(EvaluationRecord.read({"step": 1, "loss": value}).loss)


@pytest.mark.parametrize("value", [None, 5, "x", {}])
def test_a_damaged_list_is_left_out(value):
    assert StepRecord.read({"step": 1, "dead_experts": value}).dead_experts is None


@pytest.mark.parametrize("line", [[1], 3, None, {}, {"step": "1"}, {"step": -1}, {"step": True}, {"step": 1 << 41}])
def test_what_has_no_step_is_no_record(line):
    assert StepRecord.read(line) is None and EvaluationRecord.read(line) is None


def test_damaged_lines_are_numbered_and_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\x00\xff\n\n{"loss": 1}\n{"step": 9, "loss": 2.5}\n{"step": 10, "lo')
    bad = []
    assert [record.step for record in read_lines(path, StepRecord.read, bad)] == [1, 9]
    assert bad == [2, 4, 6]
    assert last_step(path) == 9 and last_step(tmp_path / "none") == 0


def test_going_back_keeps_foreign_keys_and_drops_lines_without_a_step(tmp_path):
    lines = [
        '{"step": 1, "loss": 0.30000000000000004, "theirs": [1, {"a": null}]}',
        "[5]",
        '{"loss": 1}',
        '{"step": 2}',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    MetricsWriter(tmp_path, 1).write(StepRecord(step=2, loss=math.nan))
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == [lines[0], '{"step": 2, "loss": null}']
    MetricsWriter(tmp_path, 2).write_evaluation(EvaluationRecord(2, 0.5, math.exp(0.5), 12))
    [evaluation] = read_records(tmp_path / "evaluations.jsonl")
    assert evaluation == {"step": 2, "loss": 0.5, "perplexity": math.exp(0.5), "trained_tokens": 12}
