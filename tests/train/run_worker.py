"""On two ranks: one training run per ZeRO stage, whole, its first half, or resumed to the end."""

import json
import sys
from pathlib import Path

from tiny_run import configuration

from lumina_ds.engine.world import start, stop
from lumina_ds.train.start import train

CASES = ((1, "fp32"), (2, "fp32"), (3, "fp32"), (2, "bf16"))


if __name__ == "__main__":
    result, kind, runs_dir, shards, eval_shards = sys.argv[1:]
    world = start()
    for stage, precision in CASES:
        if kind == "whole":
            config = configuration("whole", stage, precision, runs_dir, eval_every_n_batches=5, save_every_n_batches=4)
        else:
            config = configuration("parts", stage, precision, runs_dir, stop_at_step=4 if kind == "half" else None)
        train(config, Path(shards), Path(eval_shards), world)
    if world.rank == 0:
        Path(result).write_text(json.dumps({"world": world.size}))
    stop(0, clean=True)
