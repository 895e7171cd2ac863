"""Every parameter of an architecture that transformers knows, built without memory, in a process of its own.

    python -m lumina_ds.export.count_foreign SECONDS BYTES FOLDER

prints JSON: {"tensors": [[name, shape, kind], ...], "hidden_size": n, "tied": true}, or {"fault": text}.
"""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lumina_ds.config.tensors import ParameterTensor
from lumina_ds.data.limited import limit_this_process, verdict_of
from lumina_ds.errors import ConfigError, MachineError
from lumina_ds.plan.foreign_states import ForeignModel
from lumina_ds.text import shortened, with_article

_SECONDS = 120
_MEMORY_BYTES = 24 << 30  # of addresses: torch alone takes several GiB of them
_ROUTERS = ("gate", "router", "shared_expert_gate")


def counted_model(folder: Path, family: str) -> ForeignModel:
    """The model whose config.json lies in `folder`. Raises MachineError without transformers, ConfigError where it
    cannot build such a model."""
    if find_spec("transformers") is None:
        raise MachineError(f"counting {with_article(family)} needs transformers; pip install 'lumina-ds[hf]'")
    found = verdict_of("lumina_ds.export.count_foreign", _SECONDS, _MEMORY_BYTES, str(folder.resolve()))
    if found is None:
        raise ConfigError(
            f"{folder / 'config.json'}: its model could not be built within {_SECONDS} seconds; is its size right?"
        )
    if "fault" in found:
        raise ConfigError(f"{folder / 'config.json'}: transformers cannot build it: {shortened(found['fault'], 300)}")
    return model_of(folder.resolve().name, family, found)


def model_of(name: str, family: str, found: dict[str, Any]) -> ForeignModel:
    """What the process printed, as a model."""
    tensors = tuple(ParameterTensor(each, tuple(shape), kind) for each, shape, kind in found["tensors"])
    return ForeignModel(name, family, tensors, found["hidden_size"], found["tied"])


def tensors_of(folder: str) -> dict[str, Any]:
    """What the process prints of a folder with a config.json, or what transformers raises."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        network = _built(transformers, config)
    inner = config.get_text_config()
    embedding, head = network.get_input_embeddings(), network.get_output_embeddings()
    owners = dict(network.named_modules())
    tensors = []
    for name, parameter in network.named_parameters():
        owner = owners[name.rpartition(".")[0]]
        kind = "embedding" if owner is embedding else "head" if owner is head else _kind(name, type(owner).__name__)
        tensors.append([name, list(parameter.shape), kind])
    tied = head is not None and embedding is not None and head.weight is embedding.weight
    return {"tensors": tensors, "hidden_size": inner.hidden_size, "tied": tied}


def _built(transformers: Any, config: Any) -> Any:
    try:
        return transformers.AutoModelForCausalLM.from_config(config)
    except ValueError:
        # Not among the causal models: the class that the file itself names.
        name = (config.architectures or [""])[0]
        if not isinstance(known := getattr(transformers, name, None), type):
            raise
        return known(config)


def _kind(name: str, owner: str) -> str:
    parts = name.split(".")
    if "Norm" in owner:
        return "norm"
    if any(part.startswith("shared_expert") for part in parts) and "shared_expert_gate" not in parts:
        return "shared_experts"
    if "experts" in parts:
        return "experts"
    if any(part in _ROUTERS for part in parts[:-1]) or "Router" in owner:
        return "router"
    if any("attn" in part or "attention" in part for part in parts):
        return "attention"
    if any(part in ("mlp", "feed_forward", "ffn", "block_sparse_moe") for part in parts):
        return "dense_feed_forward"
    return "other"


if __name__ == "__main__":
    limit_this_process(int(sys.argv[1]), int(sys.argv[2]))
    try:
        verdict = tensors_of(sys.argv[3])
    except Exception as error:  # whatever a model's code says of a config that it does not take
        verdict = {"fault": f"{type(error).__name__}: {error}"}
    print(json.dumps(verdict))
