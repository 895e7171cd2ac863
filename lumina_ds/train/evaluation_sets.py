"""The evaluation sets of a run, and which loss chooses the checkpoint `best`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lumina_ds.config.mixtures import MEAN_OF_SETS, PLAIN_EVAL_SET
from lumina_ds.config.schema import RunConfig
from lumina_ds.data.loader import PackedRows
from lumina_ds.monitor.metrics import perplexity

Result = dict[str, float]
Results = dict[str | None, Result]


@dataclass(frozen=True)
class EvaluationSet:
    """Rows to evaluate on. `name` is None for a set without one, which is then the only one."""

    name: str | None
    rows: PackedRows
    weight: float = 1.0


def set_names(config: RunConfig, has_plain_set: bool) -> list[str]:
    """Names of the evaluation sets; `has_plain_set`: whether there is the one of data.eval_data or data.eval_shards."""
    return [PLAIN_EVAL_SET] * has_plain_set + [entry.name for entry in config.data.eval_sets]


def evaluate_sets(sets: Sequence[EvaluationSet], evaluate: Callable[[PackedRows], Result]) -> Results:
    """What `evaluate` finds on each set, by name; of several, their mean under its own name too."""
    results = {each.name: evaluate(each.rows) for each in sets}
    return results | {MEAN_OF_SETS: _mean(results, sets)} if len(sets) > 1 else results


def judged_loss(results: Results, best_by: str | None) -> float:
    """The loss by which checkpoints are compared."""
    if len(results) == 1:
        [only] = results.values()
        return only["loss"]
    return results[best_by or MEAN_OF_SETS]["loss"]


def judged_by(best_by: str | None, sets: Sequence[EvaluationSet]) -> str | None:
    """What a checkpoint's evaluation loss is one of, for its manifest: only losses of the same are compared."""
    if len(sets) < 2:
        return sets[0].name if sets else None
    if best_by not in (None, MEAN_OF_SETS):
        return best_by
    return f"{MEAN_OF_SETS} of {', '.join(f'{each.weight:g} {each.name}' for each in sets)}"


def _mean(results: Results, sets: Sequence[EvaluationSet]) -> Result:
    """Mean of the sets' losses by their weights, its perplexity, and the label tokens of all together."""
    weights = {each.name: each.weight for each in sets}
    loss = sum(weights[name] * result["loss"] for name, result in results.items()) / sum(weights.values())
    trained = sum(int(result["trained_tokens"]) for result in results.values())
    return {"loss": loss, "perplexity": perplexity(loss), "trained_tokens": trained}
