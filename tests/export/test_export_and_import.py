"""Folders in Hugging Face's format: logits in transformers, the way back bit for bit, and every refusal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lumina_ds.cli.main import cli, run_command
from lumina_ds.config.load import load_config
from lumina_ds.config.schema import ModelConfig
from lumina_ds.data.tokenizer.tokenizer import Tokenizer
from lumina_ds.engine.weights import fill_parameters, load_selection_biases, stored_weights
from lumina_ds.errors import CheckpointError, ConfigError, DataError
from lumina_ds.export.folder import export_model
from lumina_ds.export.foreign_config import model_from_hugging_face
from lumina_ds.export.start_folder import import_model, read_start_folder
from lumina_ds.model.balancing import selection_biases
from lumina_ds.model.init import initialize
from lumina_ds.model.transformer import CausalLM

SHAPE = dict(
    vocab_size=400, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
    max_position_embeddings=64, rope_theta=5000.0, initializer_range=0.2,
)  # fmt: skip
MODELS = {
    "llama": ModelConfig(**SHAPE, intermediate_size=80),
    "qwen3": ModelConfig(**SHAPE, intermediate_size=80, qk_norm=True, head_dim=16, tie_word_embeddings=True),
    "mixtral": ModelConfig(**SHAPE, num_experts=4, moe_intermediate_size=32, tie_word_embeddings=True),
    "qwen3_moe": ModelConfig(
        **SHAPE, num_experts=4, num_experts_per_tok=3, moe_intermediate_size=32, qk_norm=True, head_dim=8,
        norm_topk_prob=False, first_k_dense_layers=1, intermediate_size=80,
    ),
    "glm4_moe": ModelConfig(
        **SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, num_shared_experts=2, qk_norm=True,
        head_dim=8, first_k_dense_layers=1, intermediate_size=80, scoring_func="sigmoid", router_bias_update_rate=0.0,
    ),
}  # fmt: skip


def write_weights(model: ModelConfig, folder: Path, **changes: torch.Tensor | None) -> CausalLM:
    """Whole weights of a fresh model in our names, as a checkpoint has them, in two files."""
    network = CausalLM(model).eval()
    initialize(network, model, seed=1)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.dim() == 1:  # norms at one would hide a swapped or missing one
                parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
        for bias in selection_biases(network).values():
            bias.normal_(0, 0.5, generator=torch.Generator().manual_seed(3))
    tensors = {name: parameter.detach().contiguous() for name, parameter in network.named_parameters()}
    tensors |= selection_biases(network) | changes
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    names = list(tensors)
    folder.mkdir(exist_ok=True)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / f"model-{number}.safetensors")
        weight_map |= dict.fromkeys(part, f"model-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return network


def load_initial_weights(model: CausalLM, folder: Path) -> None:
    """Fill a whole plain model as every rank of a run fills its part of one."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    biases = {name: tuple(bias.shape) for name, bias in selection_biases(model).items()}
    fill_parameters(model, stored_weights(shapes, folder, biases))
    load_selection_biases(model, folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("family", MODELS)
def test_there_and_back_again(family, tmp_path, corpus, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = MODELS[family]
    network = write_weights(model, tmp_path / "ours")
    first, start, second = (tmp_path / name for name in ("first", "start", "second"))
    made = export_model(model, tmp_path / "ours", corpus.tokenizer, first, max_file_bytes=50_000)
    assert made["family"] == family and len([name for name in made["files"] if name.startswith("model-")]) > 2

    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        first, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.config.eos_token_id == Tokenizer.load(corpus.tokenizer).end_id
    assert theirs.generation_config.pad_token_id == theirs.config.eos_token_id
    ids = torch.randint(0, model.vocab_size, (2, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = theirs.eval()(ids).logits
        assert expected.std() > 0.1
        torch.testing.assert_close(network(ids), expected, rtol=1e-5, atol=1e-5)

    import_model(first, start, max_file_bytes=70_000)
    assert read_start_folder(start).model_dump(exclude={"router_z_loss_coef"}) == model.model_copy(
        update={"head_dim": model.attention_head_dim}
    ).model_dump(exclude={"router_z_loss_coef", "initializer_range"}) | {"initializer_range": 0.02}
    again = CausalLM(model)
    load_initial_weights(again, start)
    for name, parameter in network.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name
    for name, bias in selection_biases(network).items():
        assert torch.equal(selection_biases(again)[name], bias), name
    export_model(read_start_folder(start), start, start / "tokenizer.model", second, max_file_bytes=50_000)
    assert tensors_of(second) == tensors_of(first)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


@pytest.mark.parametrize("family", MODELS)
def test_what_transformers_saves_is_taken(family, tmp_path):
    """A folder that our code had no part in: made and saved by transformers alone."""
    transformers = pytest.importorskip("transformers")
    # GLM-4-MoE rotates half of each head unless told otherwise.
    own = {"partial_rotary_factor": 1.0, "n_routed_experts": 4} if family == "glm4_moe" else {"num_experts": 4}
    config = transformers.AutoConfig.for_model(
        family, vocab_size=96, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
        intermediate_size=32, moe_intermediate_size=16, num_local_experts=4, num_experts_per_tok=2,
        head_dim=8, max_position_embeddings=64, initializer_range=0.2, sliding_window=None, **own,
    )  # fmt: skip
    torch.manual_seed(3)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    theirs.save_pretrained(tmp_path / "foreign", max_shard_size="60KB")
    made = import_model(tmp_path / "foreign", tmp_path / "start")
    assert made["tokenizer"] is None and made["family"] == family
    ours = CausalLM(read_start_folder(tmp_path / "start")).eval()
    load_initial_weights(ours, tmp_path / "start")
    ids = torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = theirs(ids).logits
        assert expected.std() > 0.1
        torch.testing.assert_close(ours(ids), expected, rtol=1e-5, atol=1e-5)


def tensors_of(folder: Path) -> dict[str, tuple[str, bytes]]:
    """Type and bytes of every tensor, whichever file it stands in."""
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    return {name: (str(t.dtype), t.contiguous().view(torch.uint8).numpy().tobytes()) for name, t in tensors.items()}


def test_bfloat16_rounds_each_value_once(tmp_path, corpus):
    network = write_weights(MODELS["mixtral"], tmp_path / "ours")
    export_model(MODELS["mixtral"], tmp_path / "ours", corpus.tokenizer, tmp_path / "out", dtype="bfloat16")
    found = load_file(tmp_path / "out/model.safetensors")
    expert = found["model.layers.1.block_sparse_moe.experts.3.w2.weight"]
    assert torch.equal(expert, network.get_parameter("model.layers.1.mlp.experts.w2")[3].bfloat16())
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    import_model(tmp_path / "out", tmp_path / "start")
    export_model(MODELS["mixtral"], tmp_path / "start", corpus.tokenizer, tmp_path / "second", dtype="bfloat16")
    assert (tmp_path / "second/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.norm.weight": None}, "model.norm.weight is missing"),
        ({"model.norm.weight": torch.empty(0)}, r"model.norm.weight has shape \[0\] instead of \[48\]"),
        ({"model.extra": torch.ones(2)}, "model.extra is not part of this model"),
        ({"model.norm.weight": torch.ones(48, dtype=torch.int32)}, "holds I32 values"),
        ({"model.norm.weight": torch.full((48,), torch.nan)}, "not finite"),
    ],
)
def test_weights_that_are_not_the_models_are_refused_and_nothing_is_left(changes, message, tmp_path, corpus):
    write_weights(MODELS["llama"], tmp_path / "ours", **changes)
    with pytest.raises(CheckpointError, match=message):
        export_model(MODELS["llama"], tmp_path / "ours", corpus.tokenizer, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_a_folder_that_holds_something_is_never_written_into(tmp_path, corpus):
    write_weights(MODELS["llama"], tmp_path / "ours")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="exists already"):
        export_model(MODELS["llama"], tmp_path / "ours", corpus.tokenizer, tmp_path / "out")
    assert contents(tmp_path / "out") == {"mine.txt": b"keep"}


FOREIGN = {
    "model_type": "mixtral", "vocab_size": 400, "hidden_size": 48, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "rope_theta": 1e6, "hidden_act": "silu", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'; only llama, qwen3, mixtral, qwen3_moe"),
        ({"rms_norm_eps": None}, "config.json lacks rms_norm_eps"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"sliding_window": 32}, "sliding_window 32"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling of type 'linear'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters of type 'yarn'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 is above"),
        ({"rope_theta": None, "hidden_act": "relu"}, "2 faults"),
    ],
)
def test_a_foreign_model_that_ours_cannot_compute_is_refused(change, message):
    assert model_from_hugging_face(FOREIGN).num_experts == 4
    with pytest.raises(ConfigError, match=message):
        model_from_hugging_face(FOREIGN | change)


def test_the_vocabulary_grows_for_markers_that_have_no_room(tmp_path):
    """A Llama with 400 ids all in use: the four markers get rows of their own, at the mean of the others."""
    import io

    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog", "one, two; three 456"] * 5),
        model_writer=written, vocab_size=300, model_type="bpe", byte_fallback=True, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False,
    )  # fmt: skip
    (tmp_path / "foreign.model").write_bytes(written.getvalue())
    num_ids = Tokenizer.load(tmp_path / "foreign.model").vocab_size
    model = MODELS["llama"].model_copy(update={"vocab_size": num_ids})
    network = write_weights(model, tmp_path / "ours")
    export_model(model, tmp_path / "ours", tmp_path / "foreign.model", tmp_path / "foreign")
    # Cut the vocabulary to what the SentencePiece model itself has, as its maker would have published it.
    state = {
        name: tensor[: num_ids - 4].clone() if len(tensor) == num_ids else tensor
        for name, tensor in load_file(tmp_path / "foreign/model.safetensors").items()
    }
    (tmp_path / "foreign/model.safetensors.index.json").unlink()
    (tmp_path / "foreign/tokenizer.json").unlink()
    save_file(state, tmp_path / "foreign/model.safetensors")
    config = json.loads((tmp_path / "foreign/config.json").read_text())
    (tmp_path / "foreign/config.json").write_text(json.dumps(config | {"vocab_size": num_ids - 4}))

    made = import_model(tmp_path / "foreign", tmp_path / "start")
    assert made["num_added_rows"] == 4 and made["model"]["vocab_size"] == num_ids
    again = CausalLM(read_start_folder(tmp_path / "start"))
    load_initial_weights(again, tmp_path / "start")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows, before = again.get_parameter(name), network.get_parameter(name)[: num_ids - 4]
        assert torch.equal(rows[: num_ids - 4], before)
        torch.testing.assert_close(rows[num_ids - 4 :], before.mean(dim=0).expand(4, -1))


def test_tokens_that_a_chat_model_added_keep_their_ids(tmp_path, corpus):
    """tokenizer.json goes before tokenizer.model where it has tokens beyond it."""
    write_weights(MODELS["llama"], tmp_path / "ours")
    export_model(MODELS["llama"], tmp_path / "ours", corpus.tokenizer, tmp_path / "out")
    num_ids = Tokenizer.load(corpus.tokenizer).vocab_size
    document = json.loads((tmp_path / "out/tokenizer.json").read_text())
    document["added_tokens"].append(document["added_tokens"][-1] | {"id": num_ids, "content": "<|im_end|>"})
    (tmp_path / "out/tokenizer.json").write_text(json.dumps(document))
    made = import_model(tmp_path / "out", tmp_path / "start")
    assert load_config(str(tmp_path / "start/config.yaml")).config.data.tokenizer == str(
        tmp_path / "start/tokenizer.json"
    )
    tokenizer = Tokenizer.load(tmp_path / "start/tokenizer.json")
    assert tokenizer.piece(num_ids) == "<|im_end|>" and tokenizer.vocab_size == num_ids + 1
    assert made["num_added_rows"] == max(0, num_ids + 1 - 400)


def test_init_from_names_what_does_not_fit(tmp_path):
    write_weights(MODELS["llama"], tmp_path / "ours")
    other = CausalLM(MODELS["llama"].model_copy(update={"intermediate_size": 96, "num_hidden_layers": 1}))
    before = other.lm_head.weight.detach().clone()
    with pytest.raises(CheckpointError, match=r"layers\.1\.\S+ is not part of the configured model") as raised:
        load_initial_weights(other, tmp_path / "ours")
    assert "and" in str(raised.value) and torch.equal(other.lm_head.weight, before)
    wider = CausalLM(MODELS["llama"].model_copy(update={"vocab_size": 404}))
    with pytest.raises(
        CheckpointError, match=r"embed_tokens.weight has shape \[400, 48\], the configuration \[404, 48\]"
    ):
        load_initial_weights(wider, tmp_path / "ours")
    with pytest.raises(CheckpointError, match="holds no whole weights"):
        load_initial_weights(wider, tmp_path)


def test_import_says_what_is_wrong_with_a_folder(tmp_path, corpus, capsys):
    assert run_command(cli, ["import", str(tmp_path), "--out", str(tmp_path / "start")]) == DataError.exit_code
    assert "config.json is missing" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps(FOREIGN))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert run_command(cli, ["import", str(tmp_path), "--out", str(tmp_path / "start")]) == CheckpointError.exit_code
    assert "holds no safetensors weights" in capsys.readouterr().err
    assert not (tmp_path / "start").exists()


def test_the_written_configuration_is_one_and_export_takes_the_folder(tmp_path, corpus, capsys):
    write_weights(MODELS["mixtral"], tmp_path / "ours")
    export_model(MODELS["mixtral"], tmp_path / "ours", corpus.tokenizer, tmp_path / "out")
    assert run_command(cli, ["import", str(tmp_path / "out"), "--out", str(tmp_path / "start"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["family"] == "mixtral"
    config = load_config(str(tmp_path / "start/config.yaml")).config
    assert config.train.init_from == str(tmp_path / "start") and config.model.num_experts == 4
    assert config.data.tokenizer == str(tmp_path / "start/tokenizer.model")
    command = ["export", str(tmp_path / "start"), "--out", str(tmp_path / "second"), "--json"]
    assert run_command(cli, command) == 0
    assert json.loads(capsys.readouterr().out)["step"] is None
    assert contents(tmp_path / "second") == contents(tmp_path / "out")
