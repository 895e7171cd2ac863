"""On one rank: a metric from outside the package, a run that records it, and a report that draws it."""

import sys
from pathlib import Path

from lumina_ds.cli.main import cli, run_command
from lumina_ds.config.schema import RunConfig
from lumina_ds.engine.world import start, stop
from lumina_ds.monitor.metrics import Metric, Plot
from lumina_ds.monitor.records import add_metric
from lumina_ds.train.start import train

add_metric(
    "trained_share",
    Metric(
        "label tokens among the tokens of the step",
        lambda step: step.counts.trained_tokens / step.counts.tokens,
        in_csv=True,
        figure="trained {:.1%}".format,
        plot=Plot("Share of label tokens", "percent", divisor=0.01),
    ),
)

if __name__ == "__main__":
    result, runs_dir, shards = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    world = start()
    config = RunConfig.model_validate(
        {
            "model": {
                "vocab_size": 400, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                "num_key_value_heads": 1, "max_position_embeddings": 64, "num_experts": 4,
                "moe_intermediate_size": 16, "tie_word_embeddings": True,
            },
            "train": {"micro_batch_size": 2, "max_steps": 3, "precision": "fp32"},
            "run": {"name": "added", "runs_dir": runs_dir, "record_samples": True},
        }
    )  # fmt: skip
    train(config, shards, None, world)
    code = run_command(cli, ["report", f"{runs_dir}/added"])
    Path(result).write_text(f"{code}")
    stop(0, clean=True)
