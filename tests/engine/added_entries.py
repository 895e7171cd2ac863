"""Toys that somebody might add from outside the package: an entry each, and nothing else."""

from lumina_ds.config.attention import ATTENTION_BACKENDS, AttentionBackend
from lumina_ds.config.optimizers import OPTIMIZERS, Optimizer
from lumina_ds.config.router_scores import ROUTER_SCORES, RouterScore
from lumina_ds.config.schedules import SCHEDULES, Schedule
from lumina_ds.model.attention_backends import attend_reference

CALLS = []


def attend(q_THC, k_TKC, v_TKC, documents):
    CALLS.append(documents.lengths)
    return 0.5 * attend_reference(q_THC, k_TKC, v_TKC, documents)


def only_on_a_cpu(place):
    return None if place.device == "cpu" else "it is a toy"


def square(step, span):
    return (1 - span.progress(step)) ** 2


def softplus(logits_TE):
    return logits_TE.exp().log1p()


ENTRIES = (
    # RMSprop has one fp32 average of squares, and DeepSpeed does not take it with ZeRO unasked.
    (
        OPTIMIZERS,
        "rmsprop",
        Optimizer(
            "RMSprop",
            {"lr": ("learning_rate",), "alpha": ("adam_beta2",), "weight_decay": ("weight_decay",)},
            is_tested=False,
            moment_bytes=4,
            step_bytes=4,
        ),
    ),
    (ATTENTION_BACKENDS, "halved", AttentionBackend("added_entries:attend", only_on_a_cpu)),
    (ROUTER_SCORES, "softplus", RouterScore(softplus, sums_to_one=False)),
    (SCHEDULES, "square", Schedule(square)),
)
NAMES = {
    "train.optimizer": "rmsprop",
    "train.attention_backend": "halved",
    "model.scoring_func": "softplus",
    "train.lr_scheduler_type": "square",
}


def add():
    for table, name, entry in ENTRIES:
        table[name] = entry
