"""A GGUF file of an exported folder, made by llama.cpp's own converter with the tokenizer that training had.

The converter chooses a kind of tokenizer by architecture: of Llama, Mixtral and Qwen3 it reads tokenizer.model, of
Qwen3-MoE and GLM-4-MoE a BPE tokenizer that it knows by a checksum, and refuses others. Here it reads tokenizer.model
for all five. What llama.cpp would compute otherwise than the model is refused before, as it says nothing itself.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from lumina_ds.data.templates.find import is_own
from lumina_ds.data.templates.render import TemplateRefusal, render
from lumina_ds.data.templates.samples import exchange
from lumina_ds.data.tokenizer.model_folder import read_chat_template, read_token_names
from lumina_ds.data.tokenizer.sentencepiece_file import BYTE, ModelFile, read_model_file
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from lumina_ds.errors import ConfigError, DataError, MachineError
from lumina_ds.export.hugging_face import ARCHITECTURES
from lumina_ds.export.start_folder import published_model
from lumina_ds.export.weight_files import check_declared, read_headers, read_json
from lumina_ds.files import sync_folder
from lumina_ds.text import shortened

CONVERTER = "convert_hf_to_gguf"


def write_gguf(folder: Path, llama_cpp: Path, out: Path, outtype: str = "auto") -> None:
    """Write the exported `folder` to the file `out`.

    llama_cpp: a checkout with convert_hf_to_gguf.py. outtype: the converter's, f32, f16, bf16, q8_0 or auto. Raises
    ConfigError for an `out` that exists or a model that llama.cpp computes otherwise, DataError for a tokenizer that
    it has no counterpart of, MachineError where the converter is missing or fails, or `out` cannot be written.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already; name a new file with --out, or remove it")
    config = read_json(folder / "config.json")
    check_model(folder, config)
    check_declared(folder, published_model(folder)[1], read_headers(folder))
    tokenizer = _sentencepiece_model(folder)
    unfinished = out.with_name(f".{out.name}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        unfinished.touch()
    except OSError as error:
        raise MachineError(f"cannot write {out}: {error.strerror}; choose another --out") from error
    try:
        converter = _load_converter(llama_cpp)
        keys = {"add_add_space_prefix": tokenizer.adds_dummy_prefix, **chat_keys(folder, config)}
        _take_tokenizer_model(converter, ARCHITECTURES[config["model_type"]], keys)
        _run(converter, [str(folder), "--outtype", outtype, "--outfile", str(unfinished)])
        with unfinished.open("rb") as stream:
            os.fsync(stream.fileno())
        unfinished.replace(out)
        sync_folder(out.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def check_model(folder: Path, config: dict[str, Any]) -> None:
    """Raise ConfigError for a config.json whose model llama.cpp cannot compute."""
    family, found = str(config.get("model_type")), config.get("architectures")
    if family not in ARCHITECTURES or found != [ARCHITECTURES[family]]:
        raise ConfigError(
            f"{folder} holds {shortened(repr(found))} of type {shortened(family)}, not what lumina export writes; export the run again"
        )
    if family != "qwen3_moe":
        return
    # llama.cpp's qwen3moe has neither, and reads no key for them (src/models/qwen3moe.cpp).
    if not config.get("norm_topk_prob"):
        raise ConfigError(f"{folder} has norm_topk_prob false: llama.cpp normalises the scores of every Qwen3-MoE")
    if dense := config.get("mlp_only_layers"):
        raise ConfigError(f"{folder} has dense layers {dense}: llama.cpp's Qwen3-MoE has none")


def _sentencepiece_model(folder: Path) -> ModelFile:
    """The folder's tokenizer.model; DataError where llama.cpp's own tokenizer would give other ids."""
    path = folder / "tokenizer.model"
    if not path.is_file():
        raise DataError(f"{folder} has no tokenizer.model; of another tokenizer run convert_hf_to_gguf.py itself")
    if not (folder / "tokenizer_config.json").is_file():
        raise DataError(f"{folder} has no tokenizer_config.json with the markers; export without --no-fast-tokenizer")
    try:
        model = read_model_file(path.read_bytes())
    except (KeyError, IndexError, ValueError):
        raise DataError(f"{path} is not a SentencePiece model; export the run again") from None
    if not model.is_bpe or model.is_normalized or model.has_space_suffix:
        raise DataError(f"{path} is not of BPE kind or changes its text first, which llama.cpp's tokenizer does not")
    if not any(piece.kind == BYTE for piece in model.pieces):
        raise DataError(f"{path} has no byte pieces, without which llama.cpp cannot encode unknown characters")
    return model


def _load_converter(llama_cpp: Path) -> ModuleType:
    """convert_hf_to_gguf.py as a module; a process can load that of one checkout only."""
    if not (llama_cpp / f"{CONVERTER}.py").is_file():
        raise MachineError(f"{llama_cpp} holds no {CONVERTER}.py; name a checkout of llama.cpp with --llama-cpp")
    sys.path.insert(0, str(llama_cpp))
    try:
        return importlib.import_module(CONVERTER)
    except ImportError as error:
        raise MachineError(f"{llama_cpp}/{CONVERTER}.py does not load ({error}); pip install 'lumina-ds[hf]'") from None


def chat_keys(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Under a model's own chat template: methods of the converter's writer, and what each of them is told.

    Of other templates the tokenizer's files say it. Else llama.cpp begins every chat with BOS though the template writes
    none, and goes on after the token that ends a reply where eos_token is another. Raises DataError for a template that refuses.
    """
    template = read_chat_template(folder)
    if template is None or is_own(template.source):
        return {}
    names = read_token_names(folder)
    try:
        text = render(template.source, names, exchange("a question", "an answer"))
    except TemplateRefusal as refusal:
        raise DataError(f"{template.place}: {refusal}; export the run again") from None
    keys: dict[str, Any] = {"add_add_bos_token": bool(names.get("bos_token")) and text.startswith(names["bos_token"])}
    ends = config.get("eos_token_id")
    known = Tokenizer.load(folder / "tokenizer.model").special_tokens
    others = [
        end for end in (ends if isinstance(ends, list) else [ends]) if end != known.get(names.get("eos_token", ""))
    ]
    return keys | dict(zip(("add_eot_token_id", "add_eom_token_id"), others, strict=False))


def _take_tokenizer_model(converter: ModuleType, architecture: str, keys: dict[str, Any]) -> None:
    try:
        family = converter.get_model_class(architecture)
        read_sentencepiece = family._set_vocab_sentencepiece
    except AttributeError as error:
        raise MachineError(
            f"{converter.__file__} is of another age ({error}); docs/hugging-face.md names one that fits"
        ) from None

    def set_vocab(self: Any) -> None:
        read_sentencepiece(self)
        # Without the first key llama.cpp puts a space before every text.
        for method, value in keys.items():
            getattr(self.gguf_writer, method)(value)

    family.set_vocab = set_vocab


def _run(converter: ModuleType, arguments: list[str]) -> None:
    before = sys.argv
    sys.argv = [CONVERTER, *arguments]
    try:
        converter.main()
    except Exception as error:  # it raises what it pleases
        raise MachineError(f"llama.cpp's converter failed: {type(error).__name__}: {error}") from error
    except SystemExit as error:
        raise MachineError("llama.cpp's converter failed; its last lines say why") from error
    finally:
        sys.argv = before
