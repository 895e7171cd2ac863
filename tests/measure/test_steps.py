"""What is measured is what would be trained."""

import pytest
import torch

from lumina_ds.config.load import Override, load_config
from lumina_ds.data.loader import RandomRows
from lumina_ds.engine.world import World
from lumina_ds.measure.steps import TimedSteps
from lumina_ds.ranks.check_run import check_run


@pytest.mark.parametrize(("preset", "precision"), [("debug", "mixed_bf16"), ("b1", "bf16")])
def test_auto_precision_goes_by_the_models_size_as_in_training(preset, precision, monkeypatch):
    """On a GPU with bf16; this machine is made to say that it has one, and nothing is built on it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    config = load_config(preset, [Override("train.flash_attention", "off", "here")]).config
    config.train.fused_kernels = "off"
    steps = TimedSteps(config, RandomRows(config.model.vocab_size, config.seq_length), World(0, 0, 1, "cuda"))
    assert steps.precision == check_run(config, 1).precision == precision
    assert steps.deepspeed_json.get("torch_autocast", {}).get("enabled", False) == (precision == "mixed_bf16")
