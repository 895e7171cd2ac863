"""The run's configuration: every field, its type, bounds and meaning.

Names follow Hugging Face for the model and the training, DeepSpeed for its own section. Unknown
keys are refused. Checks across fields live in `checks.py`, so that all faults are reported at once.
No file, network or GPU is touched here.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from lumina_ds.config.attention import ATTENTION_BACKENDS
from lumina_ds.config.chat_templates import DEFAULT_TEMPLATE, OTHER_TEMPLATES, TEMPLATE_SUFFIX, TEMPLATES
from lumina_ds.config.choices import NameOf
from lumina_ds.config.mixtures import EvalSet, PathList, Source, as_list
from lumina_ds.config.optimizers import OPTIMIZERS
from lumina_ds.config.router_scores import ROUTER_SCORES
from lumina_ds.config.schedules import SCHEDULES
from lumina_ds.text import as_max_rejected

Precision = Literal["auto", "fp32", "bf16", "mixed_bf16", "fp16"]
Checkpointing = Annotated[
    Literal["none", "full", "attention", "experts"],
    BeforeValidator(lambda value: "none" if value == "off" else value),
]
Compile = Annotated[
    Literal["auto", "on", "off"],
    BeforeValidator(lambda value: {True: "on", False: "off"}[value] if isinstance(value, bool) else value),
]
FusedKernel = Literal["rms_norm", "rope", "swiglu", "cross_entropy", "combine"]
InferencePrecision = Literal[Precision, "dynamic"]
AttentionBackendName = Annotated[str, NameOf(ATTENTION_BACKENDS, ("auto",))]
ChatTemplateName = Annotated[str, NameOf(TEMPLATES, OTHER_TEMPLATES, TEMPLATE_SUFFIX)]
OptimizerName = Annotated[str, NameOf(OPTIMIZERS)]
RouterScoreName = Annotated[str, NameOf(ROUTER_SCORES)]
ScheduleName = Annotated[str, NameOf(SCHEDULES)]
ZeroStage = Literal[0, 1, 2, 3]
Offload = Literal["none", "optimizer", "optimizer+params"]


MaxRejected = Annotated[int | float, BeforeValidator(as_max_rejected)]


def _as_kernels(value: Any) -> Any:
    """One of auto, on and off (which YAML reads as booleans), or names as a list or separated by commas."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return value if value in ("auto", "on", "off") else as_list(value)


FusedKernels = Annotated[Literal["auto", "on", "off"] | list[FusedKernel], BeforeValidator(_as_kernels)]


def _as_range(value: Any) -> Any:
    """A text like 2:4; YAML files need no quotes for it."""
    if value is None or (isinstance(value, str) and re.fullmatch(r"[1-9][0-9]{0,5}:[1-9][0-9]{0,5}", value)):
        return value
    raise ValueError("write the fewest and the most ranks as MIN:MAX, such as 2:4")


ElasticRange = Annotated[str | None, BeforeValidator(_as_range)]

MAX_INTEGER = 1 << 53
# To pydantic, true is 1.
_NUMBERS = (int, float, int | None, float | None, ZeroStage, ZeroStage | None)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation in _NUMBERS:
            raise ValueError("give a number, not true or false")
        return value

    @field_validator("*")
    @classmethod
    def _in_range(cls, value: Any) -> Any:
        if isinstance(value, int) and abs(value) > MAX_INTEGER:
            raise ValueError("a whole number is at most 2^53, which every reader of JSON holds exactly")
        return value


class ModelConfig(Section):
    """Shape of the decoder. `num_experts: 0` gives a dense model (Llama, Qwen3)."""

    vocab_size: int = Field(32_000, ge=8, le=1 << 31, description="ids of the embedding; a tokenizer may have fewer")
    hidden_size: int = Field(512, ge=8, le=1 << 20, description="width of the residual stream")
    num_hidden_layers: int = Field(8, ge=1, le=10_000, description="decoder blocks")
    num_attention_heads: int = Field(8, ge=1, le=1 << 16, description="query heads")
    num_key_value_heads: int = Field(8, ge=1, le=1 << 16, description="key/value heads (grouped-query attention)")
    head_dim: int | None = Field(None, ge=2, le=1 << 16, description="width of a head; hidden_size / heads when unset")
    max_position_embeddings: int = Field(2048, ge=2, le=1 << 31, description="context length in tokens")
    intermediate_size: int | None = Field(
        None, ge=1, le=1 << 24, description="width of a dense feed-forward layer; needed when there is one"
    )
    num_experts: int = Field(0, ge=0, le=1 << 16, description="experts per MoE layer; 0 makes every layer dense")
    num_experts_per_tok: int = Field(2, ge=1, description="experts that each token visits (top-k)")
    moe_intermediate_size: int | None = Field(None, ge=1, le=1 << 24, description="width of one expert")
    num_shared_experts: int = Field(
        0, ge=0, le=1 << 12, description="experts that every token visits, fused into one layer"
    )
    first_k_dense_layers: int = Field(0, ge=0, description="leading layers that stay dense")
    norm_topk_prob: bool = Field(
        True,
        description="rescale a token's chosen routing weights to sum to one; with one expert per token set it false, "
        "or its weight is always one and the language loss teaches the router nothing",
    )
    scoring_func: RouterScoreName = Field(
        "softmax", description="scores of the experts from the router's logits; sigmoid is DeepSeek-V3's"
    )
    router_aux_loss_coef: float = Field(0.01, ge=0, description="weight of the load-balancing loss")
    router_aux_loss_scope: Literal["global_batch", "sequence", "micro_batch"] = Field(
        "global_batch",
        description="tokens over which the load should be even: the step's on all ranks, by the loads of the step "
        "before; each document's; or one rank's micro-batch",
    )
    router_z_loss_coef: float = Field(0.001, ge=0, description="weight of the router z-loss")
    router_bias_update_rate: float | None = Field(
        None,
        ge=0,
        description="balancing without a loss: how far each expert's selection bias moves in a step (DeepSeek-V3: "
        "0.001); 0 keeps a bias fixed, unset there is none",
    )
    router_jitter_noise: float = Field(
        0.0, ge=0, lt=1, description="training multiplies the router's input by 1 - noise to 1 + noise (Switch)"
    )
    expert_dropout: float = Field(
        0.0, ge=0, lt=1, description="share of the experts that training leaves out of a token's choice, k always stay"
    )
    overflow_policy: Literal["dropless", "drop", "reroute"] = Field(
        "dropless",
        description="a choice that finds its expert full: never full; weight zero; the token's next choice with room",
    )
    capacity_factor: float = Field(
        1.25, gt=0, description="room per expert over an even share of a micro-batch's tokens, unless dropless"
    )
    min_capacity_factor: float | None = Field(
        None, gt=0, description="with max_capacity_factor: each layer's factor follows its overflow between the two"
    )
    max_capacity_factor: float | None = Field(None, gt=0, description="upper bound of a factor that follows overflow")
    capacity_overflow_target: float = Field(
        0.01, ge=0, lt=1, description="share of choices without room above which a factor that follows it grows"
    )
    rope_theta: float = Field(10_000.0, ge=1, le=1e12, description="base of the rotary embedding")
    rms_norm_eps: float = Field(
        1e-6, gt=0, le=1, description="added to the mean square under the root of every RMSNorm"
    )
    qk_norm: bool = Field(False, description="RMSNorm on every query and key head (Qwen3)")
    tie_word_embeddings: bool = Field(False, description="the output head shares the embedding")
    initializer_range: float = Field(0.02, gt=0, le=100, description="standard deviation of the initial weights")

    @property
    def attention_head_dim(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def is_moe_layer(self, layer: int) -> bool:
        return self.num_experts > 0 and layer >= self.first_k_dense_layers


class DataConfig(Section):
    """Where the conversations come from: JSONL that is preprocessed once, finished shards, or a mixture of both."""

    train_data: PathList = Field(default_factory=list, description="JSONL files, preprocessed once before training")
    eval_data: PathList = Field(default_factory=list, description="JSONL files for evaluation")
    shards: str | None = Field(None, description="folder of preprocessed shards to train on")
    eval_shards: str | None = Field(None, description="folder of preprocessed shards to evaluate on")
    sources: list[Source] = Field(
        default_factory=list, description="sources of a mixture, in place of train_data and shards"
    )
    temperature: float | None = Field(
        None, gt=0, description="shares of the sources by their tokens to the power of 1/temperature; 1: by their size"
    )
    eval_sets: list[EvalSet] = Field(default_factory=list, description="named evaluation sets, each measured by itself")
    tokenizer: str = Field("auto", description="SentencePiece model; auto trains one of model.vocab_size")
    chat_template: ChatTemplateName = Field(
        DEFAULT_TEMPLATE,
        description="what stands around the turns: ours, a model's by name, FILE.jinja, or auto for the one that the "
        "tokenizer's folder brings; shards must be made with the same",
    )
    seq_length: int | None = Field(None, ge=2, description="tokens of a packed row; the model's context when unset")
    packing: Literal["best_fit", "concat", "none"] = Field("best_fit", description="how conversations share rows")
    overlong: Literal["truncate", "split", "drop"] = Field(
        "truncate", description="longer conversations, but for concat"
    )
    train_turns: Literal["all", "last", "marked"] = Field(
        "all",
        description="assistant turns that are labels: all that no flag switches off, the last, or those a flag marks",
    )
    train_reasoning: Literal["yes", "no", "last"] = Field(
        "yes",
        description="assistants' reasoning: a label, context without a label, or only that of the last exchange",
    )
    format: str | None = Field(None, description="format of the lines; their keys tell when unset")
    max_rejected: MaxRejected = Field(
        0.05, description="refused lines of train_data or eval_data above which a run ends: a number, or a share (5%)"
    )
    allow_unknown: bool = Field(
        False, description="train on ids that stand for characters which the tokenizer cannot spell"
    )
    shard_size_mb: int = Field(256, ge=1, description="size at which a new shard file begins")
    disable_sharding: bool = Field(False, description="write one shard file whatever its size")
    force_streaming: bool = Field(False, description="map shards from disk even when they would fit in memory")
    max_conversations: int | None = Field(None, ge=1, description="stop after this many conversations")
    eval_fraction: float = Field(0.0, ge=0, lt=1, description="share of train_data held out when no eval_data is given")
    num_workers: int = Field(1, ge=1, description="processes of the preprocessing stage")


class TrainConfig(Section):
    """Optimization, length of the run, and what happens every so many steps."""

    micro_batch_size: int = Field(
        1, ge=1, description="packed rows per GPU and forward pass; auto: the largest that fits (auto_micro_batch)"
    )
    auto_micro_batch: bool = Field(
        False,
        description="what --batch-size auto sets: largest micro-batch that fits, planned and then tried. A step keeps its "
        "rows: global_batch_size, or else the preset's or file's micro_batch_size x gradient_accumulation_steps x ranks",
    )
    gradient_accumulation_steps: int = Field(1, ge=1, description="micro-batches per optimizer step")
    global_batch_size: int | None = Field(
        None, ge=1, description="rows per step; must equal micro_batch_size x accumulation x data-parallel ranks"
    )
    epochs: float = Field(1.0, gt=0, description="passes over the training rows, unless max_steps is set")
    max_steps: int | None = Field(None, ge=1, description="optimizer steps of the whole run")
    stop_at_step: int | None = Field(
        None, ge=1, description="save and end at this step; the schedule still spans the whole run"
    )
    optimizer: OptimizerName = Field(
        "adamw", description="adamw of torch; cpu_adam of DeepSpeed, on offloaded states; muon at ZeRO-1 and 2"
    )
    learning_rate: float = Field(3e-4, gt=0, description="peak learning rate")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="final learning rate over the peak")
    lr_scheduler_type: ScheduleName = Field("cosine", description="course of the learning rate after the warm-up")
    warmup_ratio: float = Field(
        0.03, ge=0, le=1, description="share of the steps that warm up; by the model's size when not given"
    )
    decay_ratio: float = Field(0.2, gt=0, le=1, description="share of the steps in which wsd falls, at the end")
    weight_decay: float = Field(0.1, ge=0, description="on matrices only; norms and biases have none")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment")
    adam_beta2: float = Field(0.95, ge=0, lt=1, description="decay of the second moment")
    adam_epsilon: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    muon_learning_rate: float = Field(
        0.02, gt=0, description="Muon's peak rate for matrices; learning_rate is that of the AdamW beside it"
    )
    muon_momentum: float = Field(0.95, ge=0, lt=1, description="momentum of Muon's matrices")
    max_grad_norm: float = Field(1.0, ge=0, description="global gradient norm to clip at; 0 switches clipping off")
    precision: Precision = Field(
        "auto",
        description="auto: bf16 on a GPU that has it, mixed_bf16 there below 100 million parameters, fp16 on compute "
        "capability 7, fp32 on older GPUs and on a CPU",
    )
    precision_fallback: bool = Field(
        False, description="when training becomes unstable, go on from the last checkpoint in a safer precision"
    )
    activation_checkpointing: Checkpointing = Field(
        "none", description="recompute in the backward pass: full blocks, or their attention or feed-forward half"
    )
    checkpoint_interval: int = Field(1, ge=1, description="recompute in every so many blocks only, from the first on")
    loss_chunk_tokens: int | None = Field(
        None, ge=0, description="tokens whose logits exist at a time; by the vocabulary when unset, 0 for all at once"
    )
    flash_attention: Literal["auto", "on", "off"] = Field(
        "auto", description="FlashAttention kernels, of flash-attn (extra: flash) or of torch; auto: where they gain"
    )
    attention_backend: AttentionBackendName = Field(
        "auto", description="kernel by name; auto leaves it to flash_attention"
    )
    fused_kernels: FusedKernels = Field(
        "auto",
        description="kernels of Liger (extra: fused) and DeepSpeed, each compared with ours at the start: on, off, "
        "names of rms_norm, rope, swiglu, cross_entropy and combine, or auto: those that can run on a GPU",
    )
    compile: Compile = Field(
        "off", description="torch.compile through DeepSpeed, needs a compiler; auto: where it works and may gain"
    )
    seed: int = Field(42, ge=0, description="of the initial weights and the order of the rows")
    init_from: str | None = Field(
        None, description="folder of whole weights to start from: of `lumina import`, or a checkpoint's step folder"
    )
    log_every_n_batches: int = Field(1, ge=1, description="steps between two metrics records")
    eval_every_n_batches: int = Field(0, ge=0, description="steps between evaluations; 0 evaluates before and after")
    eval_max_rows: int | None = Field(None, ge=1, description="evaluate on the first so many rows only")
    best_by: str | None = Field(
        None,
        description="evaluation set whose loss chooses the checkpoint `best`; unset or mean: the weighted mean of all",
    )
    save_every_n_batches: int = Field(
        0, ge=0, description="steps between checkpoints, beside those by minutes; 0: none"
    )
    save_every_minutes: float = Field(
        30, ge=0, description="minutes between checkpoints, counted from the last one; 0: none"
    )
    save_in_background: bool = Field(True, description="write checkpoints while training goes on, from a copy")
    keep_checkpoints: int = Field(3, ge=1, description="newest checkpoints to keep; best and latest always stay")

    @property
    def may_fuse_loss(self) -> bool:
        """Whether a GPU with Liger would take its loss; who chooses the chunks has the loss that takes them."""
        asked = self.fused_kernels
        return self.loss_chunk_tokens is None and (asked in ("auto", "on") or "cross_entropy" in asked)

    @property
    def muon_rate_factor(self) -> float:
        """Muon's learning rate over that of AdamW; both follow the same schedule."""
        return self.muon_learning_rate / self.learning_rate


class DeepSpeedConfig(Section):
    """What is handed to DeepSpeed beside the batch, the optimizer and the precision."""

    config: str | None = Field(None, description="DeepSpeed JSON: a file, or a name in ds_configs")
    zero_stage: ZeroStage | None = Field(None, description="ZeRO stage; overrides the JSON's")
    offload: Offload | None = Field(
        None, description="states kept in host memory: optimizer at ZeRO-1 to 3, parameters too at ZeRO-3"
    )
    expert_parallel_size: int = Field(1, ge=1, description="ranks that share one set of experts (AutoEP)")
    sequence_parallel_size: int = Field(
        1, ge=1, description="ranks that share long rows, each with a slice (Ulysses); dense models only"
    )
    rendezvous_seconds: float = Field(60, gt=0, description="how long a rank waits for the others at the start")


class HealthConfig(Section):
    """What a run does about stalled and slow ranks, unstable steps, and a full card."""

    stall_timeout_seconds: float = Field(
        900, ge=0, description="end the run when a rank stays in one call for so long; 0 waits for ever"
    )
    straggler_ratio: float = Field(
        2.0, gt=1, description="name a rank that works so many times as long as the median of all"
    )
    straggler_window_seconds: float = Field(30, gt=0, description="time over which ranks are compared")
    max_consecutive_skips: int = Field(8, ge=1, description="skipped steps in a row that a run survives")
    spike_policy: Literal["warn", "skip", "rollback"] = Field(
        "warn", description="on a spike: say so, skip the step, or go back to a checkpoint and pass over the samples"
    )
    spike_threshold: float = Field(
        6.0, gt=0, description="a spike is so many robust standard deviations above the median of recent steps"
    )
    spike_window_steps: int = Field(128, ge=8, description="recent steps that a spike is measured against")
    spike_warmup_steps: int = Field(16, ge=4, description="steps before the first one can be a spike")
    rollback_skip_steps: int = Field(
        1, ge=1, description="steps up to the spike whose samples are passed over after going back"
    )
    max_rollbacks: int = Field(3, ge=0, description="rollbacks of a whole run before it gives up")
    out_of_memory: Literal["stop", "halve"] = Field(
        "stop", description="halve: start again with half the micro-batch and twice the accumulation"
    )


class InferenceConfig(Section):
    precision: InferencePrecision = Field(
        "auto", description="of evaluate, generate and chat; dynamic is int8 in linear layers and experts, on a CPU"
    )


class RunSection(Section):
    """Name and place of the run folder."""

    name: str | None = Field(
        None, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]*$", description="folder below runs_dir; preset name when unset"
    )
    runs_dir: str = Field("runs", description="folder of all runs, and of the data prepared for them (.data)")
    resume: str = Field(
        "auto",
        description="auto: newest checkpoint of the run folder, if any; must: there has to be one; a path; or none",
    )
    tensorboard: bool = Field(False, description="event files in RUN/tensorboard (extra: tensorboard)")
    wandb: Literal["off", "offline", "online"] = Field(
        "off", description="Weights & Biases; offline keeps the run in RUN/wandb for wandb sync (extra: wandb)"
    )
    wandb_project: str = Field("lumina-ds", description="project of Weights & Biases")
    record_samples: bool = Field(False, description="write the ids of each step's packed rows into the metrics")
    max_restarts: int = Field(0, ge=0, description="times that `lumina train` starts failed ranks again")
    restart_backoff_seconds: float = Field(
        5, ge=0, description="wait before the first restart; doubles with each, to at most 5 minutes"
    )
    elastic: ElasticRange = Field(
        None, description="MIN:MAX ranks: the run goes on with those that are left, and takes in those that come back"
    )
    elastic_check_seconds: float = Field(
        60, gt=0, description="how often `lumina train` looks whether an elastic run could have other ranks"
    )
    elastic_wait_seconds: float = Field(
        600, ge=0, description="how long `lumina train` waits while an elastic run has fewer than MIN ranks"
    )

    @property
    def elastic_range(self) -> tuple[int, int] | None:
        """(fewest, most) ranks; None for a run with one number of ranks."""
        if self.elastic is None:
            return None
        fewest, most = self.elastic.split(":")
        return int(fewest), int(most)


class RunConfig(Section):
    """Everything one run depends on."""

    preset: str | None = Field(None, description="preset this configuration started from")
    description: str | None = Field(None, description="one line for lists")
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    deepspeed: DeepSpeedConfig = Field(default_factory=DeepSpeedConfig)
    health: HealthConfig = Field(default_factory=HealthConfig)
    inference: InferenceConfig = Field(default_factory=InferenceConfig)
    run: RunSection = Field(default_factory=RunSection)

    @property
    def seq_length(self) -> int:
        """Tokens of a packed row."""
        return self.data.seq_length or self.model.max_position_embeddings

    @property
    def run_name(self) -> str:
        return self.run.name or self.preset or "run"
