"""A formula computes what it shows."""

from __future__ import annotations

import pytest

from lumina_ds.plan.formula import Formula


@pytest.mark.parametrize(
    ("filled", "value"),
    [
        ("7,055,632,384", 7_055_632_384),
        ("2 x (3 + 1,000) - 4 x 5", 1986),
        ("round(0.05 x 1,010)", 50),
        ("max(1,000, 2,000, 30)", 2000),
        ("8 x 12 + 4 x 3 x 2", 120),
    ],
)
def test_the_value_is_that_of_the_numbers(filled, value):
    assert Formula("any", filled).value == value


@pytest.mark.parametrize("filled", ["n x 3", "2 ** 3", "abs(3)", "__import__('os').getcwd()", "'a'"])
def test_anything_else_is_refused(filled):
    with pytest.raises(ValueError, match="is no arithmetic of a formula"):
        Formula("any", filled).value  # noqa: B018
