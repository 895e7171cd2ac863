"""On one rank: one long run, and the same in lives of other lengths, over moved shards, and after a loss of
checkpoints; stops at a step."""

import json
import shutil
import sys
from pathlib import Path

from tiny_run import configuration

from lumina_ds.engine.world import start, stop
from lumina_ds.errors import CheckpointError
from lumina_ds.train.outputs import Outputs
from lumina_ds.train.start import train

MOVED_AFTER = 2


def moving(shards: Path) -> None:
    """From now on, the shards go once step MOVED_AFTER is recorded, and others come in their place."""
    record = Outputs.record

    def record_and_move(self, entry):
        record(self, entry)
        if entry.step == MOVED_AFTER and not shards.with_name("moved").exists():
            shards.rename(shards.with_name("moved"))
            shards.mkdir()
            (shards / "manifest.json").write_text("another")

    Outputs.record = record_and_move


def losing_checkpoints(folder: Path) -> None:
    """From now on, the folder goes once step 3 is recorded, which the save of step 4 finds."""
    record = Outputs.record

    def record_and_remove(self, entry):
        record(self, entry)
        if entry.step == 3:
            shutil.rmtree(folder, ignore_errors=True)

    Outputs.record = record_and_remove


def lines(runs_dir: Path, name: str) -> str:
    return (runs_dir / name / "logs" / "rank-0.log").read_text()


if __name__ == "__main__":
    result, runs_dir, shards = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    world = start()

    def run(name, data=shards, resume="auto", **length):
        fields = {"max_steps": None, "micro_batch_size": 16, **length}
        config = configuration(name, 1, "fp32", str(runs_dir), **fields)
        config.deepspeed.expert_parallel_size = 1
        config.run.resume = resume
        train(config, data, None, world)

    run("long", epochs=2)
    run("lives", epochs=1, save_every_n_batches=1)
    folder = runs_dir / "lives-zero1-fp32"
    shutil.copytree(folder, runs_dir / "killed-zero1-fp32")
    run("lives", epochs=1.5, resume="must")
    run("lives", epochs=2)
    # A life whose checkpoints are gone, as after a kill before the first.
    shutil.rmtree(runs_dir / "killed-zero1-fp32" / "checkpoints")
    refused = None
    try:
        run("killed", epochs=1, resume="must")
    except CheckpointError as error:
        refused = str(error)
    run("killed", epochs=1)
    data = runs_dir / "shards"
    shutil.copytree(shards, data)
    moving(data)
    run("moved", data, epochs=1, save_every_n_batches=1)
    losing_checkpoints(runs_dir / "stops-zero1-fp32" / "checkpoints")
    steps = {"max_steps": 6, "epochs": 2.0, "save_every_n_batches": 2}
    for stop_at_step in (4, 4, 40):
        run("stops", stop_at_step=stop_at_step, **steps)
    result.write_text(json.dumps({"refused": refused}))
    stop(0, clean=True)
