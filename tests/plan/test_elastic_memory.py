"""How many ranks an elastic run takes of those that could run, with real memory plans."""

import pytest

from lumina_ds.config.elastic import for_ranks
from lumina_ds.config.load import Override, load_config
from lumina_ds.errors import ConfigError
from lumina_ds.plan import plan_memory
from lumina_ds.plan.elastic import largest_choice, memory_fault, possible_choices


@pytest.fixture
def config():
    """At ZeRO-3 a rank of a smaller group holds more."""
    asked = {"run.elastic": "2:8", "deepspeed.zero_stage": 3, "train.micro_batch_size": 1}
    return load_config("debug", [Override(name, value, "--x") for name, value in asked.items()]).config


def within(limit):
    return lambda layout, number: memory_fault(layout, number, "bf16", "cuda", limit)


def peak(config, number):
    return plan_memory(for_ranks(config, number), number, "bf16", "cuda").peak_bytes


def test_as_many_as_there_are_and_as_share_the_steps(config):
    found = [largest_choice(config, available, within(1 << 50)) for available in (2, 3, 4, 7, 8, 30)]
    assert [choice.num_ranks for choice in found] == [2, 2, 4, 4, 8, 8]
    assert [choice.config.train.gradient_accumulation_steps for choice in found] == [4, 4, 2, 2, 1, 1]
    assert found[0].why_not_more is None and found[-1].why_not_more is None
    assert "7 ranks cannot share the 8 micro-batches of a step equally" in found[3].why_not_more
    with pytest.raises(ConfigError, match="--elastic 2:8 needs 2 ranks, and 1 can run"):
        largest_choice(config, 1, within(1 << 50))


def test_what_does_not_fit_is_refused_with_its_figures(config):
    assert peak(config, 2) > peak(config, 4) > peak(config, 8)
    limit = peak(config, 4)
    assert possible_choices(config, within(1 << 50)) == ([8, 4, 2], [])
    with pytest.raises(ConfigError, match=r"cannot go on with its fewest ranks: each of 2 ranks is planned at .* GiB"):
        possible_choices(config, within(limit))
    with pytest.raises(ConfigError, match="and 3 can run: 3 ranks cannot share"):
        largest_choice(config, 3, within(limit))
    with pytest.raises(ConfigError, match="and 2 can run: each of 2 ranks is planned at"):
        largest_choice(config, 2, within(limit))
    assert largest_choice(config, 5, within(limit)).num_ranks == 4


def test_fewer_ranks_may_fit_where_more_do_not():
    """Six ranks cannot spread eight experts over four, and hold more of them each."""
    config = load_config("b7", [Override("run.elastic", "2:6", "--elastic")]).config
    config.deepspeed.zero_stage, config.deepspeed.expert_parallel_size = 1, 4
    config.train.gradient_accumulation_steps = 2
    assert config.model.num_experts % 8 == 0 and peak(config, 6) > peak(config, 4)
    choice = largest_choice(config, 6, within(peak(config, 4)))
    assert (choice.num_ranks, choice.config.deepspeed.expert_parallel_size) == (4, 4)
    assert "each of 6 ranks is planned at" in choice.why_not_more
    config.run.elastic = "4:6"
    numbers, lacking = possible_choices(config, within(peak(config, 4)))
    assert numbers == [4] and "each of 6 ranks is planned at" in lacking[0]


def test_a_pinned_accumulation_allows_one_number_of_ranks(config, tmp_path):
    (tmp_path / "ds.json").write_text('{"gradient_accumulation_steps": 1}')
    config.deepspeed.config = str(tmp_path / "ds.json")
    with pytest.raises(ConfigError, match="gradient_accumulation_steps"):
        possible_choices(config, within(1 << 50))
