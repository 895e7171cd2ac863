"""On two ranks: one step of plain DeepSpeed on small transformers models, and what its live tensors weigh."""

import json
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
import transformers

from lumina_ds.measure.live_tensors import (
    gradient_tensors,
    master_tensors,
    moment_tensors,
    num_bytes,
    parameter_tensors,
)


def measure(folder, case, world_size):
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    torch.manual_seed(0)
    network = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name not in case["frozen"])
    plain = [name for name, _ in network.named_parameters() if name in case["plain"]]
    trained = {name: value for name, value in network.named_parameters() if value.requires_grad}
    groups = [
        {"params": [value for name, value in trained.items() if name not in plain]},
        {"params": [value for name, value in trained.items() if name in plain], "weight_decay": 0.0},
    ]
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": case["zero"],
    }
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=1e-4)
    engine, *_ = deepspeed.initialize(model=network, optimizer=optimizer, config=settings)
    ids = torch.arange(16)[None] % config.get_text_config().vocab_size
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    gradients = num_bytes(gradient_tensors(engine))
    engine.step()
    found = [
        num_bytes(parameter_tensors(engine)),
        num_bytes(master_tensors(engine.optimizer)),
        num_bytes(moment_tensors(engine.optimizer)),
        gradients,
    ]
    engine.destroy()
    fullest = torch.tensor(found)
    dist.all_reduce(fullest, dist.ReduceOp.MAX)
    return fullest.tolist()


if __name__ == "__main__":
    deepspeed.init_distributed("gloo")
    cases = json.loads(Path(sys.argv[2]).read_text())
    results = [measure(case["folder"], case, dist.get_world_size()) for case in cases]
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(results))
    dist.destroy_process_group()
