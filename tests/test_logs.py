"""Where the package's own messages go."""

import io
import logging
import sys

import pytest

from lumina_ds.logs import configure_logging


@pytest.fixture
def configured():
    """As a command line leaves logging; afterwards as it was, for the tests that read propagated records."""
    package = logging.getLogger("lumina_ds")
    before = package.handlers[:], package.propagate, package.level
    configure_logging()
    yield
    package.handlers[:], package.propagate = before[0], before[1]
    package.setLevel(before[2])


def test_a_warning_goes_where_standard_error_is_now(configured, monkeypatch, capsys):
    """rich puts itself there while the live line stands; a warning written past it would land in that line."""
    live = io.StringIO()
    monkeypatch.setattr(sys, "stderr", live)
    logging.getLogger("lumina_ds.train").warning("a spike")
    assert live.getvalue() == "a spike\n" and capsys.readouterr().err == ""
