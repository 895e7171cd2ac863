"""`pip install .` into an environment of its own, then every verb from a foreign folder without the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from lumina_ds import __version__
from lumina_ds.cli.main import VERBS

CHECKOUT = Path(__file__).parent.parent.parent
DEEPSPEED_CONFIGS = sorted(path.stem for path in (CHECKOUT / "ds_configs").glob("*.json"))
PRESETS = sorted(path.stem for path in (CHECKOUT / "lumina_ds" / "config" / "presets").glob("*.yaml"))


class Installation:
    """A virtual environment with lumina-ds, above the libraries of the one that runs the tests."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "environment" / "bin"
        self.elsewhere = folder / "elsewhere"

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        program, *arguments = command
        done = subprocess.run(
            [str(self.bin / program), *arguments], cwd=self.elsewhere, env=environment, capture_output=True, text=True
        )
        assert not check or done.returncode == 0, f"{' '.join(command)} gave {done.returncode}:\n{done.stderr}"
        return done


@pytest.fixture(scope="session")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    folder = tmp_path_factory.mktemp("installation")
    source = folder / "source"
    _copy_checkout(source)
    made = Installation(folder)
    made.elsewhere.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "environment")], check=True)
    # A path line in a .pth lends the libraries; the .pth of an editable lumina-ds beside them is not followed.
    [packages] = (folder / "environment" / "lib").glob("python3*/site-packages")
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(made.bin / "python")]
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--ignore-installed", "--quiet"]
    done = subprocess.run([*pip, "install", *options, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(source)
    return made


def _copy_checkout(target: Path) -> None:
    """What a clone would hold, with the changes not committed yet; without build leftovers of this checkout."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(listed, cwd=CHECKOUT, capture_output=True)
    if done.returncode == 0:
        names = [name for name in done.stdout.decode().split("\0") if name and (CHECKOUT / name).is_file()]
        for name in names:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(CHECKOUT / name, target / name)
    else:
        ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "runs", "quickstart", "__pycache__")
        shutil.copytree(CHECKOUT, target, ignore=ignored)


def test_the_checkout_is_not_what_runs(installation: Installation) -> None:
    program = "import lumina_ds, preprocess; print(lumina_ds.__file__); print(preprocess.__file__)"
    for path in installation.run("python", "-c", program).stdout.split():
        assert path.startswith(str(installation.bin.parent)), path


def test_version_and_metadata(installation: Installation) -> None:
    assert installation.run("lumina", "--version").stdout.split()[-1] == __version__
    program = "from importlib.metadata import version; print(version('lumina-ds'))"
    assert installation.run("python", "-c", program).stdout.strip() == __version__


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb(installation: Installation, verb: str) -> None:
    assert f"lumina {verb}" in installation.run("lumina", verb, "--help").stdout


def test_presets_are_installed(installation: Installation) -> None:
    listed = json.loads(installation.run("lumina", "presets", "list", "--json").stdout)
    for name in PRESETS:
        assert name in json.dumps(listed)
    assert json.loads(installation.run("lumina", "presets", "show", "b7", "--json").stdout)


def test_deepspeed_configurations_are_found_by_name(installation: Installation) -> None:
    program = (
        "from lumina_ds.config.deepspeed.tree import deepspeed_config_names; print(' '.join(deepspeed_config_names()))"
    )
    assert installation.run("python", "-c", program).stdout.split() == DEEPSPEED_CONFIGS
    plan = ["lumina", "plan", "--config", "debug", "--gpus", "2", "--expert-parallel", "2", "--json"]
    assert json.loads(installation.run(*plan, "--deepspeed_config", "moe_zero2").stdout)
    unknown = installation.run(*plan, "--deepspeed_config", "moe_zero_2", check=False)
    assert unknown.returncode == 2
    assert "did you mean moe_zero2?" in unknown.stderr


@pytest.mark.slow
def test_the_offline_stage_runs_as_a_module(installation: Installation) -> None:
    assert "Usage" in installation.run("python", "-m", "preprocess", "--help").stdout
