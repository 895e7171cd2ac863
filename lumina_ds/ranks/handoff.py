"""The resolved configuration on its way from `lumina train` to its ranks: a file in the run folder, and its digest.

So options, presets and data are settled once, and every rank, on whatever host, trains what was checked.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from lumina_ds.config.schema import RunConfig
from lumina_ds.errors import ConfigError, MachineError
from lumina_ds.files import write_atomically
from lumina_ds.train.run_folder import RunFolder

OPTION = "--resolved"
# A network file system may show another host's new file late.
_PATIENCE_SECONDS = 10.0


def hand_over(config: RunConfig, command: Sequence[str]) -> list[str]:
    """Write RUN/logs/start-DIGEST.json; the words that make a rank train with it.

    `command` is what the user typed. Raises MachineError where the file cannot be written.
    """
    content = json.dumps({"command": list(command), "config": config.model_dump(mode="json")}, indent=1)
    digest = hashlib.sha256(content.encode()).hexdigest()
    path = RunFolder.of(config).logs / f"start-{digest[:16]}.json"
    try:
        write_atomically(path, content)
    except OSError as error:
        raise MachineError(f"{path} cannot be written: {error.strerror}; free some space, or set --runs-dir") from error
    return [OPTION, str(path), digest]


def take_over(path: Path, digest: str) -> tuple[RunConfig, list[str]]:
    """The configuration and the user's command that `hand_over` wrote.

    Raises MachineError where this host does not have the file, and ConfigError when it has another content.
    """
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not path.is_file() and time.monotonic() < deadline:
        time.sleep(0.1)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise MachineError(
            f"{path.absolute()} cannot be read on this host: {error.strerror}; --runs-dir must be a folder that all "
            "hosts share"
        ) from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise ConfigError(f"{path} has changed since the run was started; start the run again")
    values = json.loads(content)
    try:
        return RunConfig.model_validate(values["config"]), values["command"]
    except ValidationError as error:
        raise ConfigError(
            f"{path} is of another version of lumina-ds; install the same version on every host"
        ) from error
