"""On two ranks: Muon whole and in two lives; a bf16 run that becomes unstable; bf16 checkpoints taken up in fp32."""

import json
import sys
from pathlib import Path

from tiny_run import configuration

from lumina_ds.engine.world import start, stop
from lumina_ds.train import guarded_step
from lumina_ds.train.start import train

sound_step = guarded_step.run_step


def poison_bf16(engine, batches, counts, model, *rest, **options):
    """From step 6 on, a loss that is not a number wherever bf16 computes it."""
    if engine.bfloat16_enabled() and engine.global_steps >= 6:
        model = model.model_copy(update={"router_aux_loss_coef": float("nan")})
    return sound_step(engine, batches, counts, model, *rest, **options)


if __name__ == "__main__":
    result, runs_dir, shards = sys.argv[1:]
    world = start()

    def run(name, stage, precision, **fields):
        config = configuration(name, stage, "fp32", runs_dir, **fields)
        config.train.precision = precision
        config.run.name = f"{name}-zero{stage}"
        config.health.max_consecutive_skips = 1
        train(config, Path(shards), None, world)

    muon = {"optimizer": "muon", "muon_learning_rate": 0.01}
    for stage in (1, 2):
        run("muon", stage, "fp32", **muon)
        run("muon-parts", stage, "fp32", **muon, stop_at_step=5)
        run("muon-parts", stage, "fp32", **muon)
    for stage in (2, 3):
        run("bf16", stage, "bf16")
        run("taken-up", stage, "bf16", stop_at_step=5)
        run("taken-up", stage, "fp32")
    guarded_step.run_step = poison_bf16
    run("fallback", 2, "bf16", save_every_n_batches=4, precision_fallback=True)
    run("fallback", 2, "bf16", save_every_n_batches=4, precision_fallback=True, max_steps=12)
    if world.rank == 0:
        Path(result).write_text(json.dumps({}))
    stop(0, clean=True)
