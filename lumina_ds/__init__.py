"""Lumina DS: JSONL conversations to a trained mixture-of-experts language model, on DeepSpeed."""

__version__ = "0.1.0"
