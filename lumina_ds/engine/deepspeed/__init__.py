"""Everything that changes how DeepSpeed or torch behaves, one file a change; nothing of theirs is replaced elsewhere.

| file | what it changes | until |
|---|---|---|
| expert_parallel | classes of AutoEP's layers, routers and experts; how they sum a token's experts | the engine's end |
| fake_tensors | nn.Module._apply, which leaves modules as they are | its context ends |
| gradient_norm | the norm's blocks on a CPU, and a gate that may refuse a norm | the engine's end |
| linear | torch.nn.functional.linear, put back after ZeRO-3 has exchanged it | its context ends |
| log_level | the level of DeepSpeed's logger | its context ends |
| meta_parameters | nn.Module.register_parameter, which gives no storage | its context ends |
| muon | Muon's kernels without torch.compile | the process ends |
| one_rank | reductions over a single rank, left out | the engine's end |
| phases | what runs around an engine's phases and torch's collectives | its context, or the engine's end |
| remote_start | the words that the runner sends to other hosts, and how it ends ranks there | the process ends |
| sequence_parallel | nothing; our attention calls DeepSpeed's exchange | the model's end |
| shared_memory_op | DeepSpeed's list of ops that it may build | the process ends |
| waited_collectives | methods of ProcessGroup, which wait for gloo's threads | its context ends |

changes.py has the function by which all of them do it. Each file's NEEDS go to tests/engine/test_deepspeed_contract.py.
"""
