"""A run file of another trainer as ours: what maps is mapped, everything else is listed by name with the reason.

Keys and meanings follow the documentation of axolotl, LLaMA-Factory, TRL (transformers' Trainer) and torchtune. Nothing is
guessed: a value that has no counterpart is left out and said, one that says nothing (null, false, an empty list) too much
to list.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from pydantic import ValidationError

from lumina_ds.config.fields import all_fields
from lumina_ds.config.schema import RunConfig
from lumina_ds.config.yaml_file import yaml_text
from lumina_ds.text import shortened

Values = dict[str, Any]  # of ours, by dotted name


class NotTaken(ValueError):
    """Why a key or its value has no counterpart."""


@dataclass(frozen=True)
class ForeignRun:
    """`values` of ours by dotted name; `left_out` are (key, value, reason) of theirs."""

    values: Values
    left_out: tuple[tuple[str, Any, str], ...]

    def text(self, preset: str | None = None) -> str:
        """Our YAML file on a preset, with what was left out as comments at its end. Their files say nothing of a model's
        shape, so without a preset it is to be completed."""
        sections: dict[str, dict[str, Any]] = {}
        for name, value in self.values.items():
            section, _, key = name.partition(".")
            sections.setdefault(section, {})[key] = value
        lines = [f"preset: {preset}" if preset else _NO_MODEL, yaml_text(sections).rstrip("\n")]
        if self.left_out:
            lines += ["", "# Left out:"]
        lines += [f"# {key}: {reason} (was {shown(value)})" for key, value, reason in self.left_out]
        return "\n".join(lines) + "\n"


_NO_MODEL = "# Write `preset: NAME` here, or the section `model` of the config.yaml that lumina import writes."


def shown(value: Any) -> str:
    return shortened(str(value), 60)


Mapped = Callable[[Any], Values]


def _to(field: str) -> Mapped:
    return lambda value: {field: value}


def _switch(field: str, on: Any) -> Mapped:
    """True gives `on`; false says nothing."""

    def mapped(value: Any) -> Values:
        if value is not True and value not in ("auto", "true", "full"):
            raise NotTaken("this value has no counterpart here")
        return {field: on}

    return mapped


def _choice(field: str, names: Mapping[str, Any]) -> Mapped:
    def mapped(value: Any) -> Values:
        if str(value).lower() not in names:
            raise NotTaken(f"{field} takes {', '.join(all_fields()[field].values)}")
        return {field: names[str(value).lower()]}

    return mapped


def _always(*values: Any) -> Mapped:
    """What these values say is always so here."""

    def mapped(value: Any) -> Values:
        if value not in values:
            raise NotTaken("this way of training is not there")
        return {}

    return mapped


def _steps(field: str) -> Mapped:
    def mapped(value: Any) -> Values:
        if not isinstance(value, int) or value < 1:
            raise NotTaken(f"a share of the run; {field} takes a number of steps")
        return {field: value}

    return mapped


def _folder(value: Any) -> Values:
    path = PurePath(str(value))
    parent = str(path.parent)
    return {"run.name": path.name} | ({} if parent == "." else {"run.runs_dir": parent})


def _share(value: Any) -> Values:
    if isinstance(value, (int, float)) and 0 < value < 1:
        return {"data.eval_fraction": value}
    raise NotTaken("a number of lines; data.eval_fraction takes a share between 0 and 1")


def _files(field: str) -> Mapped:
    """Entries that name local files of conversations."""

    def mapped(value: Any) -> Values:
        entries = value if isinstance(value, list) else [value]
        paths = []
        for entry in entries:
            path = entry.get("data_files", entry.get("path")) if isinstance(entry, Mapping) else entry
            for each in path if isinstance(path, list) else [path]:
                if not str(each).endswith((".jsonl", ".json", ".parquet", ".arrow", ".csv", ".jsonl.gz", ".jsonl.zst")):
                    raise NotTaken(
                        f"{shown(each)} is no file of conversations: fetch the dataset, and name its files there"
                    )
                paths.append(str(each))
        return {field: paths}

    return mapped


def _refuse(reason: str) -> Mapped:
    def mapped(value: Any) -> Values:
        raise NotTaken(reason)

    return mapped


def _whole_table(value: Any) -> Values:
    raise NotTaken("give --deepspeed_config FILE; lumina plan check FILE says what of it a run takes")


_LORA = _refuse("there are no adapters here: all parameters are trained")
_IMPORT = _refuse("lumina import FOLDER --out start makes it a start; then --config start/config.yaml")
_ADAMW = dict.fromkeys(("adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused"), "adamw")
_SCHEDULES = {name: name for name in ("cosine", "linear", "constant")}
_ATTENTION = {"fa2": "on", "flash_attention_2": "on", "fa3": "on", "auto": "auto", "sdpa": "off", "eager": "off"} | {
    "disabled": "off"
}  # fmt: skip

# The keys of transformers' TrainingArguments, which all but torchtune share.
_TRAINER: dict[str, Mapped] = {
    "model_name_or_path": _IMPORT,
    "per_device_train_batch_size": _to("train.micro_batch_size"),
    "gradient_accumulation_steps": _to("train.gradient_accumulation_steps"),
    "num_train_epochs": _to("train.epochs"),
    "max_steps": _steps("train.max_steps"),
    "learning_rate": _to("train.learning_rate"),
    "lr_scheduler_type": _choice("train.lr_scheduler_type", _SCHEDULES),
    "warmup_ratio": _to("train.warmup_ratio"),
    "warmup_steps": _refuse("train.warmup_ratio takes a share of the steps"),
    "weight_decay": _to("train.weight_decay"),
    "adam_beta1": _to("train.adam_beta1"),
    "adam_beta2": _to("train.adam_beta2"),
    "adam_epsilon": _to("train.adam_epsilon"),
    "max_grad_norm": _to("train.max_grad_norm"),
    "optim": _choice("train.optimizer", _ADAMW),
    "bf16": _switch("train.precision", "bf16"),
    "fp16": _switch("train.precision", "fp16"),
    "gradient_checkpointing": _switch("train.activation_checkpointing", "full"),
    "attn_implementation": _choice("train.flash_attention", _ATTENTION),
    "torch_compile": _switch("train.compile", "on"),
    "use_liger_kernel": _switch("train.fused_kernels", "on"),
    "deepspeed": _whole_table,
    "save_steps": _steps("train.save_every_n_batches"),
    "eval_steps": _steps("train.eval_every_n_batches"),
    "save_total_limit": _to("train.keep_checkpoints"),
    "logging_steps": _steps("train.log_every_n_batches"),
    "output_dir": _folder,
    "run_name": _refuse("the run's name is that of its folder, run.name"),
    "seed": _to("train.seed"),
    "packing": _switch("data.packing", "best_fit"),
    "use_peft": _LORA,
    "lora_r": _LORA,
    "fsdp": _refuse("--zero 3 does the same"),
    "report_to": _refuse("--tensorboard, or --wandb online"),
}
_TRL = _TRAINER | {
    "max_length": _to("data.seq_length"),
    "max_seq_length": _to("data.seq_length"),
    "dataset_name": _files("data.train_data"),
    "dataset_num_proc": _to("data.num_workers"),
    "assistant_only_loss": _always(True),
}
_LLAMA_FACTORY = _TRAINER | {
    "stage": _always("sft"),
    "do_train": _always(True),
    "finetuning_type": _always("full"),
    "dataset": _refuse("a name in dataset_info.json; give its files as --train-data"),
    "template": _choice(
        "data.chat_template", {"chatml": "chatml", "llama3": "llama3", "qwen3": "qwen3", "gemma": "gemma"}
    ),
    "cutoff_len": _to("data.seq_length"),
    "max_samples": _to("data.max_conversations"),
    "preprocessing_num_workers": _to("data.num_workers"),
    "val_size": _share,
    "flash_attn": _choice("train.flash_attention", _ATTENTION),
    "enable_liger_kernel": _switch("train.fused_kernels", "on"),
    "neat_packing": _switch("data.packing", "best_fit"),
    "pure_bf16": _switch("train.precision", "bf16"),
    "lora_rank": _LORA,
    "lora_target": _LORA,
    "quantization_bit": _LORA,
}
_AXOLOTL = _TRAINER | {
    "base_model": _IMPORT,
    "datasets": _files("data.train_data"),
    "test_datasets": _files("data.eval_data"),
    "val_set_size": _share,
    "dataset_prepared_path": _refuse("lumina preprocess makes shards; give their folder as --data"),
    "sequence_len": _to("data.seq_length"),
    "sample_packing": _switch("data.packing", "best_fit"),
    "chat_template": _choice("data.chat_template", {"chatml": "chatml", "llama3": "llama3", "gemma": "gemma", "qwen3": "qwen3"} | {"tokenizer_default": "auto"}),
    "micro_batch_size": _to("train.micro_batch_size"),
    "num_epochs": _to("train.epochs"),
    "optimizer": _choice("train.optimizer", {**_ADAMW, "muon": "muon"}),
    "lr_scheduler": _choice("train.lr_scheduler_type", _SCHEDULES),
    "cosine_min_lr_ratio": _to("train.min_lr_ratio"),
    "flash_attention": _switch("train.flash_attention", "on"),
    "sequence_parallel_degree": _to("deepspeed.sequence_parallel_size"),
    "context_parallel_size": _to("deepspeed.sequence_parallel_size"),
    "expert_parallel_size": _to("deepspeed.expert_parallel_size"),
    "dataset_processes": _to("data.num_workers"),
    "wandb_project": _to("run.wandb_project"),
    "adapter": _LORA,
    "load_in_8bit": _LORA,
    "load_in_4bit": _LORA,
    "rl": _refuse("preference training is not there"),
}  # fmt: skip
_TORCHTUNE: dict[str, Mapped] = {
    "batch_size": _to("train.micro_batch_size"),
    "gradient_accumulation_steps": _to("train.gradient_accumulation_steps"),
    "epochs": _to("train.epochs"),
    "optimizer._component_": _choice("train.optimizer", {"torch.optim.adamw": "adamw"}),
    "optimizer.lr": _to("train.learning_rate"),
    "optimizer.weight_decay": _to("train.weight_decay"),
    "optimizer.fused": _always(True),
    "clip_grad_norm": _to("train.max_grad_norm"),
    "dtype": _choice("train.precision", {"bf16": "bf16", "fp32": "fp32", "fp16": "fp16"}),
    "tokenizer.max_seq_len": _to("data.seq_length"),
    "dataset.packed": _switch("data.packing", "best_fit"),
    "dataset.data_files": _files("data.train_data"),
    "enable_activation_checkpointing": _switch("train.activation_checkpointing", "full"),
    "compile": _switch("train.compile", "on"),
    "log_every_n_steps": _steps("train.log_every_n_batches"),
    "output_dir": _folder,
    "seed": _to("train.seed"),
    "model._component_": _IMPORT,
}
TRAINERS: dict[str, dict[str, Mapped]] = {
    "axolotl": _AXOLOTL,
    "llamafactory": _LLAMA_FACTORY,
    "trl": _TRL,
    "torchtune": _TORCHTUNE,
}
_NOTHING: tuple[Any, ...] = (None, False, "", [], {}, "none", "null")


def run_from(trainer: str, theirs: Mapping[str, Any]) -> ForeignRun:
    """Our values for the content of a run file of one of TRAINERS."""
    table = TRAINERS[trainer]
    values: Values = {}
    left_out: list[tuple[str, Any, str]] = []
    for key, value in _flat(theirs, table):
        if any(value is each or (value == each and not isinstance(value, (int, float))) for each in _NOTHING):
            continue
        try:
            if key not in table:
                raise NotTaken("no counterpart here")
            found = table[key](value)
            _check(found, values)
            values |= found
        except NotTaken as reason:
            left_out.append((key, value, str(reason)))
    return ForeignRun(values, (*left_out,))


def _check(found: Values, before: Values) -> None:
    """NotTaken for a value out of our bounds, or another one than an earlier key gave."""
    for name, value in found.items():
        if name in before and before[name] != value:
            raise NotTaken(f"{name} is {shown(before[name])} by another key")
        section, _, key = name.partition(".")
        try:
            RunConfig.model_validate({section: {key: value}})
        except ValidationError as error:
            reason = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
            raise NotTaken(f"{name}: {reason[0].lower()}{reason[1:]}") from error


def _flat(theirs: Mapping[str, Any], table: Mapping[str, Mapped]) -> list[tuple[str, Any]]:
    """Keys in order; those of nested objects are dotted, where the table has no entry for the whole."""
    found: list[tuple[str, Any]] = []
    for key, value in theirs.items():
        if isinstance(value, Mapping) and key not in table:
            found += [(f"{key}.{inner}", each) for inner, each in value.items()]
        else:
            found.append((str(key), value))
    return found
