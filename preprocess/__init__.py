"""The offline stage: JSONL conversations to packed Arrow shards, ahead of training. `python -m preprocess`."""
