"""On one GPU: an fp16 run whole, in two lives, and one that goes on in fp32."""

import json
import sys
from pathlib import Path

from tiny_run import configuration

from lumina_ds.engine.world import start, stop
from lumina_ds.train.start import train

if __name__ == "__main__":
    result, runs_dir, shards = sys.argv[1:]
    world = start()
    for name, precision, end in (
        ("whole", "fp16", None), ("parts", "fp16", 5), ("parts", "fp16", None), ("left", "fp16", 5), ("left", "fp32", None)
    ):  # fmt: skip
        config = configuration(name, 1, "fp16", runs_dir, stop_at_step=end)
        config.deepspeed.expert_parallel_size = 1
        config.train.precision = precision
        train(config, Path(shards), None, world)
    Path(result).write_text(json.dumps({}))
    stop(0, clean=True)
