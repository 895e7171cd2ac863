"""When a run compiles, with the reason, and how the option is spelled."""

import pytest

from lumina_ds.config.precision import choose_compile
from lumina_ds.config.schema import RunConfig


def chosen(device, compiler="gcc", monkeypatch=None, **fields):
    monkeypatch.setattr("shutil.which", lambda name: name if name == compiler else None)
    config = RunConfig.model_validate({"train": {"compile": fields.pop("compile")}, "model": fields})
    return choose_compile(config, device)


@pytest.mark.parametrize(
    "asked, device, experts, compiler, expected, reason",
    [
        ("auto", "cuda", 0, "gcc", True, "dense model on a GPU"),
        ("auto", "cuda", 0, None, False, "need a C compiler"),
        ("auto", "cuda", 4, "gcc", False, "dispatch to experts"),
        ("auto", "cpu", 0, "gcc", False, "on a CPU"),
        ("on", "cpu", 0, None, True, "on as asked"),
        ("off", "cuda", 0, "gcc", False, "off as asked"),
        (True, "cpu", 0, "gcc", True, "on as asked"),  # as configurations before auto say it
        (False, "cuda", 0, "gcc", False, "off as asked"),
    ],
)
def test_choice(monkeypatch, asked, device, experts, compiler, expected, reason):
    found, why = chosen(device, compiler, monkeypatch, compile=asked, num_experts=experts)
    assert found is expected and reason in why
