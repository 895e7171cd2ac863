"""The same conversations, packed and one per row: the same trained tokens and the same loss."""

import pytest
import torch

from lumina_ds.config.schema import ModelConfig
from lumina_ds.data.loader import PackedRows
from lumina_ds.data.shards.folder import ShardFolder
from lumina_ds.engine.world import World
from lumina_ds.model.init import initialize
from lumina_ds.model.transformer import CausalLM
from lumina_ds.train.evaluate import evaluate
from lumina_ds.train.step import model_inputs

CONFIG = ModelConfig(
    vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=192, num_experts=4, moe_intermediate_size=32, initializer_range=0.3,
)  # fmt: skip


@pytest.fixture(scope="module")
def folders(corpus, lumina, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packings")
    for packing in ("best_fit", "none"):
        words = ["--tokenizer", corpus.tokenizer, "--seq-length", 192, "--packing", packing, "--out", folder / packing]
        lumina("preprocess", corpus.eval, *words)
    return {packing: ShardFolder.open(folder / packing) for packing in ("best_fit", "none")}


def test_packed_loss_equals_unpacked_loss(folders):
    model = CausalLM(CONFIG)
    initialize(model, CONFIG, seed=0)
    rows = {packing: PackedRows(folder, 192) for packing, folder in folders.items()}
    assert rows["best_fit"].num_rows < rows["none"].num_rows == folders["none"].num_documents
    found = {packing: evaluate(model, part, 2, World(0, 0, 1, "cpu")) for packing, part in rows.items()}
    assert found["best_fit"]["trained_tokens"] == found["none"]["trained_tokens"] > 0
    assert found["best_fit"]["loss"] == pytest.approx(found["none"]["loss"], rel=1e-6)


def test_each_conversation_keeps_its_loss_in_a_packed_row(folders):
    """Row by row: the loss of every conversation inside a packed row is that of the conversation alone."""
    model = CausalLM(CONFIG)
    initialize(model, CONFIG, seed=0)
    packed, alone = PackedRows(folders["best_fit"], 192), PackedRows(folders["none"], 192)

    def losses_by_document(rows):
        """Sum of -log p per segment, keyed by the segment's tokens (the corpus repeats, so equal texts agree)."""
        found = {}
        for row in range(rows.num_rows):
            batch = rows.collate([row])
            inputs = model_inputs(batch, torch.device("cpu"))
            labels = inputs.pop("labels")
            logits = model(**inputs)
            nll = torch.nn.functional.cross_entropy(logits[0], labels[0], reduction="none", ignore_index=-100)
            begin = 0
            for length in batch.document_lengths:
                if batch.padding_mask[0, begin]:
                    key = tuple(batch.input_ids[0, begin : begin + length])
                    found.setdefault(key, []).append(nll[begin : begin + length].sum().item())
                begin += length
        return found

    with torch.no_grad():
        expected, found = losses_by_document(alone), losses_by_document(packed)
    assert found.keys() == expected.keys() and len(found) > 5
    for key, losses in found.items():
        assert losses == pytest.approx([expected[key][0]] * len(losses), rel=1e-5)
