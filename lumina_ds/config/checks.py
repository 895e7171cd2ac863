"""Checks that span several fields. Each returns the faults it finds; nothing is raised or changed here."""

from __future__ import annotations

from lumina_ds.config.attention import ATTENTION_BACKENDS
from lumina_ds.config.schema import ModelConfig, RunConfig
from lumina_ds.text import counted


def model_faults(config: RunConfig) -> list[str]:
    """Faults of the model's shape and the row length."""
    model = config.model
    faults: list[str] = []
    if model.head_dim is None and model.hidden_size % model.num_attention_heads:
        faults.append(
            f"model.hidden_size {model.hidden_size} is not divisible by model.num_attention_heads "
            f"{model.num_attention_heads}; change one of them or set model.head_dim"
        )
    elif model.attention_head_dim % 2:
        faults.append(f"the head width {model.attention_head_dim} is odd; rotary embeddings need an even one")
    if model.num_attention_heads % model.num_key_value_heads:
        faults.append(
            f"model.num_attention_heads {model.num_attention_heads} is not divisible by "
            f"model.num_key_value_heads {model.num_key_value_heads}; choose a divisor"
        )
    faults += _feed_forward_faults(config)
    if config.seq_length > model.max_position_embeddings:
        faults.append(
            f"data.seq_length {config.seq_length} is above the context of {model.max_position_embeddings} tokens; "
            "lower --seq-length or raise model.max_position_embeddings"
        )
    return faults


def data_faults(config: RunConfig) -> list[str]:
    """Faults of how conversations share rows."""
    if config.data.packing == "concat" and config.data.overlong == "drop":
        return [
            "data.packing concat cuts every conversation at row ends and drops none; leave data.overlong drop out, "
            "or set data.packing best_fit"
        ]
    return []


def _feed_forward_faults(config: RunConfig) -> list[str]:
    model = config.model
    faults: list[str] = []
    num_dense = sum(not model.is_moe_layer(layer) for layer in range(model.num_hidden_layers))
    if num_dense and model.intermediate_size is None:
        faults.append(f"{counted(num_dense, 'layer is', 'layers are')} dense, so model.intermediate_size must be set")
    if model.num_experts:
        if model.moe_intermediate_size is None:
            faults.append(f"model.num_experts is {model.num_experts}, so model.moe_intermediate_size must be set")
        if model.num_experts_per_tok > model.num_experts:
            faults.append(
                f"model.num_experts_per_tok {model.num_experts_per_tok} is above model.num_experts "
                f"{model.num_experts}; lower it"
            )
        if model.first_k_dense_layers >= model.num_hidden_layers:
            faults.append(
                f"model.first_k_dense_layers {model.first_k_dense_layers} leaves no MoE layer of "
                f"{model.num_hidden_layers}; lower it, or set model.num_experts 0"
            )
        faults += _routing_faults(model)
    else:
        names = ("num_shared_experts", "router_bias_update_rate", "router_jitter_noise", "expert_dropout")
        faults += [
            f"model.{name} {getattr(model, name)} needs routed experts; set model.num_experts, or leave it out"
            for name in names
            if getattr(model, name)
        ]
        if model.overflow_policy != "dropless":
            faults.append(
                f"model.overflow_policy {model.overflow_policy} needs routed experts; set model.num_experts, or dropless"
            )
    return faults


def _routing_faults(model: ModelConfig) -> list[str]:
    faults: list[str] = []
    if model.router_bias_update_rate and model.router_aux_loss_coef and model.router_aux_loss_scope != "sequence":
        faults.append(
            f"model.router_bias_update_rate {model.router_bias_update_rate} and model.router_aux_loss_coef "
            f"{model.router_aux_loss_coef} balance the same load twice; set model.router_aux_loss_coef 0, or "
            "model.router_aux_loss_scope sequence beside the bias"
        )
    low, high = model.min_capacity_factor, model.max_capacity_factor
    if (low is None) != (high is None):
        faults.append("model.min_capacity_factor and model.max_capacity_factor belong together; set both or neither")
    elif low is not None and high is not None:
        if model.overflow_policy == "dropless":
            faults.append(
                f"model.min_capacity_factor {low} has no meaning where nothing overflows; "
                "set model.overflow_policy drop or reroute, or leave it out"
            )
        if not low <= model.capacity_factor <= high:
            faults.append(
                f"model.capacity_factor {model.capacity_factor} starts outside of model.min_capacity_factor {low} and "
                f"model.max_capacity_factor {high}; move one of them"
            )
    return faults


def attention_faults(config: RunConfig) -> list[str]:
    """Two options about attention that contradict each other."""
    backend, flash = config.train.attention_backend, config.train.flash_attention
    if backend == "auto" or flash == "auto" or ATTENTION_BACKENDS[backend].is_flash == (flash == "on"):
        return []
    return [
        f"train.attention_backend is {backend} and --flash-attention is {flash}, which contradict each other; "
        "drop one of them"
    ]


def kernel_faults(config: RunConfig) -> list[str]:
    """Fused kernels that are asked for beside what they exclude."""
    asked, chunk = config.train.fused_kernels, config.train.loss_chunk_tokens
    if chunk is None or asked in ("auto", "off") or (asked != "on" and "cross_entropy" not in asked):
        return []
    return [
        f"train.fused_kernels {asked} has a loss that cuts its chunks itself, and train.loss_chunk_tokens is {chunk}; "
        "leave one of them out"
    ]


def sequence_faults(config: RunConfig) -> list[str]:
    """What sequence parallelism cannot do."""
    size, model = config.deepspeed.sequence_parallel_size, config.model
    if size == 1:
        return []
    faults = []
    if model.num_experts:
        faults.append(
            f"--sequence-parallel {size} is for dense models: DeepSpeed's expert parallelism (AutoEP) excludes it; "
            "use --sequence-parallel 1, with --activation-checkpointing full for long rows"
        )
    for name in ("num_attention_heads", "num_key_value_heads"):
        if getattr(model, name) % size:
            faults.append(
                f"model.{name} {getattr(model, name)} is not divisible by --sequence-parallel {size}, and each rank "
                "attends in its own heads; use a divisor"
            )
    if config.seq_length % size:
        faults.append(f"--seq-length {config.seq_length} is not divisible by --sequence-parallel {size}")
    if config.train.compile == "on":
        faults.append(f"--sequence-parallel {size} exchanges heads in code that --compile cannot trace; drop one")
    return faults


def device_faults(config: RunConfig, device: str, precision: str) -> list[str]:
    """Faults that depend on where the run trains, cuda or cpu, and in which resolved precision."""
    if config.train.compile == "on" and config.model.num_experts and device == "cpu" and precision != "bf16":
        return [
            f"train.compile is on, and torch.compile traces the experts' grouped product on a CPU in bf16 only, "
            f"not in {precision}; use --no-compile, or --precision bf16"
        ]
    return []


def world_faults(config: RunConfig, world_size: int) -> list[str]:
    """Faults that depend on the number of ranks: expert groups and the batch equation."""
    faults = expert_faults(config, world_size)
    size = config.deepspeed.expert_parallel_size
    if world_size % size:
        faults.append(
            f"{counted(world_size, 'rank is', 'ranks are')} not divisible by --expert-parallel {size}; {_nearest_layouts(config, world_size)}"
        )
    train, sharing = config.train, config.deepspeed.sequence_parallel_size
    if world_size % sharing:
        faults.append(
            f"{counted(world_size, 'rank is', 'ranks are')} not divisible by --sequence-parallel {sharing}; use a divisor"
        )
    num_readers = world_size // sharing
    if train.auto_micro_batch:
        rows = train.global_batch_size
        if rows is not None and rows % num_readers:
            faults.append(
                f"train.global_batch_size {rows} cannot be dealt out to {counted(num_readers, 'rank')}; use a multiple"
            )
        return faults
    product = train.micro_batch_size * train.gradient_accumulation_steps * num_readers
    if train.global_batch_size is not None and train.global_batch_size != product:
        faults.append(
            f"the batch equation does not hold: train.global_batch_size {train.global_batch_size} is not "
            f"micro_batch_size {train.micro_batch_size} x gradient_accumulation_steps "
            f"{train.gradient_accumulation_steps} x {counted(num_readers, 'rank')} = {product}; set it to {product} or drop it"
        )
    return faults


def expert_faults(config: RunConfig, world_size: int) -> list[str]:
    """Faults of --expert-parallel against the number of experts; `world_size` is for the remedy."""
    experts, size = config.model.num_experts, config.deepspeed.expert_parallel_size
    if size > 1 and experts == 0:
        return [f"--expert-parallel {size} needs experts, and model.num_experts is 0; use --expert-parallel 1"]
    if experts % size == 0:
        return []
    divisors = [n for n in range(1, experts + 1) if experts % n == 0 and world_size % n == 0]
    return [f"model.num_experts {experts} is not divisible by --expert-parallel {size}; use one of {divisors}"]


def _nearest_layouts(config: RunConfig, world_size: int) -> str:
    experts, size = config.model.num_experts, config.deepspeed.expert_parallel_size
    below = world_size // size * size
    ranks = f"{below} or {below + size} ranks" if below else counted(size, "rank")
    possible = [n for n in range(1, size) if world_size % n == 0 and experts % n == 0]
    return f"use {ranks}, or --expert-parallel {max(possible)}"
