"""Options of other trainers by name, and what is ours: for whoever types one of theirs.

Names are those of transformers' Trainer, TRL, axolotl, LLaMA-Factory, Megatron-LM, torchtune and torchrun, with underscores.
"""

from __future__ import annotations

_BEHIND = "goes to the deepspeed runner, behind ` -- `, as in: -- {flag} 2"
_HOSTS = "goes to the deepspeed runner, behind ` -- `: {flag}"
_IMPORT = "lumina import FOLDER --out start, then --config start/config.yaml"
_LORA = "there are no adapters here: all parameters are trained"

# One line for each meaning; {flag} is what was typed.
_MEANINGS: tuple[tuple[str, str], ...] = (
    ("lr peak_lr max_lr", "--learning-rate"),
    ("micro_batch_size per_device_train_batch_size train_micro_batch_size_per_gpu local_batch_size", "--batch-size, rows of a rank"),
    (
        "train_batch_size global_batch_size gbs total_batch_size",
        "a step has --batch-size x --grad-accum x ranks rows; or --train.global_batch_size for all of them",
    ),
    ("gradient_accumulation_steps gradient_accumulation grad_accum_steps", "--grad-accum"),
    ("num_train_epochs num_epochs n_epochs", "--epochs"),
    ("max_train_steps train_iters train_steps num_steps max_iters total_steps", "--max-steps"),
    (
        "max_seq_length max_seq_len seq_len sequence_len sequence_length cutoff_len max_length block_size model_max_length",
        "--seq-length, tokens of a packed row",
    ),
    ("warmup_steps num_warmup_steps lr_warmup_steps lr_warmup_iters warmup_iters", "--warmup-ratio, a share of the steps, as in 0.05"),
    ("lr_scheduler lr_scheduler_name lr_decay_style scheduler", "--lr-scheduler-type"),
    ("min_lr cosine_min_lr_ratio min_lr_rate", "--train.min_lr_ratio, a share of the learning rate"),
    ("clip_grad grad_clip gradient_clipping clip_grad_norm max_norm gradient_clip_val", "--max-grad-norm"),
    ("optim optimizer_name", "--optimizer"),
    ("wd", "--weight-decay"),
    ("adam_eps adam_epsilon", "--train.adam_epsilon"),
    ("adam_beta1", "--train.adam_beta1"),
    ("adam_beta2", "--train.adam_beta2"),
    ("bf16 bfloat16", "--precision bf16"),
    ("fp16 half", "--precision fp16"),
    ("mixed_precision dtype torch_dtype params_dtype", "--precision"),
    ("gradient_checkpointing recompute_granularity recompute_activations", "--activation-checkpointing full"),
    ("deepspeed ds_config deepspeed_config_file", "--deepspeed_config FILE"),
    ("zero_stage", "--zero"),
    ("offload_optimizer cpu_offload", "--offload optimizer"),
    ("output_dir output save save_dir", "--runs-dir, and --experiment-name for the folder in it"),
    ("run_name exp_name wandb_run_name", "--experiment-name"),
    ("save_steps save_interval checkpoint_interval", "--save-every-n-steps"),
    ("eval_steps eval_interval val_check_interval", "--eval-every-n-steps"),
    ("save_total_limit keep_last_n_checkpoints", "--train.keep_checkpoints"),
    ("logging_steps log_interval log_every_n_steps log_freq", "--train.log_every_n_batches"),
    ("resume_from_checkpoint auto_resume_from_checkpoints load_checkpoint", "--resume auto (the default), none or must"),
    ("model_name_or_path base_model model_name pretrained_model_name_or_path hf_checkpoint model load", _IMPORT),
    ("dataset dataset_name dataset_path train_file data_path train_data_path datasets", "--train-data FILE.jsonl, or --data for shards"),
    ("validation_file eval_file val_data_path eval_dataset test_datasets valid_data_path", "--eval-data FILE.jsonl"),
    ("val_set_size val_size", "--eval-fraction"),
    ("max_samples max_train_samples", "--max-conversations"),
    ("template chat_template_path", "--chat-template"),
    ("tokenizer_name tokenizer_path tokenizer_name_or_path tokenizer_model tokenizer_type", "--tokenizer FILE or FOLDER"),
    ("expert_model_parallel_size expert_parallel_size ep_size ep expert_parallel_degree", "--expert-parallel"),
    (
        "sequence_parallel_size sequence_parallel_degree context_parallel_size context_parallel_degree sp_size cp_size",
        "--sequence-parallel",
    ),
    ("tensor_model_parallel_size tensor_parallel_size tp_size", "there is no tensor parallelism here; --zero 3 divides the weights"),
    ("pipeline_model_parallel_size pp_size", "there is no pipeline parallelism here; --zero 3 divides the weights"),
    ("fsdp fsdp_config use_fsdp", "--zero 3 does the same"),
    ("use_flash_attn flash_attn flash_attention_2 use_flash_attention_2 attn_implementation", "--flash-attention on"),
    ("torch_compile use_torch_compile", "--compile"),
    ("use_liger_kernel enable_liger_kernel liger_kernel", "--train.fused_kernels on"),
    ("report_to logger", "--tensorboard, or --wandb MODE"),
    ("wandb_project", "--run.wandb_project"),
    ("random_seed data_seed", "--seed"),
    (
        "preprocessing_num_workers dataset_num_proc dataset_processes dataloader_num_workers",
        "--num-workers, processes that preprocess",
    ),
    ("packing sample_packing neat_packing", "--data.packing best_fit (the default) or none"),
    ("auto_find_batch_size", "--batch-size auto"),
    ("use_lora lora_r lora_rank lora_alpha adapter qlora use_peft load_in_4bit load_in_8bit", _LORA),
    ("train_on_inputs train_on_prompt train_on_input", "only the assistant's turns are trained; --train-turns says which of them"),
    ("num_gpus num_nodes", _BEHIND),
    ("hostfile include exclude master_addr master_port launcher", _HOSTS),
    ("nproc_per_node nproc num_processes gpus n_gpus num_gpu devices", "the number of ranks is the runner's, behind ` -- `: -- --num_gpus 2"),
    ("nnodes num_machines", "hosts are the runner's, behind ` -- `: -- --hostfile FILE"),
    ("node_rank machine_rank", "each host has its rank from the runner; behind ` -- `: -- --hostfile FILE"),
)  # fmt: skip

PEER_OPTIONS: dict[str, str] = {name: meaning for names, meaning in _MEANINGS for name in names.split()}


def peer_hint(flag: str) -> str:
    """What another trainer's option is here, as an addition to a message; "" for an option of nobody's."""
    name = flag.lstrip("-").partition("=")[0].replace("-", "_").lower()
    meaning = PEER_OPTIONS.get(name)
    return "" if meaning is None else f"; here it is: {meaning}".replace("{flag}", f"--{name}")
