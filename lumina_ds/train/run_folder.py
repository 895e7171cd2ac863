"""The run folder: its paths, its lock, and the files that say what the run is and where it trains."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lumina_ds import __version__
from lumina_ds.checkpoint.format import step_folders
from lumina_ds.config.chat_templates import AUTO_TEMPLATE
from lumina_ds.config.own_file import with_whole_paths
from lumina_ds.config.schema import RunConfig
from lumina_ds.config.yaml_file import read_yaml, yaml_text
from lumina_ds.data.templates.find import STORED_TEMPLATE
from lumina_ds.errors import ConfigError
from lumina_ds.files import write_atomically
from lumina_ds.text import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lumina_ds.data.loader import PackedRows
    from lumina_ds.data.mixture.rows import MixedRows
    from lumina_ds.engine.world import World
    from lumina_ds.train.evaluation_sets import EvaluationSet

LIBRARIES = ("torch", "deepspeed", "numpy", "pyarrow", "sentencepiece", "safetensors", "flash-attn")


class RunFolder:
    """runs/NAME/{config.yaml, ds_config.json, metrics.jsonl, metrics.csv, evaluations.jsonl, logs, checkpoints}."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.logs = path / "logs"
        # Of an elastic run, a line for each life: from which step on it had how many ranks.
        self.layouts = self.logs / "layouts.jsonl"
        # While it is there, an elastic run that trains saves and ends, to be started with other ranks.
        self.stop_request = self.logs / "stop-request"
        self._lock: IO[str] | None = None

    @classmethod
    def of(cls, config: RunConfig) -> RunFolder:
        return cls(Path(config.run.runs_dir) / config.run_name)

    def create(self) -> None:
        """Make the folder; ConfigError when it cannot be made or written."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.logs.mkdir(exist_ok=True)
        except OSError as error:
            raise self._cannot_be_made(error.strerror) from error

    def check_place(self) -> None:
        """Raise the ConfigError of `create` where it would, and make nothing."""
        there = next(place for place in (self.checkpoints, *self.checkpoints.absolute().parents) if place.exists())
        fault = errno.ENOTDIR if not there.is_dir() else 0 if os.access(there, os.W_OK | os.X_OK) else errno.EACCES
        if fault:
            raise self._cannot_be_made(os.strerror(fault))

    def _cannot_be_made(self, reason: str | None) -> ConfigError:
        return ConfigError(f"cannot create the run folder {self.path}: {reason}; set --runs-dir")

    @contextmanager
    def gone_on_failure(self) -> Iterator[None]:
        """Take away what this made, as far as it is empty, when the block fails: a refused command leaves no folder."""
        made = [place for place in (self.path, *self.path.parents) if not place.exists()]
        try:
            yield
        except BaseException:
            for place in (self.checkpoints, self.logs, *made):
                with suppress(OSError):
                    place.rmdir()
            raise

    def lock(self) -> None:
        """Hold the folder for this process; raises ConfigError when another run has it."""
        try:
            self._lock = open(self.path / ".lock", "w")
        except OSError as error:
            raise ConfigError(
                f"the run folder {self.path} cannot be written: {error.strerror}; set --runs-dir"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"another run is training in {self.path}; wait for it, or choose another --experiment-name"
            ) from error

    def release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def write_preprocessing(self, record: dict[str, Any], fresh: bool) -> None:
        """preprocessing.json: what became of the lines.

        That of a run with checkpoints stays unless the run starts `fresh`: other data are refused, but only by the ranks.
        """
        self.create()
        path = self.path / "preprocessing.json"
        if fresh or not (path.exists() and step_folders(self.checkpoints)):
            write_atomically(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")

    def write_settings(self, config: dict[str, Any], deepspeed_json: dict[str, Any], tokenizer: Path) -> None:
        """config.yaml, which starts the same run again, ds_config.json, and tokenizer and template of the shards."""
        write_atomically(self.path / "config.yaml", yaml_text(with_whole_paths(config)))
        write_atomically(self.path / "ds_config.json", json.dumps(deepspeed_json, indent=2))
        shutil.copyfile(tokenizer, self.path / tokenizer.name)
        template = tokenizer.with_name(STORED_TEMPLATE)
        if template.is_file():
            shutil.copyfile(template, self.path / template.name)

    def written_batch(self) -> tuple[int, int] | None:
        """(micro-batch, accumulation) of config.yaml; None without one. ConfigError where it was altered."""
        path = self.path / "config.yaml"
        if not path.is_file():
            return None
        train = read_yaml(path).get("train")
        batch = []
        for name in ("micro_batch_size", "gradient_accumulation_steps"):
            value = train.get(name) if isinstance(train, dict) else None
            if type(value) is not int or value < 1:
                raise ConfigError(f"{path}: train.{name} is {value!r}, which no run wrote; put its number there again")
            batch.append(value)
        return batch[0], batch[1]


def effective_config(
    config: RunConfig, rows: PackedRows | MixedRows, eval_sets: Sequence[EvaluationSet]
) -> dict[str, Any]:
    """The configuration with the data as it really is; sources and named evaluation sets are shard folders by now."""
    values = config.model_dump()
    folders = rows.folders
    data = values["data"] | {"train_data": [], "eval_data": [], "eval_fraction": 0.0}
    data["shards"] = None if config.data.sources else str(rows.folder.path)
    named = {entry.name for entry in config.data.eval_sets}
    for plain in (each for each in eval_sets if each.name not in named):
        data["eval_shards"] = str(plain.rows.folder.path)
    # Every setting that shards are held to (preprocess/prepare.py), or this file would be refused with its own shards.
    for name in ("packing", "overlong", "train_turns", "train_reasoning"):
        made = {getattr(folder.manifest.settings, name) for folder in folders}
        data[name] = made.pop()
        if made:  # folders that were made differently are held to no setting
            del data[name]
    template = rows.folder.manifest.template
    # A model's own lies beside the shards.
    data["chat_template"] = AUTO_TEMPLATE if template.certificate else template.version
    # A stop is for one start.
    return values | {"data": data, "train": values["train"] | {"stop_at_step": None}}


def write_environment(folder: Path, world: World, num_steps: int) -> None:
    """Write environment.json for the latest life of the run: versions, hosts with their ranks, devices, the command, and the steps of the whole run.

    A collective: every rank says where it is.
    """
    import torch.distributed as dist

    places: list[Any] = [None] * world.size
    dist.all_gather_object(places, (socket.gethostname(), _device(world)))
    if world.rank != 0:
        return
    hosts = [place[0] for place in places]
    environment = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "num_steps": num_steps,
        "ranks": world.size,
        "hosts": {host: hosts.count(host) for host in dict.fromkeys(hosts)},
        "devices": sorted({place[1] for place in places}),
        "platform": platform.platform(),
        "versions": {"lumina-ds": __version__, "python": platform.python_version(), **_versions()},
    }
    write_atomically(folder / "environment.json", json.dumps(environment, indent=2) + "\n")


def _device(world: World) -> str:
    import torch

    if world.device == "cuda":
        return torch.cuda.get_device_name(world.torch_device)
    return f"CPU, {counted(torch.get_num_threads(), 'thread')} a rank"


def _versions() -> dict[str, str]:
    import torch

    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found
