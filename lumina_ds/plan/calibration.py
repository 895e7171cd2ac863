"""What a machine was measured to do, in place of assumed figures: made by `lumina plan time --calibrate`, kept in a file.

One step of the optimizer costs m micro-batches of F floating-point operations each, at a measured rate, and once the
optimizer itself, which goes with the number of parameters:

    seconds = m F / flops_per_second + parameters x seconds_per_parameter

Two timed steps of different m give both. Communication is inside them, as much as the measured ranks had of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lumina_ds.config.schema import RunConfig
from lumina_ds.errors import ConfigError
from lumina_ds.files import cache_folder, write_atomically
from lumina_ds.plan.flops import performed_flops_per_token
from lumina_ds.plan.parameters import count_parameters


@dataclass(frozen=True)
class Calibration:
    """`flops_per_second` are of one rank, recomputation counted; `seconds_per_parameter` those of the optimizer step
    and all else that happens once a step. Bandwidths are bytes per second: `write` of all ranks together to the
    folder of runs, the collectives of one rank, None where there was one rank. `card` is the GPU's name in
    lumina_ds/plan/hardware.py, None for another device; `measured_on` says what was run."""

    host: str
    device: str
    card: str | None
    date: str
    num_ranks: int
    measured_on: str
    precision: str
    flops_per_second: float
    seconds_per_parameter: float
    write_bytes_per_second: float
    all_reduce_bytes_per_second: float | None
    all_to_all_bytes_per_second: float | None

    def step_seconds(self, config: RunConfig) -> float:
        """One optimizer step of `config`, whatever the number of ranks: each has its own micro-batches."""
        train = config.train
        work = train.gradient_accumulation_steps * _micro_batch_flops(config)
        once = count_parameters(config.model).total * self.seconds_per_parameter
        return work / self.flops_per_second + once


def rates_from_steps(config: RunConfig, seconds: Mapping[int, float]) -> tuple[float, float]:
    """(flops_per_second, seconds_per_parameter) from the seconds of a step by its number of micro-batches, of two."""
    (few, short), (many, long) = sorted(seconds.items())
    # Where noise turns the two around, the longer one is taken to hold nothing but its micro-batches.
    each = (long - short) / (many - few) if long > short else long / many
    each = min(each, long / many)
    once = max(0.0, short - few * each)
    return _micro_batch_flops(config) / each, once / count_parameters(config.model).total


def smaller_runs(config: RunConfig) -> Sequence[RunConfig]:
    """`config` and ever smaller ones of the same widths: one row, fewer layers down to one kind each, shorter rows."""
    runs = [config]
    if config.train.micro_batch_size > 1:
        runs.append(_changed(runs[-1], micro_batch=1))
    first_expert = config.model.first_k_dense_layers if config.model.num_experts else 0
    layers = config.model.num_hidden_layers
    while layers > first_expert + 1:
        layers = max(first_expert + 1, layers // 2)
        runs.append(_changed(runs[-1], layers=layers))
    length = config.seq_length
    while length > 256:
        length //= 2
        runs.append(_changed(runs[-1], length=length))
    return runs


def default_path(host: str, device: str) -> Path:
    """In the user's cache directory, by host and device."""
    return cache_folder() / "lumina-ds" / "calibration" / f"{_as_name(host)}-{_as_name(device)}.json"


def saved_calibrations(host: str) -> list[Calibration]:
    """What was measured on `host`, newest first; files that are none are passed over."""
    found = []
    for path in default_path(host, "").parent.glob(f"{_as_name(host)}-*.json"):
        try:
            found.append(read_calibration(path))
        except ConfigError:
            continue
    return sorted((each for each in found if each.host == host), key=lambda each: each.date, reverse=True)


def read_calibration(path: Path) -> Calibration:
    """Raises ConfigError for a file that is missing or no calibration."""
    try:
        return Calibration(**json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}; make it with lumina plan time --calibrate"
        ) from error
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is no calibration; make one with lumina plan time --calibrate") from error


def write_calibration(calibration: Calibration, path: Path) -> None:
    """Raises ConfigError where the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(asdict(calibration), indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}; choose another --calibration") from error


def _micro_batch_flops(config: RunConfig) -> float:
    tokens = config.train.micro_batch_size * config.seq_length // config.deepspeed.sequence_parallel_size
    return tokens * performed_flops_per_token(config)


def _changed(
    config: RunConfig, micro_batch: int | None = None, layers: int | None = None, length: int | None = None
) -> RunConfig:
    changed = config.model_copy(deep=True)
    changed.train.global_batch_size = None
    changed.train.micro_batch_size = micro_batch or changed.train.micro_batch_size
    changed.model.num_hidden_layers = layers or changed.model.num_hidden_layers
    changed.data.seq_length = length or changed.data.seq_length
    return changed


def _as_name(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
