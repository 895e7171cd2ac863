"""The command line's short names for configuration fields: one table for every program that takes them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ShortOption:
    """`flag` sets `field`. `kind`: value, many (repeatable), true (a switch), or choice (--x [VALUE], on without one; --no-x)."""

    flag: str
    field: str
    kind: str = "value"


SHORT_OPTIONS: tuple[ShortOption, ...] = (
    ShortOption("--train-data", "data.train_data", "many"),
    ShortOption("--eval-data", "data.eval_data", "many"),
    ShortOption("--data", "data.shards"),
    ShortOption("--eval-shards", "data.eval_shards"),
    ShortOption("--source", "data.sources", "many"),
    ShortOption("--eval-set", "data.eval_sets", "many"),
    ShortOption("--tokenizer", "data.tokenizer"),
    ShortOption("--chat-template", "data.chat_template"),
    ShortOption("--seq-length", "data.seq_length"),
    ShortOption("--max-conversations", "data.max_conversations"),
    ShortOption("--shard-size-mb", "data.shard_size_mb"),
    ShortOption("--disable-sharding", "data.disable_sharding", "true"),
    ShortOption("--force-streaming", "data.force_streaming", "true"),
    ShortOption("--eval-fraction", "data.eval_fraction"),
    ShortOption("--train-turns", "data.train_turns"),
    ShortOption("--train-reasoning", "data.train_reasoning"),
    ShortOption("--format", "data.format"),
    ShortOption("--max-rejected", "data.max_rejected"),
    ShortOption("--allow-unknown", "data.allow_unknown", "true"),
    ShortOption("--num-workers", "data.num_workers"),
    ShortOption("--batch-size", "train.micro_batch_size"),
    ShortOption("--grad-accum", "train.gradient_accumulation_steps"),
    ShortOption("--epochs", "train.epochs"),
    ShortOption("--max-steps", "train.max_steps"),
    ShortOption("--stop-at-step", "train.stop_at_step"),
    ShortOption("--optimizer", "train.optimizer"),
    ShortOption("--learning-rate", "train.learning_rate"),
    ShortOption("--lr-scheduler-type", "train.lr_scheduler_type"),
    ShortOption("--warmup-ratio", "train.warmup_ratio"),
    ShortOption("--weight-decay", "train.weight_decay"),
    ShortOption("--max-grad-norm", "train.max_grad_norm"),
    ShortOption("--precision", "train.precision"),
    ShortOption("--precision-fallback", "train.precision_fallback", "true"),
    ShortOption("--activation-checkpointing", "train.activation_checkpointing"),
    ShortOption("--flash-attention", "train.flash_attention"),
    ShortOption("--compile", "train.compile", "choice"),
    ShortOption("--seed", "train.seed"),
    ShortOption("--eval-every-n-batches", "train.eval_every_n_batches"),
    ShortOption("--save-every-n-batches", "train.save_every_n_batches"),
    ShortOption("--eval-every-n-steps", "train.eval_every_n_batches"),
    ShortOption("--save-every-n-steps", "train.save_every_n_batches"),
    ShortOption("--zero", "deepspeed.zero_stage"),
    ShortOption("--offload", "deepspeed.offload"),
    ShortOption("--expert-parallel", "deepspeed.expert_parallel_size"),
    ShortOption("--sequence-parallel", "deepspeed.sequence_parallel_size"),
    ShortOption("--deepspeed_config", "deepspeed.config"),
    ShortOption("--inference-precision", "inference.precision"),
    ShortOption("--experiment-name", "run.name"),
    ShortOption("--runs-dir", "run.runs_dir"),
    ShortOption("--resume", "run.resume"),
    ShortOption("--max-restarts", "run.max_restarts"),
    ShortOption("--elastic", "run.elastic"),
    ShortOption("--record-samples", "run.record_samples", "true"),
    ShortOption("--tensorboard", "run.tensorboard", "true"),
    ShortOption("--wandb", "run.wandb"),
)
