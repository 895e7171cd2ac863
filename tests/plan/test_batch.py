"""The largest micro-batch under a limit, and the words that ask for it."""

import pytest

from lumina_ds.config.checks import world_faults
from lumina_ds.config.load import Override, load_config
from lumina_ds.errors import ConfigError
from lumina_ds.plan import plan_memory
from lumina_ds.plan.batch import largest_micro_batch, next_smaller, with_batch

AUTO = Override("train.micro_batch_size", "auto", "--batch-size")


def planned(config, micro):
    candidate = with_batch(config, micro, 64 // micro)
    return plan_memory(candidate, 2, "bf16").peak_bytes


def test_auto_keeps_what_defines_the_rows():
    resolved = load_config("m120_speed", [AUTO])
    train = resolved.config.train
    assert (train.auto_micro_batch, train.micro_batch_size, train.gradient_accumulation_steps) == (True, 16, 2)
    assert resolved.origins["train.auto_micro_batch"] == "command line --batch-size"
    # A number behind it wins, as when `lumina train` starts again with less.
    again = load_config("m120_speed", [AUTO, Override("train.micro_batch_size", "4", "--batch-size")])
    assert (again.config.train.auto_micro_batch, again.config.train.micro_batch_size) == (False, 4)
    assert "auto_micro_batch" not in str(load_config("m120_speed").origins["train.micro_batch_size"])
    with pytest.raises(ConfigError, match="micro_batch_size is 'large'"):
        load_config("m120_speed", [Override("train.micro_batch_size", "large", "--batch-size")])


def test_the_largest_divisor_under_the_limit():
    config = load_config("m120_speed", [AUTO]).config
    config.train.global_batch_size = 128
    roomy = largest_micro_batch(config, 2, "bf16", "cuda", 1 << 50)
    assert (roomy.micro_batch_size, roomy.gradient_accumulation_steps) == (64, 1)
    assert roomy.line.startswith("micro-batch 64 x accumulation 1 x 2 ranks = 128 rows; limited by the rows of a step")
    tight = largest_micro_batch(config, 2, "bf16", "cuda", planned(config, 16))
    assert (tight.micro_batch_size, tight.gradient_accumulation_steps) == (16, 4)
    assert "memory: 32 rows are planned at" in tight.line
    none = largest_micro_batch(config, 2, "bf16", "cuda", 1)
    assert (none.micro_batch_size, none.gradient_accumulation_steps) == (1, 64)


def test_rows_are_dealt_out_evenly_or_refused():
    config = load_config("m120_speed", [AUTO]).config
    assert largest_micro_batch(config, 3, "bf16", "cuda", 1 << 50, rows=96).line.endswith(
        "limited by the rows of a step, of which each rank has 32 (train.global_batch_size)"
    )
    with pytest.raises(ConfigError, match="a step of 64 rows cannot be dealt out to 3 ranks"):
        largest_micro_batch(config, 3, "bf16", "cuda", 1 << 50, rows=64)
    config.train.global_batch_size = 64
    assert world_faults(config, 2) == []
    assert "global_batch_size 64 cannot be dealt out to 3 ranks" in world_faults(config, 3)[-1]


def test_smaller_batches_keep_the_rows():
    assert [next_smaller(micro) for micro in (8, 9, 15, 7, 2)] == [4, 3, 5, 1, 1]
    choice = largest_micro_batch(load_config("m120_speed", [AUTO]).config, 2, "bf16", "cuda", 1 << 50).smaller()
    assert (choice.micro_batch_size, choice.gradient_accumulation_steps) == (16, 2)
    assert choice.limited_by == "memory: a step with 32 rows was tried and did not fit"
