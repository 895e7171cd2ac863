"""A manifest as training writes it, for tests that need a checkpoint without a run."""

from lumina_ds.checkpoint.manifest import Manifest
from lumina_ds.config.schema import RunConfig

CONTENT = {
    "topology": {"world_size": 2, "zero_stage": 2, "expert_parallel_size": 2, "precision": "fp32"},
    "optimizer": {"name": "adamw", "weight_decay": 0.1, "betas": [0.9, 0.95], "epsilon": 1e-8},
    "tokenizer": {"sha256": "a"},
    "template": {"sha256": "b"},
    "data": {"sha256": "c", "seq_length": 64, "seed": 42, "order": "feistel-16"},
    "schedule": {"rows_per_step": 8},
    "step": 1,
    "tokens": 100,
    "skipped": 0,
    "rows": 8,
    "eval_loss": None,
    "health": {"losses": [2.5], "grad_norms": [1.0], "skips_in_a_row": 0, "rollbacks": 0, "passed_over": []},
    "engine": {"skipped_steps": 0, "loss_scaler": {"cur_scale": 1.0}, "group_step": None},
    "files": {"data.bin": {"bytes": 7, "sha256": "d"}},
    "format": 2,
}


def manifest_content(config=None, **fields):
    """The JSON of a manifest, without its digest; `fields` replace whole sections."""
    config = config or RunConfig()
    return {**CONTENT, "model": config.model.model_dump(), "config": config.model_dump(), **fields}


def make_manifest(config=None, **fields):
    return Manifest.model_validate(manifest_content(config, **fields))
