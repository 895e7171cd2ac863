"""manifest.json of a step folder, typed: what a checkpoint says of its run, and which files it consists of.

A manifest is written last and seals the folder. Reading checks all of it, so that nobody who uses one meets a missing or
mistyped field; keys that a later version may add are kept.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt, PositiveInt, ValidationError

from lumina_ds.config.schema import ModelConfig, RunConfig, ZeroStage
from lumina_ds.data.mixture.state import MixtureState
from lumina_ds.data.templates.find import NamedTemplate, template_of
from lumina_ds.data.turns import TrainReasoning
from lumina_ds.errors import CheckpointError
from lumina_ds.foreign_files import read_json, shown

FORMAT = 2
MANIFEST = "manifest.json"

# Plain names: nothing outside the folder is followed from a manifest.
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,200}$")]

# (first, count) of positions in the order of the rows.
Interval = Annotated[list[NonNegativeInt], Field(min_length=2, max_length=2)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", frozen=True)


class Topology(_Part):
    """The layout under which the state is divided, and the precision that computed it."""

    world_size: PositiveInt
    zero_stage: ZeroStage
    expert_parallel_size: PositiveInt
    precision: str


class SavedOptimizer(_Part):
    name: str
    weight_decay: float
    betas: list[float]
    epsilon: float


class Digest(_Part):
    sha256: str


class SavedData(Digest):
    """`sha256` is that of the shards' own manifest; `order` names the way in which rows are shuffled."""

    seq_length: PositiveInt
    seed: int
    order: str


class Schedule(_Part):
    rows_per_step: PositiveInt


class RunIdentity(_Part):
    """What a checkpoint shares with every run that may resume from it (train/resume.py says what may differ)."""

    topology: Topology
    model: dict[str, Any]
    optimizer: SavedOptimizer
    tokenizer: Digest
    template: Digest
    data: SavedData
    schedule: Schedule


class SavedHealth(_Part):
    """The history by which steps are judged, and how often, over which positions, the run went back."""

    losses: list[FiniteFloat]
    grad_norms: list[FiniteFloat]
    skips_in_a_row: NonNegativeInt
    rollbacks: NonNegativeInt = 0
    passed_over: list[Interval] = []


class SavedInference(_Part):
    precision: str


class SavedDataConfig(_Part):
    """train_reasoning: checkpoints of before this setting were trained without reasoning."""

    train_reasoning: TrainReasoning = "yes"


class SavedConfig(_Part):
    """The run's configuration as it was; run_config() reads all of it."""

    train: dict[str, Any]
    inference: SavedInference
    data: SavedDataConfig = SavedDataConfig()


class SavedRun(RunIdentity):
    """What the training says of itself at a step: `filled` are positions of `rows` in which no row stood, since a life
    ended inside a step. Checkpoints of before this field go on as they did: with the rows that follow the whole step.

    `mixture` is how far a run on several sources has come in each, and by which weights; `eval_set` names the evaluation
    set of `eval_loss`, None for the only one.
    """

    step: NonNegativeInt
    tokens: NonNegativeInt
    skipped: NonNegativeInt
    rows: NonNegativeInt
    filled: list[Interval] = []
    mixture: MixtureState | None = None
    eval_loss: FiniteFloat | None
    eval_set: str | None = None
    config: SavedConfig
    health: SavedHealth


class EngineCounters(_Part):
    """Numbers of DeepSpeed's that are no tensors: skipped steps, loss scale, and a step count kept by group."""

    skipped_steps: NonNegativeInt
    loss_scaler: dict[str, bool | int | float]
    group_step: int | None


class FileEntry(_Part):
    bytes: NonNegativeInt
    sha256: str


class Manifest(SavedRun):
    """All of manifest.json but its own digest."""

    engine: EngineCounters
    files: Annotated[dict[FileName, FileEntry], Field(min_length=1)]
    format: int = FORMAT

    @property
    def num_bytes(self) -> int:
        """Size of all files together, without the manifest."""
        return sum(entry.bytes for entry in self.files.values())

    def shape(self) -> ModelConfig:
        """The section `model`; CheckpointError when this version has no such model."""
        try:
            return ModelConfig.model_validate(self.model)
        except ValidationError as error:
            raise CheckpointError(f"the model of the checkpoint of step {self.step} {_first_fault(error)}") from error

    def run_config(self) -> RunConfig:
        """The configuration; CheckpointError when this version does not take it."""
        try:
            return RunConfig.model_validate(self.config.model_dump())
        except ValidationError as error:
            raise CheckpointError(
                f"the configuration of the checkpoint of step {self.step} {_first_fault(error)}"
            ) from error

    def chat_template(self, folder: Path) -> NamedTemplate:
        """The chat template that it was trained with, which may lie in its step folder; CheckpointError without it."""
        found = template_of(folder, self.template.sha256)
        if found is None:
            raise CheckpointError(
                f"the checkpoint of step {self.step} was trained with a chat template that is unknown here (digest "
                f"{shown(self.template.sha256[:12])}); add its entry to TEMPLATES of lumina_ds/config/chat_templates.py"
            )
        return found

    def sealed(self) -> str:
        """The content of the file, with the digest by which a change is noticed."""
        later = {"mixture", "eval_set"}  # only where a run has them, as in earlier versions
        content = {name: value for name, value in self.model_dump().items() if value is not None or name not in later}
        return json.dumps(content | {"digest": manifest_digest(content)}, indent=1)


def step_name(step: int) -> str:
    """Name of the step folder."""
    return f"step-{step:08d}"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a step folder; CheckpointError when missing, altered, incomplete, or of another step or format."""
    path = folder / MANIFEST
    try:
        content = read_json(path, follow_links=False)
        is_sealed = isinstance(content, dict) and content.get("digest") == manifest_digest(content)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is missing or unreadable; the checkpoint was not finished") from error
    if not is_sealed:
        raise CheckpointError(f"{path} was altered (its digest differs)")
    if content.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder} has checkpoint format {shown(content.get('format'))}, this version reads {FORMAT}; "
            "use the version that wrote it, or start a run from its weights with --train.init_from"
        )
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        raise CheckpointError(f"{path} {_first_fault(error)}; use another checkpoint") from error
    if step_name(manifest.step) != folder.name:
        raise CheckpointError(f"{folder} holds the checkpoint of step {manifest.step}; it was renamed")
    return manifest


def manifest_digest(content: dict[str, Any]) -> str:
    """SHA-256 of a manifest's content without its own digest, in canonical JSON."""
    unsealed = {key: value for key, value in content.items() if key != "digest"}
    return hashlib.sha256(json.dumps(unsealed, sort_keys=True).encode()).hexdigest()


def _first_fault(error: ValidationError) -> str:
    fault = error.errors(include_url=False, include_input=False)[0]
    return f"is not complete: {shown('.'.join(map(str, fault['loc'])))}: {fault['msg']}"
