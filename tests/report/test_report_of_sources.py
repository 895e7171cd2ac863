"""Sources of a mixture and named evaluation sets in a run's report."""

from __future__ import annotations

import json

from test_report import report, write_run

from lumina_ds.monitor.console import training_figures
from lumina_ds.monitor.records import EvaluationRecord, StepRecord
from lumina_ds.monitor.trackers import scalars_of


def mixed_record(step, share, loss):
    return {
        "step": step, "loss": 2.0, "tokens": 100 * step, "source_loss": {"<code>": loss, "chats": 1.0 + step},
        "source_trained_tokens": {"<code>": 0 if loss is None else 9, "chats": 5},
        "source_tokens": {"<code>": 75 * step, "chats": 25 * step}, "source_epochs": {"<code>": 0.5 * step, "chats": 0.1},
        "source_shares": {"<code>": share, "chats": 1 - share},
    }  # fmt: skip


def test_every_source_has_its_plot_and_its_line(tmp_path, capsys):
    run = write_run(tmp_path / "first")
    records = [mixed_record(1, 0.75, 4.0), mixed_record(2, 0.75, None), mixed_record(3, 0.5, 3.0)]
    records += [{"step": 4, "source_loss": "damaged", "source_shares": {"chats": None}, "source_tokens": [1]}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    _, page = report(capsys, run)
    assert "Loss of <code>" in page.text and "Loss of chats" in page.text
    cells = "<code>50.00%75.00%2251.53.0000chats50.00%25.00%750.14.0000"
    assert cells in page.text, page.text[page.text.index("Sources") :][:600]
    assert "From step 3 on, the shares are <code> 50.00%, chats 50.00%." in page.text
    assert page.text.count("the shares are") == 1
    _, plain = report(capsys, write_run(tmp_path / "second"))
    assert "Sources" not in plain.text and "Evaluation sets" not in plain.text


def test_the_curve_that_chooses_the_best_is_that_of_the_setting(tmp_path, capsys):
    evaluations = [
        {"step": step, "loss": loss + 4 / (step + 1), "name": name}
        for step in (0, 4)
        for name, loss in (("a", 2.0), ("b", 1.0), ("mean", 1.5))
    ]
    for best_by, expected in (("b", 1.8), ("mean", 2.3), (None, 2.3)):
        run = write_run(tmp_path / str(best_by), **{"train.best_by": best_by})
        (run / "evaluations.jsonl").write_text("".join(json.dumps(each) + "\n" for each in evaluations))
        summary, page = report(capsys, run)
        assert summary["runs"][0]["best_eval_loss"] == expected
        assert all(f"Loss on {name}" in page.text for name in ("a", "b", "mean"))


def test_the_live_line_and_the_trackers_have_them():
    record = StepRecord.read(mixed_record(2, 0.75, 4.0))
    assert "by source <code> 4.0000, chats 3.0000" in training_figures(record, 4, "ZeRO-2", 2)
    scalars = scalars_of(record)
    assert scalars["sources/chats/source_loss"] == 3.0 and scalars["sources/<code>/source_tokens"] == 150.0
    assert scalars_of(EvaluationRecord(4, 2.0, 7.4, 10, "b")) == {
        "eval/b/loss": 2.0, "eval/b/perplexity": 7.4, "eval/b/trained_tokens": 10.0
    }  # fmt: skip
    assert "name" not in EvaluationRecord(4, 2.0, 7.4, 10).values()


def test_what_became_of_the_lines_stands_in_the_report(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    _, page = report(capsys, run)
    assert "Training data" not in page.text
    record = {
        "train": {"summary": ["made: 9 conversations, 1 of 10 lines rejected", "  rejected 1: <empty>"], "rows": 3},
        "eval_sets": {"chats": {"summary": ["2 unknown ids"]}, "old": {"rows": 1}},
        "sources": "damaged",
    }
    (run / "preprocessing.json").write_text(json.dumps(record))
    _, page = report(capsys, run)
    for part in ("Training data", "1 of 10 lines rejected", "rejected 1: <empty>", "Evaluation set chats2 unknown ids"):
        assert part in page.text, part
    assert "Evaluation set old" not in page.text and "Source" not in page.text
