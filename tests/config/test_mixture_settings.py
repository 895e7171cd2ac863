"""Settings of mixtures and evaluation sets: what they mean, and one line for each contradiction."""

from __future__ import annotations

import pytest

from lumina_ds.config.load import Override, load_config
from lumina_ds.errors import ConfigError

A, B = {"name": "a", "paths": "a.jsonl"}, {"name": "b", "shards": "b"}


def loaded(**fields):
    return load_config(
        "debug", [Override(name.replace("__", "."), value, name) for name, value in fields.items()]
    ).config


def test_an_entry_may_be_one_text():
    texts = ["name=a,paths=x.jsonl,paths=y.jsonl,tokens=1.5M,cap=2", "name=b,shards=b,repeats=3"]
    a, b = loaded(data__sources=texts).data.sources
    assert (a.paths, a.shards, a.tokens, a.cap, a.amount) == (["x.jsonl", "y.jsonl"], None, 1_500_000, 2.0, "tokens")
    assert (b.paths, b.shards, b.repeats, b.amount) == ([], "b", 3.0, "repeats")
    listed = loaded(data__sources="[{name: a, paths: x.jsonl, weight: 2}]").data.sources
    assert [(each.name, each.paths, each.weight) for each in listed] == [("a", ["x.jsonl"], 2.0)]


@pytest.mark.parametrize(
    ("text", "tokens"), [("250", 250), ("2e9", 2 * 10**9), ("0.1K", 100), (7.0, 7), ("1T", 10**12)]
)
def test_tokens_may_have_a_unit(text, tokens):
    assert loaded(data__sources=[A | {"tokens": text}]).data.sources[0].tokens == tokens


@pytest.mark.parametrize(
    ("sources", "more", "message"),
    [
        ([A | {"weight": 2, "tokens": 5}], {}, "a has weight and tokens, which say the same thing twice; keep one"),
        ([A | {"weight": 2}, B], {}, "a has a weight and b has none; give every source a weight, or use tokens or repeats"),
        ([A | {"weight": 0}, B | {"weight": 0}], {}, "every weight is 0, so there is nothing to train on; raise one"),
        ([A | {"weight": -1}], {}, "data.sources.0.weight is -1: input should be greater than or equal to 0"),
        ([A | {"weight": True}], {}, "data.sources.0.weight is True: give a number, not true or false"),
        ([A | {"cap": 0}], {}, "data.sources.0.cap is 0: input should be greater than 0"),
        ([A | {"tokens": "much"}], {}, "give a number of tokens, such as 250M"),
        ([A, B], {"data__temperature": 0}, "data__temperature): input should be greater than 0"),
        ([A | {"tokens": "1e400"}], {}, "input should be less than or equal to 1000000000000000"),
        ([A | {"weigth": 1}], {}, "unknown field data.sources.0.weigth; did you mean weight?"),
        ([A, A], {}, "data.sources: 2 entries are named a; give each a name of its own"),
        ([{"name": "a"}], {}, "a has neither paths nor shards; give it one of them"),
        ([A | {"shards": "x"}], {}, "a has both paths and shards; give it one of them"),
        ([{"name": "a b", "paths": "x"}], {}, "data.sources.0.name is 'a b': string should match pattern"),
        (["paths=x"], {}, "data.sources.0.name is {'paths': ['x']}: field required"),
        (["chats.jsonl"], {}, "'chats.jsonl' is not KEY=VALUE; write name=chats,paths=chats.jsonl,weight=2"),
        ([B | {"format": "alpaca"}], {}, "b has a format, and shards are finished; leave it out"),
        ([A], {"data__train_data": ["x"]}, "data.sources and data.train_data are both given"),
        ([A], {"data__shards": "x"}, "data.sources and data.shards are both given"),
        ([A | {"repeats": 2}], {"data__temperature": 2}, "data.temperature 2.0 sets the shares by the sources' sizes, and a"),
        ([], {"data__temperature": 2}, "data.temperature 2.0 bends the shares of data.sources, and there are none"),
        ([A], {"train__fused_kernels": "on"}, "has a loss that does not tell sources apart, and data.sources are given"),
        ([A], {"data__eval_fraction": 0.1, "data__eval_data": ["x"]}, "data.eval_fraction 0.1 holds out a part of every"),
        ([A], {"data__eval_sets": [{"name": "mean", "paths": "x"}]}, "mean is the name of the mean of all sets"),
        ([A], {"data__eval_sets": [{"name": "eval", "paths": "x"}]}, "eval is the name of what data.eval_data"),
        ([A], {"data__eval_sets": [B | {"weight": 0}]}, "data.eval_sets: every weight is 0"),
        ([A], {"data__eval_sets": [B, B]}, "data.eval_sets: 2 entries are named b"),
    ],
)  # fmt: skip
def test_a_contradiction_is_one_line(sources, more, message):
    with pytest.raises(ConfigError) as error:
        loaded(data__sources=sources, **more)
    assert message in str(error.value) and error.value.exit_code == 2
