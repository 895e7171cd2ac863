"""Every key and value of the shipped JSON files and of documented examples, mutated: found; the originals: silent."""

from __future__ import annotations

import copy
import importlib
import inspect
import json
from pathlib import Path

import pytest

from lumina_ds.config.deepspeed.check import deepspeed_faults, range_faults
from lumina_ds.config.deepspeed.keys import OPTIMIZER_TYPES, table
from lumina_ds.config.deepspeed.tree import deepspeed_config_names, load_deepspeed_json

# Settings that DeepSpeed's configuration page and its tutorials show together, by their facts, with their sources.
_FILE = Path(__file__).with_name("documented_deepspeed.json")
DOCUMENTED = {name: entry["json"] for name, entry in json.loads(_FILE.read_text()).items()}
ORIGINALS = DOCUMENTED | {name: load_deepspeed_json(name) for name in deepspeed_config_names()}
SECTIONS = {
    path: {name for name, key in section.items() if not key.removed} for path, section in table().sections.items()
}


@pytest.mark.parametrize("name", ORIGINALS)
def test_originals_raise_no_alarm(name):
    assert deepspeed_faults(ORIGINALS[name]) == []


def test_mutated_keys_are_found():
    tried, missed = 0, []
    for name, original in ORIGINALS.items():
        for path in paths(original):
            for typo in typos(path[-1]):
                mutated = copy.deepcopy(original)
                section = at(mutated, path[:-1])
                section[typo] = section.pop(path[-1])
                tried += 1
                if not any(typo in fault for fault in deepspeed_faults(mutated)):
                    missed.append((name, *path, typo))
    assert tried > 1000
    assert len(missed) <= tried // 100, missed


def test_mutated_keys_name_the_original():
    hinted, tried = 0, 0
    for original in ORIGINALS.values():
        for path in paths(original):
            mutated = copy.deepcopy(original)
            section = at(mutated, path[:-1])
            typo = path[-1][:-1] + "q"
            section[typo] = section.pop(path[-1])
            tried += 1
            hinted += any(f"{typo}; did you mean {path[-1]}?" in fault for fault in deepspeed_faults(mutated))
    assert hinted >= 0.95 * tried


def test_values_of_the_wrong_kind_are_found():
    tried, missed = 0, []
    for name, original in ORIGINALS.items():
        for path in paths(original):
            value = at(original, path)
            wrong = {"not": "this"} if not isinstance(value, dict) else [1]
            # These two take numbers or lists, and are any text's business.
            if value == "auto" or path == ("zero_optimization",) or path[-1].endswith(("_min_lr", "_max_lr")):
                continue
            mutated = copy.deepcopy(original)
            at(mutated, path[:-1])[path[-1]] = wrong
            tried += 1
            if not deepspeed_faults(mutated):
                missed.append((name, *path))
    assert tried > 150
    assert len(missed) <= tried // 100, missed


def test_numbers_out_of_range_are_found():
    tried, missed = 0, []
    for name, original in ORIGINALS.items():
        for path in paths(original):
            value = at(original, path)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            low, high = table().ranges.get(path[-1], (0, None))
            for wrong in [-3] * (low is not None) + [1.5] * (high is not None):
                mutated = copy.deepcopy(original)
                at(mutated, path[:-1])[path[-1]] = wrong
                tried += 1
                if not any(path[-1] in fault for fault in deepspeed_faults(mutated)):
                    missed.append((name, *path, wrong))
    assert tried > 100
    assert len(missed) <= tried // 100, missed


def test_words_that_are_no_choice_are_found():
    for path in table().choices:
        mutated: dict = {}
        *parents, key = path.split(".")
        section = mutated
        for parent in parents:
            section = section.setdefault(parent, {})
        section[key] = "nonsense"
        assert any(path in fault for fault in deepspeed_faults(mutated)), path


def test_keys_at_another_level_are_found():
    tried, missed = 0, []
    for name, original in ORIGINALS.items():
        for path in paths(original):
            for level in levels(original, path):
                mutated = copy.deepcopy(original)
                at(mutated, level)[path[-1]] = at(mutated, path[:-1]).pop(path[-1])
                tried += 1
                if not deepspeed_faults(mutated):
                    missed.append((name, *path, "at", level))
    assert tried > 200
    assert len(missed) <= tried // 100, missed


def levels(original, path):
    """The level above, unless the same key stands there; for a key of the top every section."""
    if len(path) > 1:
        taken = path[-1] in at(original, path[:-2])
        return [] if path[-2] == "arg_mappings" or taken else [path[:-2]]
    sections_of_top = [(key,) for key, value in original.items() if isinstance(value, dict)]
    return [level for level in sections_of_top if level != path]


def typos(key: str) -> set[str]:
    """What slips of the finger make of a key: one letter lost, doubled, swapped or in capitals, a dash."""
    middle = len(key) // 2
    return {
        key[1:],
        key[:-1],
        key[:middle] + key[middle + 1 :],
        key + key[-1],
        key[:middle] + key[middle] * 2 + key[middle + 1 :],
        key[:middle] + key[middle : middle + 2][::-1] + key[middle + 2 :],
        key.upper(),
        key.replace("_", "-"),
    } - {key}


def paths(section, prefix=()):
    for key, value in section.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from paths(value, (*prefix, key))


def at(section, path):
    for part in path:
        section = section[part]
    return section


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("comms_logger", "comm.config.CommsLoggerConfig"),
        ("compile", "compile.config.CompileConfig"),
        ("hybrid_engine", "runtime.config.HybridEngineConfig"),
        ("tensorboard", "monitor.config.TensorBoardConfig"),
        ("csv_monitor", "monitor.config.CSVConfig"),
        ("wandb", "monitor.config.WandbConfig"),
        ("comet", "monitor.config.CometConfig"),
        ("timers.throughput", "utils.config.DeepSpeedThroughputTimerConfig"),
        ("zero_optimization.leaf_module", "runtime.zero.leaf_module_config.DeepSpeedZeroLeafModuleConfig"),
        ("zero_optimization.zenflow", "runtime.zenflow.zenflow_config.ZenFlowConfig"),
    ],
)
def test_side_sections_equal_the_installed_models(path, place):
    module, _, name = place.rpartition(".")
    model = getattr(importlib.import_module(f"deepspeed.{module}"), name)
    assert set(SECTIONS[path]) == set(model.model_fields)


def test_side_sections_equal_the_installed_constants():
    activations = importlib.import_module("deepspeed.runtime.activation_checkpointing.config")
    assert set(SECTIONS["activation_checkpointing"]) == set(activations.ACT_CHKPT_DEFAULT)
    aio = importlib.import_module("deepspeed.runtime.swap_tensor.aio_config")
    assert set(SECTIONS["aio"]) == set(aio.AIO_DEFAULT_DICT)
    profiler = importlib.import_module("deepspeed.profiling.config").DeepSpeedFlopsProfilerConfig({})
    assert set(SECTIONS["flops_profiler"]) == set(vars(profiler))


def test_schedulers_equal_the_installed_ones():
    schedules = importlib.import_module("deepspeed.runtime.lr_schedules")
    assert set(table().schedulers) == set(schedules.VALID_LR_SCHEDULES)
    for name, known in table().schedulers.items():
        assert set(known) == set(inspect.signature(getattr(schedules, name)).parameters) - {"optimizer"}, name


def test_optimizers_equal_the_installed_ones():
    import torch

    known = {name.lower() for name in OPTIMIZER_TYPES}
    assert {name.lower() for name in importlib.import_module("deepspeed.runtime.config").DEEPSPEED_OPTIMIZERS} <= known
    of_torch = {name.lower() for name, value in vars(torch.optim).items() if inspect.isclass(value)}
    assert of_torch - {"optimizer"} <= known


def test_removed_keys_equal_the_installed_ones():
    assert {name for name, key in table().sections["zero_optimization"].items() if key.removed} == set(
        importlib.import_module("deepspeed.runtime.config")._REMOVED_ZERO_CONFIG_KEYS
    )


def test_every_side_section_stands_below_a_known_key():
    assert {path.partition(".")[0] for path in SECTIONS if path} <= set(SECTIONS[""])


def test_other_sections_equal_the_installed_models():
    def keys(place):
        module, _, name = place.rpartition(".")
        fields = getattr(importlib.import_module(f"deepspeed.{module}"), name).model_fields
        return set(fields) | {field.alias for field in fields.values() if field.alias}

    assert set(SECTIONS["tensor_parallel"]) == keys("runtime.tensor_parallel.config.TPTrainingConfig")
    assert set(SECTIONS["tensor_parallel.tp"]) == keys("runtime.tensor_parallel.config.TPConfig")
    assert set(SECTIONS["weight_quantization"]) == keys("inference.config.WeightQuantConfig")
    partition = importlib.import_module("deepspeed.module_inject.autotp_config").AutoTPConfig
    assert set(SECTIONS["tensor_parallel.partition_config"]) == set(inspect.signature(partition).parameters)


def test_autotuning_equals_the_installed_one():
    constants = importlib.import_module("deepspeed.autotuning.constants")
    assert set(SECTIONS["autotuning.model_info"]) == set(constants.MODEL_INFO_KEY_DEFAULT_DICT)
    installed = importlib.import_module("deepspeed.autotuning.config").DeepSpeedAutotuningConfig({})
    # Read elsewhere: nothing; the class keeps two names of old that no JSON sets.
    assert set(SECTIONS["autotuning"]) == set(vars(installed)) - {"start_step", "end_step"}


def test_data_sections_are_the_installed_words():
    constants = importlib.import_module("deepspeed.runtime.data_pipeline.constants")
    words = {value for value in vars(constants).values() if isinstance(value, str)}
    for path, known in SECTIONS.items():
        if path.startswith("data_efficiency"):
            assert set(known) <= words, path
    defaults = importlib.import_module("deepspeed.runtime.data_pipeline.config")
    batching = set(defaults.get_dynamic_batching({})) | {"metrics_path", "max_tokens"}
    assert set(SECTIONS["data_efficiency.data_sampling.dynamic_batching"]) == batching
    sampling = set(defaults.get_data_sampling({}))
    assert set(SECTIONS["data_efficiency.data_sampling"]) == sampling


def test_bounds_of_the_installed_models_are_ours():
    """Every number that DeepSpeed's models bound is refused on the other side of the bound."""
    places = {
        "zero_optimization": "runtime.zero.config.DeepSpeedZeroConfig",
        "zero_optimization.offload_param": "runtime.zero.offload_config.DeepSpeedZeroOffloadParamConfig",
        "zero_optimization.offload_optimizer": "runtime.zero.offload_config.DeepSpeedZeroOffloadOptimizerConfig",
        "zero_optimization.zenflow": "runtime.zenflow.zenflow_config.ZenFlowConfig",
        "hybrid_engine": "runtime.config.HybridEngineConfig",
    }
    bounded = 0
    for path, place in places.items():
        module, _, name = place.rpartition(".")
        for field, info in getattr(importlib.import_module(f"deepspeed.{module}"), name).model_fields.items():
            for bound in info.metadata:
                low = getattr(bound, "ge", getattr(bound, "gt", None))
                high = getattr(bound, "le", getattr(bound, "lt", None))
                wrong = low - 1 if low is not None else high + 1
                key = info.alias or field
                assert key in SECTIONS[path], key
                assert range_faults({key: wrong}), (key, wrong)
                bounded += 1
    assert bounded >= 15


def test_counts_of_what_was_mutated(capsys):
    """The numbers that the other tests hold, in one line: pytest -s shows it."""
    typed = sum(len(typos(path[-1])) for original in ORIGINALS.values() for path in paths(original))
    moved = sum(len(levels(original, path)) for original in ORIGINALS.values() for path in paths(original))
    with capsys.disabled():
        print(f"\n{len(ORIGINALS)} originals, {typed} typos, {moved} moved keys", end=" ")
    assert len(DOCUMENTED) >= 10 and typed > 2000 and moved > 200
