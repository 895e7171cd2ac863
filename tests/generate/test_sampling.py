import pytest
import torch

from lumina_ds.errors import ConfigError
from lumina_ds.generate.sampling import SamplingSettings, penalize_repetition, sample

LOGITS = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))


def drawn(**settings):
    generator = torch.Generator().manual_seed(0)
    return [sample(LOGITS, SamplingSettings(**settings), generator) for _ in range(400)]


def test_greedy_takes_the_likeliest():
    assert set(drawn(temperature=0)) == set(drawn(temperature=1e-320)) == {0}


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass():
    assert set(drawn(temperature=1.0, top_p=0.5)) == {0}
    assert set(drawn(temperature=1.0, top_p=0.6)) == {0, 1}
    assert set(drawn(temperature=1.0, top_p=1.0)) == {0, 1, 2, 3}


def test_top_k_keeps_k_tokens():
    assert set(drawn(temperature=1.0, top_p=1.0, top_k=3)) == {0, 1, 2}


def test_temperature_sharpens():
    share = [drawn(temperature=value, top_p=1.0).count(0) / 400 for value in (0.3, 1.0, 3.0)]
    assert share[0] > 0.75 > 0.6 > share[1] > 0.4 > share[2]


def test_the_seed_decides():
    assert drawn(temperature=1.0) == drawn(temperature=1.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("max_new_tokens", 0),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")),
    ],
)
def test_values_out_of_range_are_named(name, value):
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} {value}"):
        SamplingSettings(**{name: value}).check()


def test_an_empty_stop_text_is_refused():
    with pytest.raises(ConfigError, match="--stop is empty"):
        SamplingSettings(stop=("end", "")).check()


def test_repetition_penalty_lowers_what_was_seen_on_both_sides_of_zero():
    seen = torch.tensor([True, True, False, False])
    logits = torch.tensor([2.0, -2.0, 3.0, -3.0])
    assert penalize_repetition(logits, seen, 2.0).tolist() == [1.0, -4.0, 3.0, -3.0]
    assert penalize_repetition(logits, seen, 0.5).tolist() == [4.0, -1.0, 3.0, -3.0]
    assert penalize_repetition(logits, seen, 1.0) is logits
