# ruff: noqa: RUF001
"""Chat templates in the published formats of many models, each written for these tests, with the special tokens it has.

`ends`: the special token that ends a reply. `wrong`: how a mask is known to go wrong with it elsewhere.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

GPT_OSS_SYSTEM = (
    "<|start|>system<|message|>You are a chat model.\\nCurrent date: ' ~ strftime_now('%Y-%m-%d') ~ '\\n\\n"
    "# Valid channels: analysis, commentary, final.<|end|>"
)


@dataclass(frozen=True)
class Case:
    source: str
    ends: str
    special: tuple[str, ...]
    config: dict[str, Any] = field(default_factory=dict)
    ordinary: tuple[str, ...] = ()  # added tokens that are not special
    rstrip: tuple[str, ...] = ()  # special tokens that swallow the white space after them
    rewrites: bool = False
    ends_with_next: bool = False
    takes_system: bool = True
    wrong: str = ""


def _roles(before: str, after: str, prompt: str, first: str = "") -> str:
    return (
        f"{first}{{% for message in messages %}}{before}{{{{ message['content'] }}}}{after}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{prompt}{{% endif %}}"
    )


CHATML = _roles(
    "{{ '<|im_start|>' + message['role'] + '\n' }}", "{{ '<|im_end|>\n' }}", "{{ '<|im_start|>assistant\n' }}"
)

LLAMA_2 = """
{%- if messages[0]['role'] == 'system' %}
{%- set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}{%- set turns = messages[1:] %}
{%- else %}{%- set system = '' %}{%- set turns = messages %}{%- endif %}
{%- for message in turns %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('user and assistant must take turns') }}
{%- endif %}
{%- set content = system + message['content'] if loop.first else message['content'] %}
{%- if message['role'] == 'user' %}
{{- bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{%- else %}
{{- ' ' + content.strip() + ' ' + eos_token }}
{%- endif %}
{%- endfor %}"""

LLAMA_3 = """
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
{%- set system = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = '' %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n' }}
{%- if tools is not none %}
{{- 'Environment: ipython\n' }}{%- for tool in tools %}{{- tool | tojson(indent=4) }}{{- '\n\n' }}{%- endfor %}
{%- endif %}
{{- system + '<|eot_id|>' }}
{%- for message in messages %}
{%- if message.tool_calls %}
{%- set call = message.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + call.name + '", "parameters": ' }}
{{- call.arguments | tojson }}{{- '}<|eom_id|>' }}
{%- elif message.role == 'tool' %}
{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + message.content + '<|eot_id|>' }}
{%- else %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""

MISTRAL_1 = """{{ bos_token }}
{%- for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate user/assistant/user/...') }}
{%- endif %}
{%- if message['role'] == 'user' %}{{- ' [INST] ' + message['content'] + ' [/INST]' }}
{%- else %}{{- ' ' + message['content'] + eos_token }}{%- endif %}
{%- endfor %}"""

MISTRAL_7 = """{{- bos_token }}
{%- for message in messages %}
{%- if message['role'] == 'user' %}{{- '[INST]' + message['content'] + '[/INST]' }}
{%- elif message['role'] == 'system' %}{{- '[SYSTEM_PROMPT]' + message['content'] + '[/SYSTEM_PROMPT]' }}
{%- elif message['role'] == 'assistant' %}
{%- if message['tool_calls'] %}
{%- for call in message['tool_calls'] %}
{{- '[TOOL_CALLS]' + call['function']['name'] + '[ARGS]' + call['function']['arguments'] | tojson }}
{%- endfor %}
{{- eos_token }}
{%- else %}{{- message['content'] + eos_token }}{%- endif %}
{%- elif message['role'] == 'tool' %}{{- '[TOOL_RESULTS]' + message['content'] + '[/TOOL_RESULTS]' }}
{%- else %}{{- raise_exception('unknown role') }}{%- endif %}
{%- endfor %}"""

QWEN_2_5 = """
{%- if tools %}
{{- '<|im_start|>system\n' }}
{{- messages[0].content if messages[0].role == 'system' else 'You are a helpful assistant.' }}
{{- '\n\n# Tools\n<tools>' }}{%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{%- endfor %}{{- '\n</tools><|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- else %}{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{%- endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' and message.tool_calls %}
{{- '<|im_start|>assistant' }}{%- if message.content %}{{- '\n' + message.content }}{%- endif %}
{%- for call in message.tool_calls %}
{{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}{{- call.function.arguments | tojson }}
{{- '}\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- elif message.role == 'tool' %}
{{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}
{%- elif message.role != 'system' or not loop.first %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

QWEN_3 = """
{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for message in messages %}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
{%- elif message.role == 'assistant' %}
{%- set content = message.content %}{%- set reasoning = '' %}
{%- if message.reasoning_content is string %}{%- set reasoning = message.reasoning_content %}
{%- elif '</think>' in content %}
{%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
{{- '<|im_start|>assistant\n' }}
{%- if loop.index0 > ns.last and (loop.last or reasoning) %}
{{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
{%- else %}{{- content }}{%- endif %}
{%- for call in message.tool_calls or [] %}
{{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}{{- call.function.arguments | tojson }}
{{- '}\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- elif message.role == 'tool' %}
{{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

GEMMA_2 = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}
{%- for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/...') }}
{%- endif %}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{- '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}"""

PHI_3 = """
{%- for message in messages %}{{- '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- else %}{{- eos_token }}{%- endif %}"""

PHI_4 = _roles(
    "{{ '<|im_start|>' + message['role'] + '<|im_sep|>' }}",
    "{{ '<|im_end|>' }}",
    "{{ '<|im_start|>assistant<|im_sep|>' }}",
)

DEEPSEEK_3 = """
{%- set ns = namespace(system='') %}
{%- for message in messages %}{%- if message['role'] == 'system' %}{%- set ns.system = ns.system + message['content'] %}{%- endif %}{%- endfor %}
{{- bos_token }}{{- ns.system }}
{%- for message in messages %}
{%- if message['role'] == 'user' %}{{- '<｜User｜>' + message['content'] }}
{%- elif message['role'] == 'assistant' %}
{%- set content = message['content'] %}
{%- if '</think>' in content %}{%- set content = content.split('</think>', 1)[1] %}{%- endif %}
{{- '<｜Assistant｜></think>' + content + '<｜end▁of▁sentence｜>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<｜Assistant｜></think>' }}{%- endif %}"""

GLM_4_5 = """[gMASK]<sop>
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for message in messages %}
{%- if message.role == 'user' %}{{- '<|user|>\n' + message.content }}
{%- elif message.role == 'system' %}{{- '<|system|>\n' + message.content }}
{%- elif message.role == 'assistant' %}
{{- '<|assistant|>' }}
{%- if loop.index0 > ns.last and message.reasoning_content %}
{{- '\n<think>' + message.reasoning_content.strip() + '</think>' }}
{%- else %}{{- '\n<think></think>' }}{%- endif %}
{%- if message.content.strip() %}{{- '\n' + message.content.strip() }}{%- endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"""

GPT_OSS = (
    "{{- '"
    + GPT_OSS_SYSTEM
    + """' }}
{%- for message in messages %}
{%- if message.role == 'system' %}
{{- '<|start|>developer<|message|># Instructions\n\n' + message.content + '\n\n<|end|>' }}
{%- elif message.role == 'user' %}{{- '<|start|>user<|message|>' + message.content + '<|end|>' }}
{%- elif message.role == 'assistant' %}
{%- if message.thinking and loop.last %}{{- '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' }}{%- endif %}
{{- '<|start|>assistant<|channel|>final<|message|>' + message.content }}
{%- if loop.last and not add_generation_prompt %}{{- '<|return|>' }}{%- else %}{{- '<|end|>' }}{%- endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""
)

OLMO_2 = """{{ bos_token }}
{%- for message in messages %}
{%- if message['role'] == 'assistant' %}
{{- '<|assistant|>\n' + message['content'] + eos_token }}{%- if not loop.last %}{{- '\n' }}{%- endif %}
{%- else %}{{- '<|' + message['role'] + '|>\n' + message['content'] + '\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- endif %}"""

_IM = ("<|im_start|>", "<|im_end|>")
_BOS_EOS = {"bos_token": "<s>", "eos_token": "</s>"}
_CALLS = ("<tool_call>", "</tool_call>", "<think>", "</think>")

CASES: dict[str, Case] = {
    "chatml": Case(CHATML, "<|im_end|>", _IM, {"eos_token": "<|im_end|>"}, wrong="three tokens early"),
    "llama-2": Case(LLAMA_2, "</s>", ("<s>", "</s>"), _BOS_EOS, wrong="all zeros"),
    "llama-3.1": Case(
        LLAMA_3,
        "<|eot_id|>",
        (
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
            "<|eom_id|>",
        ),
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        wrong="all zeros",
    ),
    "mistral-v1": Case(MISTRAL_1, "</s>", ("<s>", "</s>"), _BOS_EOS, takes_system=False, wrong="stop outside"),
    "mistral-v7": Case(
        MISTRAL_7,
        "</s>",
        (
            *("<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CALLS]", "[ARGS]"),
            *("[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        ),
        _BOS_EOS,
    ),
    "qwen-2.5": Case(QWEN_2_5, "<|im_end|>", _IM, {"eos_token": "<|im_end|>"}, ordinary=_CALLS[:2], wrong="all zeros"),
    "qwen-3": Case(
        QWEN_3, "<|im_end|>", _IM, {"eos_token": "<|im_end|>"}, ordinary=_CALLS, rewrites=True, wrong="all ones"
    ),
    "gemma-2": Case(
        GEMMA_2,
        "<end_of_turn>",
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        {"bos_token": "<bos>", "eos_token": "<eos>"},
        takes_system=False,
        wrong="stop outside",
    ),
    "phi-3": Case(
        PHI_3,
        "<|end|>",
        ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        {"eos_token": "<|endoftext|>"},
        rstrip=("<|system|>", "<|user|>", "<|end|>"),
        wrong="stop outside",
    ),
    "phi-4": Case(PHI_4, "<|im_end|>", (*_IM, "<|im_sep|>"), {"eos_token": "<|im_end|>"}),
    "deepseek-v3": Case(
        DEEPSEEK_3,
        "<｜end▁of▁sentence｜>",
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"},
        ordinary=("<｜User｜>", "<｜Assistant｜>", "</think>", "<think>"),
        wrong="all zeros",
    ),
    "glm-4.5": Case(
        GLM_4_5,
        "<|user|>",
        ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        {"eos_token": "<|endoftext|>"},
        ordinary=("<think>", "</think>"),
        rewrites=True,
        ends_with_next=True,
        wrong="stop outside",
    ),
    "gpt-oss": Case(
        GPT_OSS,
        "<|return|>",
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>"),
        {"eos_token": "<|return|>"},
        rewrites=True,
        wrong="all ones",
    ),
    "olmo-2": Case(
        OLMO_2, "<|endoftext|>", ("<|endoftext|>",), {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    ),
}


@cache
def _trained_bpe() -> str:
    """A byte-level BPE of text of many kinds, as most of these models have, with merges over spaces and line ends."""
    import tokenizers

    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    words = tokenizers.Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(words, "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, show_progress=False, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    texts = ["system\nuser\nassistant\nmodel\n\n", "What is two plus three?\n\nFive, since 2 + 3 = 5. [INST] [/INST]"]
    model.train_from_iterator(
        [*texts, "final analysis Let me think. <|user|> <|assistant|> in\n\n\n a\n\nb\n\n\nc"] * 3, trainer
    )
    return model.to_str()


def write_tokenizer(case: Case, folder: Path) -> Path:
    """tokenizer.json and tokenizer_config.json, the template in it, of such a model."""
    import tokenizers

    model = tokenizers.Tokenizer.from_str(_trained_bpe())
    flags = {"normalized": False}
    model.add_special_tokens([tokenizers.AddedToken(t, rstrip=t in case.rstrip, **flags) for t in case.special])
    model.add_tokens([tokenizers.AddedToken(t, **flags) for t in case.ordinary])
    folder.mkdir(parents=True, exist_ok=True)
    model.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": case.source, **case.config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder / "tokenizer.json"
