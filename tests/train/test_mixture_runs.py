"""Real runs on two sources: the same rows on other ranks and over lives, exact losses by source, and the best of sets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lumina_ds.checkpoint.format import pointer_target
from lumina_ds.checkpoint.manifest import read_manifest
from lumina_ds.cli.model_source import load_run
from lumina_ds.data.loader import PackedRows
from lumina_ds.data.mixture.rows import MixedRows
from lumina_ds.data.shards.folder import ShardFolder
from lumina_ds.monitor.writers import read_records

WORKER = Path(__file__).with_name("mixture_worker.py")
SOURCES = ("few", "sums")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("mixtures")


@pytest.fixture(scope="module")
def folder_of(runs):
    return lambda name: runs / f"{name}-zero2-fp32"


@pytest.fixture
def said(runs, corpus, folder_of, run_ranks, tmp_path):
    """All lives, once: the first of each run on two ranks, and what follows on one, with another micro-batch."""
    kept = runs / "said.json"
    if not kept.exists():
        arguments = (str(runs), str(corpus.shards), str(corpus.eval_shards))
        two = run_ranks(WORKER, *arguments, "whole", "half", "half of another")
        folder_of("whole").rename(runs / "two ranks")
        # What a kill after step 5 leaves: a checkpoint of step 4, and a record that it does not hold.
        left = shutil.copytree(runs / "two ranks", folder_of("killed"))
        for step in (6, 8):
            shutil.rmtree(left / f"checkpoints/step-{step:08d}")
        lines = (left / "metrics.jsonl").read_text().splitlines(keepends=True)
        (left / "metrics.jsonl").write_text("".join(lines[:5]))
        alone = ("whole", "rest", "rest by other weights", "after a kill", "capped", "no such set", "one source less")
        one = run_ranks(WORKER, *arguments, *alone, world_size=1)
        kept.write_text(json.dumps(two | one | {"printed": (tmp_path / "rank-0.log").read_text()}))
    return json.loads(kept.read_text())


def metrics(folder):
    return read_records(folder / "metrics.jsonl")


def samples(folder):
    return [record["samples"] for record in metrics(folder)]


def test_other_ranks_and_lives_train_the_same_rows(said, runs, folder_of):
    whole = samples(runs / "two ranks")
    assert len(whole) == 8 and {len(rows) for rows in whole} == {8}
    assert [samples(folder_of(name)) for name in ("whole", "half", "killed")] == [whole] * 3
    for one, other in zip(metrics(runs / "two ranks"), metrics(folder_of("whole")), strict=True):
        assert one["source_trained_tokens"] == other["source_trained_tokens"]
        assert one["source_loss"] == pytest.approx(other["source_loss"], rel=1e-4)


def test_shares_hold_and_begin_anew_where_a_weight_changed(said, folder_of, runs):
    records = metrics(folder_of("changed"))
    assert samples(folder_of("changed"))[:4] == samples(runs / "two ranks")[:4]
    assert [record["source_shares"] for record in records] == [{"few": 0.5, "sums": 0.5}] * 4 + [
        {"few": 0.25, "sums": 0.75}
    ] * 4
    for first, last, share in ((-1, 3, 0.5), (3, 7, 0.25)):
        before = records[first]["source_tokens"] if first >= 0 else dict.fromkeys(SOURCES, 0)
        tokens = {name: records[last]["source_tokens"][name] - before[name] for name in SOURCES}
        assert abs(tokens["few"] - share * sum(tokens.values())) <= 64
        # What the ranks counted is what the order says.
        read = records[last]["tokens"] - (records[first]["tokens"] if first >= 0 else 0)
        assert sum(tokens.values()) == read
    mixture = read_manifest(folder_of("changed") / "checkpoints/step-00000008").mixture
    assert [(each.begins.position, each.weights) for each in mixture.stretches] == [
        (0, {"few": 1.0, "sums": 1.0}),
        (32, {"few": 1.0, "sums": 3.0}),
    ]
    assert "changed from step 5 on: share of few 0.5 -> 0.25" in said["printed"]


def test_losses_by_source_are_an_independent_sum(said, folder_of, corpus):
    """Of step 5, from the weights of step 4 and the logits of each row alone."""
    loaded, _ = load_run(folder_of("changed") / "checkpoints/step-00000004", "fp32")
    rows = MixedRows(
        {
            name: PackedRows(ShardFolder.open(path), 64)
            for name, path in (("sums", corpus.shards), ("few", corpus.eval_shards))
        }
    )
    record = metrics(folder_of("changed"))[4]
    sums, counts = dict.fromkeys(SOURCES, 0.0), dict.fromkeys(SOURCES, 0)
    num_few = rows.sources[0].num_rows
    for row in record["samples"]:
        name = "few" if row < num_few else "sums"
        batch = PackedRows.collate(rows.sources[name == "sums"], [row - num_few * (name == "sums")])
        start = 0
        for length in batch.document_lengths:  # each document by itself
            ids, labels = (
                torch.from_numpy(each[:, start : start + length]) for each in (batch.input_ids, batch.labels)
            )
            start += length
            if (labels != -100).any():
                with torch.no_grad():
                    logits = loaded.model(ids)
                sums[name] += float(F.cross_entropy(logits[0], labels[0], ignore_index=-100, reduction="sum"))
                counts[name] += int((labels != -100).sum())
    assert record["source_trained_tokens"] == counts and min(counts.values()) > 0
    assert record["source_loss"] == pytest.approx({name: sums[name] / counts[name] for name in SOURCES}, rel=1e-5)
    assert record["loss"] == pytest.approx(sum(sums.values()) / sum(counts.values()), rel=1e-5)


def test_evaluations_by_name_choose_the_best(said, folder_of):
    evaluations = read_records(folder_of("whole") / "evaluations.jsonl")
    assert [(each["step"], each["name"]) for each in evaluations] == [
        (step, name) for step in (0, 4, 8) for name in ("a", "b", "mean")
    ]
    for a, b, mean in zip(*(evaluations[number::3] for number in range(3)), strict=True):
        assert mean["loss"] == pytest.approx((a["loss"] + 3 * b["loss"]) / 4)
        assert mean["trained_tokens"] == a["trained_tokens"] + b["trained_tokens"]
    for name, judged, expected in (("whole", "b", evaluations[-2]["loss"]), ("half", "mean of 1 a, 3 b", None)):
        best = read_manifest(pointer_target(folder_of(name) / "checkpoints", "best"))
        own = read_records(folder_of(name) / "evaluations.jsonl")[-1]["loss"]
        assert (best.step, best.eval_set) == (8, judged)
        assert best.eval_loss == pytest.approx(own if expected is None else expected)


def test_what_cannot_be_is_one_line(said, folder_of):
    assert said["capped"] == (
        "train.max_steps 8 of 8 rows are 64 rows, and the caps of data.sources leave 35; lower --max-steps, or raise a cap"
    )
    assert said["no such set"] == (
        "train.best_by c names no evaluation set; the evaluation sets are a, b, and mean is of all"
    )
    assert said["one source less"].endswith(
        f"/step-00000008 is of the sources few, sums, and the run has sums; keep them (one with weight 0 is not trained), or "
        f"begin a run of another --experiment-name with --train.init_from {folder_of('changed')}/checkpoints/step-00000008"
    )
    assert [said[life] for life in ("whole", "half", "rest", "rest by other weights", "after a kill")] == [None] * 5


def test_a_run_starts_again_from_its_own_configuration(said, folder_of, corpus):
    """config.yaml names folders alone, and says the weights that held last."""
    from lumina_ds.config.load import load_config

    data = load_config(str(folder_of("changed") / "config.yaml")).config.data
    assert [(each.name, each.shards, each.weight) for each in data.sources] == [
        ("sums", str(corpus.shards), 3.0),
        ("few", str(corpus.eval_shards), 1.0),
    ]
    assert (data.shards, [each.name for each in data.eval_sets]) == (None, ["a", "b"])
    assert json.dumps(data.model_dump())
