"""On two ranks: what each rank really saves of parameters and moments, for every case."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from lumina_ds.checkpoint.saver import rank_files
from lumina_ds.config.deepspeed.compose import compose_deepspeed
from lumina_ds.config.schema import RunConfig
from lumina_ds.engine.build import build_engine
from lumina_ds.engine.world import start, stop
from lumina_ds.model.attention_backends import DocumentLayout


def saved_files(case, world):
    config = RunConfig.model_validate(case["config"])
    json_ = compose_deepspeed(config, world.size, case["precision"])
    engine = build_engine(config, world, case["precision"], json_)
    ids = torch.arange(8)[None]
    documents = DocumentLayout.from_lengths((8,))
    loss, *_ = engine(input_ids=ids, labels=ids, position_ids=ids, documents=documents)
    engine.backward(loss)
    engine.step()
    file = next(rank_files(engine))
    gathered = [None] * world.size
    dist.all_gather_object(gathered, (file.name, file.num_bytes))
    engine.destroy()
    return dict(gathered)


if __name__ == "__main__":
    world = start()
    found = [saved_files(case, world) for case in json.loads(Path(sys.argv[2]).read_text())]
    if world.rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    stop(0, clean=True)
