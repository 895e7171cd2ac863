"""A run's own config.yaml starts the same run from any folder, and after the run was moved."""

from __future__ import annotations

import os
import pwd
import shutil

import pytest
import yaml

from lumina_ds.config.load import Override, load_config
from lumina_ds.config.own_file import with_whole_paths
from lumina_ds.errors import ConfigError
from lumina_ds.files import cache_folder

MODEL = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(**sections) makes a run folder a/runs/first, as a run that began in a/ does."""
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")

    def make(**sections):
        folder = tmp_path / "a" / "runs" / "first"
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "ds_config.json").write_text("{}")
        run = {"runs_dir": "runs", "name": "first"} | sections.pop("run", {})
        values = {"model": MODEL, **sections, "run": run}
        (folder / "config.yaml").write_text(yaml.safe_dump(values))
        return folder, values

    return make


def test_paths_are_written_whole_and_words_are_left(write, tmp_path):
    data = {
        "shards": "shards",
        "tokenizer": "auto",
        "chat_template": "chatml",
        "eval_sets": [{"name": "e", "shards": "e"}],
    }
    _, values = write(data=data, deepspeed={"config": "zero2"}, train={"init_from": "../start"})
    whole = with_whole_paths(values)
    here = str(tmp_path / "a")
    assert whole["data"] == data | {"shards": f"{here}/shards", "eval_sets": [{"name": "e", "shards": f"{here}/e"}]}
    assert whole["train"]["init_from"] == str(tmp_path / "start") and whole["run"]["runs_dir"] == f"{here}/runs"
    assert whole["deepspeed"] == {"config": "zero2"} and whole["run"].get("resume") is None
    other = with_whole_paths(
        {"data": {"tokenizer": "t.model", "chat_template": "c.jinja"}, "run": {"resume": "runs/old"}}
    )
    assert other["data"] == {"tokenizer": f"{here}/t.model", "chat_template": f"{here}/c.jinja"}
    assert (
        other["run"]["resume"] == f"{here}/runs/old"
        and with_whole_paths({"run": {"resume": "must"}})["run"]["resume"] == "must"
    )


@pytest.mark.parametrize("is_whole", [False, True])
def test_it_starts_the_run_from_another_folder(write, tmp_path, monkeypatch, is_whole):
    folder, values = write(data={"shards": "shards"})
    if is_whole:
        (folder / "config.yaml").write_text(yaml.safe_dump(with_whole_paths(values)))
    for place, file in ((tmp_path, "a/runs/first/config.yaml"), (folder, "config.yaml")):
        monkeypatch.chdir(place)
        config = load_config(file).config
        assert (config.run.runs_dir, config.run_name) == (str(folder.parent), "first")
        assert config.data.shards == str(tmp_path / "a" / "shards")
    named = load_config("config.yaml", [Override("run.runs_dir", "mine", "--runs-dir")]).config
    assert named.run.runs_dir == "mine"


def test_a_moved_and_renamed_run_is_found_where_it_lies(write, tmp_path, monkeypatch):
    folder, values = write(data={"shards": "runs/.data/x", "eval_shards": "elsewhere"})
    (tmp_path / "a/runs/.data/x").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(with_whole_paths(values)))
    shutil.move(tmp_path / "a" / "runs", tmp_path / "moved")
    (tmp_path / "moved" / "first").rename(tmp_path / "moved" / "second")
    monkeypatch.chdir(tmp_path)
    config = load_config("moved/second/config.yaml").config
    assert (config.run.runs_dir, config.run_name) == (str(tmp_path / "moved"), "second")
    assert config.data.shards == str(tmp_path / "moved/.data/x")
    assert config.data.eval_shards == str(tmp_path / "a" / "elsewhere")


def test_a_relative_path_of_a_moved_run_is_refused(write, tmp_path, monkeypatch):
    write(data={"shards": "shards"})
    shutil.move(tmp_path / "a" / "runs", tmp_path / "moved")
    with pytest.raises(
        ConfigError, match=r"data.shards shards was relative to .* the run was moved; write the whole path"
    ):
        load_config(str(tmp_path / "moved/first/config.yaml"))


def test_a_copy_of_the_file_elsewhere_is_an_ordinary_configuration(write, tmp_path):
    folder, _ = write()
    shutil.copy(folder / "config.yaml", tmp_path / "mine.yaml")
    assert load_config(str(tmp_path / "mine.yaml")).config.run.runs_dir == "runs"


def test_the_last_word_on_the_length_of_a_run(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("preset: debug\ntrain: {max_steps: 9, epochs: 3}\n")
    resolved = load_config(str(path), [Override("train.epochs", "2", "--epochs")])
    assert (resolved.config.train.max_steps, resolved.config.train.epochs) == (None, 2.0)
    assert resolved.origins["train.max_steps"] == "left to --epochs"
    assert load_config(str(path), [Override("train.max_steps", "5", "--max-steps")]).config.train.max_steps == 5
    both = [Override("train.epochs", "2", "--epochs"), Override("train.max_steps", "5", "--max-steps")]
    with pytest.raises(
        ConfigError, match="--max-steps 5 and --epochs 2 both say how long the run is; leave one of them out"
    ):
        load_config(str(path), both)


def test_a_user_without_a_home_has_a_cache_of_the_temporary_folder(monkeypatch):
    """As a container is started with a user of its own number: `docker run --user 12345`."""
    nobody = next(uid for uid in range(12345, 65000) if uid not in {entry.pw_uid for entry in pwd.getpwall()})
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: nobody)
    assert cache_folder().name == f"cache-of-{nobody}"
    assert cache_folder({"HOME": "/home/x"}) == type(cache_folder())("/home/x/.cache")
    assert str(cache_folder({"XDG_CACHE_HOME": "/c", "HOME": "/home/x"})) == "/c"
