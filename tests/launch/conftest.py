"""Shared by the tests of launch/: this checkout's lumina on the PATH, and a tiny model."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

CHECKOUT = Path(__file__).parents[2]
MODEL = {
    "vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "num_experts": 4, "moe_intermediate_size": 32,
}  # fmt: skip


@pytest.fixture
def tools(tmp_path: Path) -> Callable[..., Path]:
    """tools(name=text, ...) makes programs in a folder that comes first on the PATH of `environment`."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def make(**texts: str) -> Path:
        for name, text in texts.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        return folder

    make(lumina=f'#!/bin/sh\nexec "{sys.executable}" -m lumina_ds "$@"\n')
    return make


@pytest.fixture
def environment(tools: Callable[..., Path]) -> dict[str, str]:
    """For a launch script: `tools` and this interpreter's programs come first, and ranks import this checkout."""
    return os.environ | {
        "PATH": os.pathsep.join([str(tools()), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH", "")])),
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture
def write_config(corpus: Any, tmp_path: Path) -> Callable[..., Path]:
    """write_config(**train) writes tiny.yaml: a model of four experts on the corpus, with this section train."""

    def write(**train: int) -> Path:
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump({"model": MODEL, "train": train, "data": {"shards": str(corpus.shards)}}))
        return path

    return write
