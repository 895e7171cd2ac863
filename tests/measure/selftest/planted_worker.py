"""On two ranks: the self-test's own layouts and comparisons, sound and with one bug planted after the other."""

import dataclasses
import json
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from deepspeed.utils import groups

from lumina_ds.data.loader import IGNORED_LABEL, PackedRows
from lumina_ds.engine.world import start, stop
from lumina_ds.measure.selftest import training, worker
from lumina_ds.measure.selftest.corpus import SEQ_LENGTH, Corpus, write_corpus
from lumina_ds.measure.selftest.layouts import PLAIN, Layout, Pair, layouts_of
from lumina_ds.measure.selftest.run import compare_pairs
from lumina_ds.measure.selftest.shape import tiny_run
from lumina_ds.measure.selftest.task import Task
from lumina_ds.measure.selftest.worker import run_layouts
from lumina_ds.model.attention_backends import DocumentLayout
from lumina_ds.model.loss import LanguageHead

BASE = Layout(2, 2, 2, accumulation=2)
PAIRS = [
    Pair("plain PyTorch", PLAIN, BASE),
    Pair("expert parallelism", dataclasses.replace(BASE, expert_parallel=1), BASE),
    Pair("accumulation", dataclasses.replace(BASE, accumulation=1), BASE),
    Pair("packing", dataclasses.replace(BASE, packed=False), BASE),
]


@contextmanager
def expert_gradients_scaled():
    """By the size of the expert-parallel group: what a mean over too many ranks, or too few, does."""
    build = worker.build_engine

    def build_scaled(*arguments):
        engine = build(*arguments)
        for parameter in engine.module.parameters():
            if not getattr(parameter, "allreduce", True):
                size = torch.distributed.get_world_size(groups._get_expert_parallel_group(parameter.group_name))
                parameter.register_hook(lambda gradient, size=size: gradient * size)
        return engine

    with patch.object(worker, "build_engine", build_scaled):
        yield


@contextmanager
def loss_averaged_per_micro_batch():
    """Each micro-batch of each rank weighs the same, however many tokens it trains."""
    run, forward, share = training.run_step, LanguageHead.forward, []

    def run_step(engine, batches, counts, model, max_norm, world):
        share.append(counts.trained_tokens / (len(batches) * world.size))
        outcome = run(engine, batches, counts, model, max_norm, world)
        share.clear()
        return outcome

    def averaged(self, hidden, labels=None):
        loss = forward(self, hidden, labels)
        return loss * share[0] / max(1, int((labels != IGNORED_LABEL).sum())) if share else loss

    with patch.object(training, "run_step", run_step), patch.object(LanguageHead, "forward", averaged):
        yield


@contextmanager
def attention_across_documents():
    make = DocumentLayout.from_lengths

    def whole_rows(lengths, device="cpu"):
        rows, rest = divmod(sum(lengths), SEQ_LENGTH)
        return make(lengths if rest else (SEQ_LENGTH,) * rows, device)

    with patch.object(DocumentLayout, "from_lengths", whole_rows):
        yield


@contextmanager
def end_of_turn_masked(end_id):
    collate = PackedRows.collate

    def without_end(self, row_ids):
        batch = collate(self, row_ids)
        batch.labels[batch.labels == end_id] = IGNORED_LABEL
        return dataclasses.replace(batch, num_trained_tokens=int((batch.labels != IGNORED_LABEL).sum()))

    with patch.object(PackedRows, "collate", without_end):
        yield


@contextmanager
def auxiliary_loss_per_micro_batch():
    """Once per accumulation step instead of once per optimizer step."""
    run = training.run_step

    def run_step(engine, batches, counts, model, max_norm, world):
        names = ("router_aux_loss_coef", "router_z_loss_coef")
        often = model.model_copy(update={name: len(batches) * getattr(model, name) for name in names})
        return run(engine, batches, counts, often, max_norm, world)

    with patch.object(training, "run_step", run_step):
        yield


@contextmanager
def nothing():
    yield


if __name__ == "__main__":
    world = start()
    folder = Path(sys.argv[1]).parent / "selftest"
    if world.rank == 0:
        folder.mkdir()
        write_corpus(folder)
    torch.distributed.barrier()
    config, _ = tiny_run(2, None)
    planted = {
        "none": nothing(),
        "expert gradients": expert_gradients_scaled(),
        "mean of means": loss_averaged_per_micro_batch(),
        "attention": attention_across_documents(),
        "end of turn": end_of_turn_masked(Corpus(folder, 2)._tokenizer.end_id),
        "auxiliary loss": auxiliary_loss_per_micro_batch(),
    }
    found = {}
    for name, bug in planted.items():
        with bug:
            run_layouts(Task(config, layouts_of(PAIRS), 2, 2), folder, world)
        torch.distributed.barrier()
        if world.rank == 0:
            found[name] = {each.topic: dataclasses.asdict(each) for each in compare_pairs(PAIRS, folder)}
    if world.rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    stop(0, clean=True)
