"""On two ranks: the checkpoint that DeepSpeed really writes for every case, as file names with their sizes."""

import json
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from lumina_ds.config.deepspeed import compose_deepspeed
from lumina_ds.config.schema import RunConfig
from lumina_ds.engine.build import build_engine
from lumina_ds.engine.distributed import start, stop
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
    folder = [tempfile.mkdtemp()] if world.rank == 0 else [None]
    dist.broadcast_object_list(folder, src=0)
    engine.save_checkpoint(folder[0], tag="real", save_latest=False)
    dist.barrier()
    engine.destroy()
    return {path.name: path.stat().st_size for path in Path(folder[0], "real").iterdir()}


if __name__ == "__main__":
    world = start()
    found = [saved_files(case, world) for case in json.loads(Path(sys.argv[2]).read_text())]
    if world.rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    stop(0, clean=True)
