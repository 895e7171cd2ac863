"""What `lumina plan --gpu` prints and writes about the cheapest plan that fits."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumina_ds.config.schema import RunConfig
from lumina_ds.config.yaml_file import yaml_text
from lumina_ds.errors import ConfigError
from lumina_ds.plan.explain import Explanation
from lumina_ds.plan.search import Choice, SearchResult
from lumina_ds.text import counted, format_bytes

if TYPE_CHECKING:
    from rich.console import Console


def render_explanations(explanations: list[Explanation], console: Console) -> None:
    """Print every component of the peak phase with its formula, the numbers and the bytes."""
    for line in explanations:
        console.print(f"{line.component}: {line.formula}", highlight=False, markup=False, soft_wrap=True)
        console.print(f"    {line.filled} = {format_bytes(line.num_bytes)}", highlight=False, soft_wrap=True)


def render_search(result: SearchResult, card: str, gpus_per_node: int, console: Console) -> None:
    """Print the choice, its batch and communication, what binds it, and what to change next."""
    choice = result.choice
    if choice is None:
        lines = [f"[bold]Nothing fits {card}[/bold]; {counted(result.num_tried, 'layout')} tried."]
    else:
        lines = [
            f"[bold]Cheapest plan that fits {card}[/bold]: {choice.layout.label}",
            *_choice_lines(choice, gpus_per_node),
        ]
    lines.append(f"  limit: {result.binding}")
    lines += [f"  next: {advice}" for advice in result.advice]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def _choice_lines(choice: Choice, gpus_per_node: int) -> list[str]:
    plan = choice.plan
    sent = {name.replace("_", "-"): size for name, size in vars(choice.communication).items() if size}
    shown = ", ".join(f"{name} {format_bytes(size)}" for name, size in sent.items()) or "nothing"
    host = f", {format_bytes(gpus_per_node * plan.host_bytes)} of host memory per node" if plan.host_bytes else ""
    return [
        f"  micro-batch {plan.micro_batch_size} x accumulation {plan.gradient_accumulation_steps} x "
        f"{counted(plan.world_size, 'GPU')} x {plan.seq_length} tokens = {choice.tokens_per_step:,} tokens a step",
        f"  peak {format_bytes(plan.peak_bytes)} in {plan.peak_phase}{host}",
        f"  each GPU moves in a step: {shown}",
    ]


def search_record(result: SearchResult) -> dict[str, Any]:
    """The search as one JSON-ready mapping; `fits` is false where `layout` is only the smallest one."""
    shown = result.choice or result.smallest
    return {
        "fits": result.choice is not None,
        "layout": shown.layout.as_dict(),
        "micro_batch_size": shown.plan.micro_batch_size,
        "gradient_accumulation_steps": shown.plan.gradient_accumulation_steps,
        "tokens_per_step": shown.tokens_per_step,
        "peak_phase": shown.plan.peak_phase,
        "peak_bytes": shown.plan.peak_bytes,
        "breakdown": dict(shown.plan.breakdown),
        "host_bytes": shown.plan.host_bytes,
        "communication": vars(shown.communication),
        "binding": result.binding,
        "advice": result.advice,
        "num_tried": result.num_tried,
    }


def write_choice(result: SearchResult | None, precision: str, gpus: int, folder: Path) -> str:
    """Write run.yaml and ds.json of the choice; the command that trains with them on machines of `gpus`.

    Raises ConfigError when nothing fits.
    """
    if result is None or result.choice is None:
        raise ConfigError(f"nothing fits, so nothing was written; {result.binding if result else ''}")
    choice = result.choice
    run, ds = folder / "run.yaml", folder / "ds.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        run.write_text(yaml_text(_run_values(choice.config, precision)), encoding="utf-8")
        ds.write_text(json.dumps(_own_json(choice), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {folder}: {error.strerror}; choose another --write") from error
    ranks = ["--num_gpus", str(gpus)] if choice.plan.world_size == gpus else ["--hostfile", "hostfile"]
    files = ["--config", str(run), "--deepspeed_config", str(ds)]
    return shlex.join(["lumina", "train", *files, "--data", "SHARDS", "--", *ranks])


def _run_values(config: RunConfig, precision: str) -> dict[str, Any]:
    """Every value that differs from its default, so that the file stands without the preset."""
    values = config.model_dump(exclude_defaults=True, exclude={"preset": True, "deepspeed": {"config"}})
    values.setdefault("train", {})["precision"] = precision
    values.setdefault("run", {}).setdefault("name", config.run_name)
    return values


def _own_json(choice: Choice) -> dict[str, Any]:
    """The sections that a file of one's own decides; batch, optimizer, precision and experts stay with the run."""
    of_the_run = {
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "optimizer",
        "bf16",
        "fp16",
        "torch_autocast",
        "expert_parallel",
    }
    return {key: value for key, value in choice.deepspeed_json.items() if key not in of_the_run}
