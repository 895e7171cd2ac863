"""On two ranks: runs that go back to a checkpoint, whole and in two lives, and one that goes back too often."""

import json
import sys
from pathlib import Path

import fault_injection
import health_worker
from health_worker import configuration, run

from lumina_ds.engine.world import start, stop

if __name__ == "__main__":
    result, life, runs_dir, shards = sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4])
    world = start()
    health_worker.injection = fault_injection.Injection([])
    found = {}
    length = {"max_steps": 12, "save_every_n_batches": 4}
    spike = [{"kind": "spike", "rank": 1, "step": 7, "times": 50.0, "marker": f"{runs_dir}/{{}}-spiked"}]
    for stage in (1, 3):
        for part in ("whole", "parts"):
            if part == "whole" and life == "second":
                continue
            stop_at = 9 if part == "parts" and life == "first" else None
            name = f"{part}-{stage}"
            fields = length | {"stop_at_step": stop_at}
            config = configuration(name, stage, "fp32", runs_dir, fields, {"spike_policy": "rollback"})
            faults = [fault | {"marker": fault["marker"].format(f"{name}-rank")} for fault in spike]
            found[name] = run(config, faults if life == "first" else [], shards, world)
    if life == "first":
        health = {"spike_policy": "rollback", "max_consecutive_skips": 2, "max_rollbacks": 2}
        config = configuration("nans", 2, "fp32", runs_dir, length, health)
        found["nans"] = run(config, [{"kind": "nan", "rank": 1, "step": 6, "until": 12}], shards, world)
        epochs = configuration(
            "epochs", 2, "fp32", runs_dir, length | {"max_steps": None}, {"spike_policy": "rollback"}
        )
        faults = [spike[0] | {"marker": f"{runs_dir}/epochs-spiked"}]
        found["epochs"] = run(epochs, faults, shards, world)
    if world.rank == 0:
        Path(result).write_text(json.dumps(found))
    stop(0, clean=True)
