"""`lumina report` on folders written here: figures by hand, damaged and unfinished runs, long ones, two and many."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from manifests import make_manifest

from lumina_ds.checkpoint.manifest import MANIFEST
from lumina_ds.cli.main import cli, run_command
from lumina_ds.config.load import Override, load_config
from lumina_ds.report.runs.config import differences, starting_point
from lumina_ds.report.runs.layouts import layout_section
from lumina_ds.report.runs.page import run_page
from lumina_ds.report.runs.run import read_run


def record(step: int, **values: Any) -> dict[str, Any]:
    return {
        "step": step,
        "time": 1_700_000_000.0 + step,
        "loss": 8.0 / step,
        "learning_rate": 1e-3,
        "grad_norm": 1.0,
        "tokens": step * 100,
        "tokens_per_second": 1000.0 * step,
        "data_seconds": 0.002,
        "memory_bytes": step << 30,
        "skipped": 0,
        "expert_usage": [[0.5, 0.5], [1.0, 0.0]],
        **values,
    }


def write_run(folder: Path, num_steps: int = 4, **settings: Any) -> Path:
    """A run folder as training leaves it: two evaluations, two checkpoints, the second both latest and best."""
    folder.mkdir(parents=True)
    overrides = [Override("train.max_steps", 4, "--max-steps"), *(Override(f, v, f) for f, v in settings.items())]
    config = load_config("debug", overrides).config.model_dump()
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "ds_config.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    environment = {"num_steps": 4, "hosts": {"node-1": 2}, "devices": ["a card"], "versions": {"torch": "9.9"}}
    (folder / "environment.json").write_text(json.dumps(environment))
    records = [json.dumps(record(step)) + "\n" for step in range(1, num_steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(records))
    evaluations = [{"step": 0, "loss": 9.0}, {"step": 4, "loss": 2.5}]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(e) + "\n" for e in evaluations))
    for step, loss in ((2, None), (4, 2.5)):
        checkpoint = folder / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        files = {"a.pt": {"bytes": 1 << 20, "sha256": "0"}, "b.pt": {"bytes": 1 << 19, "sha256": "0"}}
        (checkpoint / MANIFEST).write_text(make_manifest(step=step, eval_loss=loss, files=files).sealed())
    for pointer in ("latest", "best"):
        (folder / "checkpoints" / pointer).write_text("step-00000004")
    return folder


class Page(HTMLParser):
    """What a browser would load, the text of the page, and whether its tags are closed in order."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(document)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "srcset", "data", "action"):
                self.sources.append(value or "")
            elif name in ("href", "xlink:href"):
                self.links.append(value or "")
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text += data


def report(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[dict[str, Any], Page]:
    assert run_command(cli, ["report", *map(str, words), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    return summary, Page(Path(summary["report"]).read_text())


def test_figures_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "first")
    summary, page = report(capsys, run)
    assert summary["report"] == str(run / "report.html")
    assert summary["runs"] == [
        {
            "run": str(run),
            "preset": "debug",
            "records": 4,
            "steps": 4,
            "planned_steps": 4,
            "tokens": 400,
            "skipped": 0,
            "loss": 2.0,
            "best_eval_loss": 2.5,
            "best_eval_step": 4,
            "tokens_per_second": 2500.0,
            "peak_memory_bytes": 4 << 30,
            "checkpoints": ["step-00000002", "step-00000004"],
            "faults": [],
        }
    ]
    for shown in (
        "of 4, finished",
        "latest, best",
        "folderstatestepsize",
        "1.50 MiB",
        "train.max_steps",
        '"stage": 2',
        "No step was skipped",
    ):
        assert shown in page.text, shown
    # A plot of losses at two heights and two widths, five of the course, of which the gradient norm at two heights, and
    # one of the busiest expert: step times and router losses are not recorded here. One image per MoE layer, and nothing
    # from anywhere else.
    assert page.tags.count("svg") == 4 + 6 + 1 and page.tags.count("img") == 2
    assert page.links == [] and all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)


def test_loads_of_experts_in_the_table(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "first"))
    assert run.experts.num_layers == 2
    assert run.experts.loads(1)[:, -1].tolist() == [2.0, 0.0]
    assert run.series["expert_usage"].last == 2.0


def test_balance_of_the_routers_per_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "routed", num_steps=0)
    balance = {"max_violation": [0.0, 1.0], "usage_entropy": [1.0, 0.25], "router_entropy": [0.875, 0.5]}
    overflow = {"dropped_share": [0.0, 0.125], "rerouted_share": [0.0, 0.0], "capacity_factor": [1.25, 1.5]}
    with open(run / "metrics.jsonl", "w") as stream:
        for step in (1, 2):
            stream.write(json.dumps(record(step, dead_experts=[step - 1, 1], **balance, **overflow)) + "\n")
        stream.write(json.dumps(record(3, router_entropy=[None, 0.5], dead_experts=5)) + "\n")
    found = read_run(run)
    assert [found.series[name].last for name in ("dead_experts", "router_entropy", "dropped_share")] == [2, 0.5, 0.125]
    assert found.layers["dead_experts"] == [1, 1]
    _, page = report(capsys, run)
    for shown in ("maximum violation", "Dropped choices", "Experts that no token chose", "12.50%", "0.250", "1.500"):
        assert shown in page.text, shown
    assert "Dropped choices" not in report(capsys, write_run(tmp_path / "dropless"))[1].text


def test_the_lives_of_an_elastic_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "one")
    layout = {"time": 1.7e9, "zero_stage": 2, "expert_parallel_size": 1, "gradient_accumulation_steps": 1}
    lives = [json.dumps(layout | {"step": step, "ranks": ranks}) + "\n" for step, ranks in ((0, 40), (2, 20))]
    (run / "logs").mkdir()
    (run / "logs/layouts.jsonl").write_text("".join(lives) + '{"step": 3, "ranks": "many"}\n')
    read = read_run(run)
    assert [(life.step, life.ranks) for life in read.layouts] == [(0, 40), (2, 20)]
    assert read.faults == ["1 line of layouts.jsonl is no record and was left out: 3"]
    shown = layout_section(read.layouts, "one")
    assert shown.count("<tr>") == 3 and ">40<" in shown and ">20<" in shown
    assert "<h2>Ranks</h2>" in run_page(read)
    assert layout_section([], "one") == ""


def test_unfinished_and_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "broken", num_steps=2)
    with open(run / "metrics.jsonl", "ab") as stream:
        stream.write(b'\n\x00\xff\n[1]\n{"step": "x"}\n{"step": 1e400}\n{"loss": 1}\n')
        stream.write(json.dumps(record(3, loss=None, skipped=1, expert_usage=7)).encode() + b'\n{"step": 4, "lo')
    (run / "evaluations.jsonl").write_text('{"step": 0, "loss": null}\n')
    (run / "ds_config.json").write_text("{")
    (run / "checkpoints" / "step-00000002" / "manifest.json").write_text('{"files": 3}')
    (run / "checkpoints" / "latest").write_bytes(b"\xff")
    summary, page = report(capsys, run)
    [found] = summary["runs"]
    assert (found["steps"], found["loss"], found["skipped"], found["best_eval_loss"]) == (3, 4.0, 1, None)
    assert [fault.split(" are ")[0] for fault in found["faults"][1:]] == ["6 lines of metrics.jsonl"]
    for shown in ("unfinished", "lines of metrics.jsonl are no records", "manifest.json was altered", "not finite"):
        assert shown in page.text, shown


def test_a_run_without_any_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.yaml").write_text("preset: gone\nmodel: 3\n")
    summary, page = report(capsys, tmp_path / "new")
    assert summary["runs"][0]["loss"] is None
    assert "Nothing was recorded" in page.text and "the defaults" in page.text


def test_names_from_a_run_are_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "<script>alert(1)</script>"
    run = write_run(tmp_path / "evil", **{"description": evil})
    _, page = report(capsys, run)
    assert "script" not in page.tags and evil in page.text


def test_a_long_run_stays_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "long")
    with open(run / "metrics.jsonl", "w") as stream:
        usage = [[1 / 32] * 32] * 24
        for step in range(500, 1_000_001, 500):
            noise = (step * 2654435761 % 1000) / 1000
            values = record(step, loss=2 + noise, grad_norm=noise * 100 + 0.01, expert_usage=usage)
            stream.write(json.dumps(values) + "\n")
    summary, page = report(capsys, run)
    assert summary["runs"][0]["steps"] == 1_000_000
    assert page.tags.count("img") == 24
    assert (run / "report.html").stat().st_size < 3_000_000


def test_two_runs_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write_run(tmp_path / "first")
    second = write_run(tmp_path / "second", **{"train.learning_rate": 0.5, "run.name": "second"})
    summary, page = report(capsys, first, "--compare", second, "--out", tmp_path / "both.html")
    assert summary["differences"] == [["train.learning_rate", "0.003", "0.5"], ["run.name", "unset", "second"]]
    document = (tmp_path / "both.html").read_text()
    assert 'class="line0"' in document and 'class="line1"' in document
    assert "Runs first and second" in page.text and not (first / "report.html").exists()


def test_a_run_with_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "first")
    _, page = report(capsys, run, "--compare", run)
    assert "The configurations are equal" in page.text


def test_a_folder_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("first", "second"):
        write_run(tmp_path / "runs" / name)
    (tmp_path / "runs" / ".data").mkdir()
    report(capsys, tmp_path / "runs" / "first")
    summary, page = report(capsys, tmp_path / "runs")
    assert [run["steps"] for run in summary["runs"]] == [4, 4]
    assert page.links == ["first/report.html"]
    assert page.tags.count("svg") == 4


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["{}/none"], 3, "none is no folder; give runs/NAME or runs"),
        (["{}/empty"], 3, "empty is no run folder"),
        (["{}/runs/first", "--compare", "{}/empty"], 3, "empty is no run folder"),
        (["{}/runs", "--compare", "{}/runs/first"], 2, "--compare takes two runs"),
        (["{}/runs/first", "--out", "{}/none/x.html"], 4, "none/x.html: No such file"),
    ],
)
def test_faults_in_one_line(
    words: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "runs" / "first")
    (tmp_path / "empty").mkdir()
    assert run_command(cli, ["report", *(word.format(tmp_path) for word in words)]) == code
    output = capsys.readouterr()
    assert message in output.err and output.err.count("\n") == 1 and output.out == ""


def test_differences_of_configurations() -> None:
    left = {"a": {"x": 1, "y": None}, "b": True}
    right = {"a": {"x": 2, "z": [1]}, "b": False, "added": None}
    assert differences(left, right) == [("a.x", "1", "2"), ("b", "true", "false"), ("a.z", "absent", "[1]")]
    assert differences(left, left) == []
    assert starting_point({"preset": "b1"})[0] == "preset b1"
    assert starting_point({"preset": ["b1"]})[0] == starting_point({})[0] == "the defaults"


def test_health_is_drawn_where_a_run_measured_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run")
    assert "Free space on the disk" not in report(capsys, folder)[1].text
    measured = {"anomaly_score": 0.5, "host_memory_available_bytes": 3 << 30, "disk_free_bytes": 7 << 30}
    records = [record(1, **measured), record(2, **measured | {"anomaly_score": None})]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    text = report(capsys, folder)[1].text
    for title in ("Anomaly", "Free memory of the host", "Free space on the disk"):
        assert title in text
    assert "Slowest rank" not in text
    assert read_run(folder).series["anomaly_score"].missing_steps == [2]


def test_the_page_says_where_and_with_what_a_run_trained(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    _, page = report(capsys, run)
    assert all(words in page.text for words in ("node-1 (2 ranks)", "a card", "9.9"))
    # Runs by epochs know their length from it; those of earlier versions have no such file.
    (run / "config.yaml").write_text(yaml.safe_dump({"train": {"max_steps": None}}))
    assert read_run(run).planned_steps == 4
    (run / "environment.json").unlink()
    assert read_run(run).planned_steps is None and read_run(run).faults == []
