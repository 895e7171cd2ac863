"""Ranks that share rows train like one process that holds whole rows; what cannot be shared is refused."""

from pathlib import Path

import numpy as np
import pytest

from lumina_ds.config.checks import sequence_faults, world_faults
from lumina_ds.config.load import Override, load_config
from lumina_ds.config.precision import choose_compile
from lumina_ds.config.schema import RunConfig
from lumina_ds.data.loader import IGNORED_LABEL, MicroBatch, RowShare
from lumina_ds.engine.world import World
from lumina_ds.errors import ConfigError


def test_shared_rows_train_like_whole_ones(run_ranks):
    found = run_ranks(Path(__file__).parent / "sequence_parallel_worker.py")
    plain = found.pop("plain")
    assert plain["losses"][-1] < plain["losses"][0]
    for name, curves in found.items():
        assert curves["losses"] == pytest.approx(plain["losses"], rel=1e-5), name
        assert curves["norms"] == pytest.approx(plain["norms"], rel=1e-5), name


def test_a_slice_has_its_own_counts_and_the_documents_of_the_whole_row():
    row = np.arange(8)[None, :]
    labels = np.array([[IGNORED_LABEL, 2, 3, IGNORED_LABEL, 5, 6, 7, IGNORED_LABEL]])
    batch = MicroBatch(
        input_ids=row, labels=labels, position_ids=row, document_lengths=(6, 2), num_trained_tokens=5, num_tokens=6,
        row_ids=(9,), padding_mask=row < 6,
    )  # fmt: skip
    first, second = (RowShare(0, 1, part, 2).cut(batch) for part in (0, 1))
    assert first.input_ids.tolist() == [[0, 1, 2, 3]] and second.position_ids.tolist() == [[4, 5, 6, 7]]
    assert (first.num_trained_tokens, second.num_trained_tokens) == (2, 3)
    assert (first.num_tokens, second.num_tokens) == (4, 2)
    assert first.document_lengths == second.document_lengths == (6, 2)
    assert RowShare(0, 1).cut(batch) is batch


def test_neighbours_share_rows():
    shares = [World(rank, rank, 4, "cpu", sequence_parallel_size=2).share for rank in range(4)]
    assert shares == [RowShare(0, 2, 0, 2), RowShare(0, 2, 1, 2), RowShare(1, 2, 0, 2), RowShare(1, 2, 1, 2)]


@pytest.mark.parametrize(
    ("model", "other", "says"),
    [
        ({"num_experts": 4, "moe_intermediate_size": 8}, {}, r"for dense models: DeepSpeed's expert parallelism"),
        ({"num_key_value_heads": 1}, {}, "model.num_key_value_heads 1 is not divisible by --sequence-parallel 2"),
        ({}, {"data": {"seq_length": 9}}, "--seq-length 9 is not divisible by --sequence-parallel 2"),
    ],
)
def test_what_cannot_be_shared_is_refused_with_the_reason(model, other, says):
    shape = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 8}
    config = RunConfig.model_validate(
        {"model": {**shape, **model}, "deepspeed": {"sequence_parallel_size": 2}, **other}
    )
    [fault] = sequence_faults(config)
    assert says in fault


def test_only_a_compiled_model_cannot_share_rows():
    shape = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 8}
    for asked, num_faults in (("off", 0), ("auto", 0), ("on", 1)):
        config = RunConfig.model_validate(
            {"model": shape, "train": {"compile": asked}, "deepspeed": {"sequence_parallel_size": 2}}
        )
        assert len(sequence_faults(config)) == num_faults
    config.train.compile = "auto"
    assert choose_compile(config, "cuda")[0] is False


def test_the_batch_counts_rows_not_slices():
    config = RunConfig.model_validate(
        {"train": {"global_batch_size": 6, "micro_batch_size": 3}, "deepspeed": {"sequence_parallel_size": 2}}
    )
    assert world_faults(config, 4) == []
    assert "3 ranks are not divisible by --sequence-parallel 2" in world_faults(config, 3)[0]


def test_a_preset_with_experts_says_why_not():
    with pytest.raises(ConfigError, match="AutoEP"):
        load_config("debug", [Override("deepspeed.sequence_parallel_size", 2, "here")])
