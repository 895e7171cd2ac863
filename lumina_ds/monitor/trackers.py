"""Metrics to TensorBoard and Weights & Biases, through their own libraries, beside the files that are always written."""

from __future__ import annotations

import importlib.util
import math
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from lumina_ds.config.schema import RunSection
from lumina_ds.errors import MachineError
from lumina_ds.monitor.records import METRICS, EvaluationRecord, StepRecord


class Tracker(Protocol):
    """Takes scalars by name at a step."""

    def log(self, scalars: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


def missing_trackers(settings: RunSection) -> list[str]:
    """What the settings ask for and this installation lacks, a sentence each."""
    asked = {"tensorboard": settings.tensorboard, "wandb": settings.wandb != "off"}
    return [
        f"run.{name} is on and the package {name} is not installed; pip install 'lumina-ds[{name}]'"
        for name, on in asked.items()
        if on and importlib.util.find_spec(name) is None
    ]


def open_trackers(settings: RunSection, folder: Path, config: Mapping[str, Any], resumed_step: int) -> list[Tracker]:
    """The trackers that `settings` asks for; curves go on after `resumed_step`. `folder` is that of the run.

    Raises MachineError when a package is missing, or W&B cannot start (no login, no network).
    """
    if faults := missing_trackers(settings):
        raise MachineError("; ".join(faults))
    trackers: list[Tracker] = []
    if settings.tensorboard:
        trackers.append(TensorBoardTracker(folder / "tensorboard", resumed_step))
    if settings.wandb != "off":
        trackers.append(WandbTracker(settings, folder, config))
    return trackers


def scalars_of(record: StepRecord | EvaluationRecord) -> dict[str, float]:
    """Numbers as train/NAME or eval/NAME; a list with a number per layer as layers/NAME/LL. Others are left out."""
    if isinstance(record, EvaluationRecord):
        numbers = {name: value for name, value in record.values().items() if name != "step"}
        place = "eval" if record.name is None else f"eval/{record.name}"
        return {f"{place}/{name}": float(value) for name, value in numbers.items() if _is_number(value)}
    scalars: dict[str, float] = {}
    for name, metric in METRICS.items():
        value = record.value(name)
        if not metric.is_tracked or value is None:
            continue
        if _is_number(value):
            scalars[f"train/{name}"] = float(value)
        elif isinstance(value, Mapping):
            scalars |= {f"sources/{key}/{name}": float(each) for key, each in value.items() if _is_number(each)}
        elif isinstance(value, Sequence) and value and all(_is_number(each) for each in value):
            scalars |= {f"layers/{name}/{layer:02d}": float(each) for layer, each in enumerate(value)}
    return scalars


class TensorBoardTracker:
    """Event files in RUN/tensorboard. What an earlier life wrote after the resumed step is hidden."""

    def __init__(self, folder: Path, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=resumed_step + 1 if resumed_step else None)

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """One W&B run per run folder, the same after a resume; offline ones wait in RUN/wandb for `wandb sync`."""

    def __init__(self, settings: RunSection, folder: Path, config: Mapping[str, Any]) -> None:
        import wandb

        # One run folder is one run there.
        identity = folder / "wandb" / "run-id"
        identity.parent.mkdir(parents=True, exist_ok=True)
        if not identity.exists():
            identity.write_text(secrets.token_hex(4), encoding="utf-8")
        try:
            self._run = wandb.init(
                project=settings.wandb_project,
                name=folder.name,
                id=identity.read_text(encoding="utf-8").strip(),
                resume="allow",
                mode="offline" if settings.wandb == "offline" else "online",
                dir=str(folder),
                config=dict(config),
                settings=wandb.Settings(silent=True, console="off"),
            )
            # A run that goes back repeats steps, which W&B's own counter would drop.
            self._run.define_metric("step", hidden=True)
            self._run.define_metric("*", step_metric="step")
        except wandb.errors.Error as error:
            raise MachineError(f"Weights & Biases cannot start ({error}); wandb login, or --wandb offline") from error

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        self._run.log({**scalars, "step": step})

    def close(self) -> None:
        self._run.finish()


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
