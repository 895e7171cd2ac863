"""What `lumina plan time --calibrate` runs: a few real steps on this machine, a written file, collectives."""

from __future__ import annotations

import math
import socket
from datetime import datetime, timezone
from pathlib import Path

from lumina_ds.config.deepspeed.compose import compose_deepspeed
from lumina_ds.config.schema import RunConfig
from lumina_ds.errors import ConfigError
from lumina_ds.plan.calibration import Calibration, rates_from_steps, smaller_runs
from lumina_ds.plan.flops import performed_flops_per_token
from lumina_ds.plan.hardware import card_of_device
from lumina_ds.plan.memory import plan_memory

# Micro-batches of the two timed steps.
_FEW, _MANY = 1, 3
# A CPU's rank takes some seconds for so many operations; its memory is shared by all ranks.
_CPU_FLOPS = 4e11
_MEMORY_SHARE = 0.6


def calibrate(config: RunConfig, num_ranks: int) -> Calibration:
    """Measure `config`, or where this machine is too small for it one of the same widths with fewer layers.

    Starts ranks through the deepspeed runner, and writes to the folder of runs and removes it again.
    """
    from lumina_ds.measure.requests import measure_on_ranks
    from lumina_ds.ranks.check_run import check_ranks, check_run

    config = _on_ranks(config, num_ranks)
    checked = check_run(config, num_ranks)
    device, precision = checked.device, checked.precision
    check_ranks(num_ranks, device, 0)
    run = _that_fits(config, num_ranks, precision, device)
    check_ranks(num_ranks, device, plan_memory(run, num_ranks, precision, device).peak_bytes)
    folder, made = _runs_folder(config)
    try:
        requests: list[dict[str, object]] = [{"measure": "bandwidths", "folder": str(folder)}]
        requests += [_step_request(run, num_ranks, precision, count) for count in (_FEW, _MANY)]
        bandwidths, few, many = measure_on_ranks(requests, num_ranks)
    finally:
        if made:
            folder.rmdir()
    flops, once = rates_from_steps(run, {_FEW: few["seconds"], _MANY: many["seconds"]})
    card = card_of_device(bandwidths["device"], bandwidths["device_bytes"])
    layers = f"{run.model.num_hidden_layers} of {config.model.num_hidden_layers} layers"
    return Calibration(
        host=socket.gethostname(),
        device=bandwidths["device"],
        card=card.name if card else None,
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        num_ranks=num_ranks,
        measured_on=f"{config.run_name}, {layers}, {run.train.micro_batch_size} x {run.seq_length} tokens",
        precision=precision,
        flops_per_second=flops,
        seconds_per_parameter=once,
        write_bytes_per_second=bandwidths["write"],
        all_reduce_bytes_per_second=bandwidths["all_reduce"],
        all_to_all_bytes_per_second=bandwidths["all_to_all"],
    )


def _on_ranks(config: RunConfig, num_ranks: int) -> RunConfig:
    """With groups that so few ranks can form: what an expert computes does not depend on where it lies."""
    changed = config.model_copy(deep=True)
    changed.train.global_batch_size = None
    parallel = changed.deepspeed
    parallel.expert_parallel_size = math.gcd(parallel.expert_parallel_size, num_ranks)
    parallel.sequence_parallel_size = math.gcd(parallel.sequence_parallel_size, num_ranks)
    return changed


def _that_fits(config: RunConfig, num_ranks: int, precision: str, device: str) -> RunConfig:
    """The first of the smaller runs that the machine's memory holds and that does not take minutes."""
    import psutil
    import torch

    if device == "cuda":
        limit = torch.cuda.mem_get_info()[0]
    else:
        limit = int(_MEMORY_SHARE * psutil.virtual_memory().available / num_ranks)
    for run in smaller_runs(config):
        flops = performed_flops_per_token(run) * run.train.micro_batch_size * run.seq_length
        fits = plan_memory(run, num_ranks, precision, device).peak_bytes <= limit
        if fits and (device == "cuda" or flops <= _CPU_FLOPS):
            return run
    raise ConfigError(
        f"not even one layer of {config.run_name} can be measured on this machine; calibrate with a smaller --config, "
        "and use its file for this one with --calibration"
    )


def _step_request(run: RunConfig, num_ranks: int, precision: str, micro_batches: int) -> dict[str, object]:
    changed = run.model_copy(deep=True)
    changed.train.gradient_accumulation_steps = micro_batches
    return {
        "measure": "step_seconds",
        "config": changed.model_dump(mode="json"),
        "precision": precision,
        "deepspeed": compose_deepspeed(changed, num_ranks, precision),
    }


def _runs_folder(config: RunConfig) -> tuple[Path, bool]:
    """The folder of runs, and whether it had to be made for the measurement."""
    folder = Path(config.run.runs_dir).absolute()
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be made: {error.strerror}; set --run.runs_dir in the YAML") from error
    return folder, made
