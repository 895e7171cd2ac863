"""Documents of a packed row never see each other."""

import torch

from lumina_ds.config.schema import ModelConfig
from lumina_ds.model.attention import LayerCache
from lumina_ds.model.attention_backends import DocumentLayout
from lumina_ds.model.init import initialize
from lumina_ds.model.transformer import CausalLM

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
    num_experts=4,
    moe_intermediate_size=24,
    num_shared_experts=1,
    first_k_dense_layers=1,
    intermediate_size=40,
    initializer_range=0.3,
)


def build(backend="sdpa", **options):
    model = CausalLM(CONFIG, backend, **options)
    initialize(model, CONFIG, seed=3)
    return model


def pack(documents, row_length):
    """One padded row of documents (lists of ids), every token but a document's first being a target."""
    ids, positions, labels, lengths, real = [], [], [], [], []
    for document in documents:
        ids += document
        positions += range(len(document))
        labels += [*document[1:], -100]
        lengths.append(len(document))
        real += [True] * len(document)
    rest = row_length - len(ids)
    if rest:
        ids += [0] * rest
        positions += range(rest)
        labels += [-100] * rest
        real += [False] * rest
        lengths.append(rest)
    tensor = lambda values: torch.tensor([values])  # noqa: E731
    return {
        "input_ids": tensor(ids),
        "position_ids": tensor(positions),
        "labels": tensor(labels),
        "padding_mask": tensor(real),
        "documents": DocumentLayout.from_lengths(tuple(lengths)),
    }


DOCUMENTS = [[5, 9, 2, 7, 7, 1], [3, 3, 60, 4], [11, 12, 13, 14, 15, 16, 17, 18, 19]]


def test_packed_loss_is_the_sum_of_the_documents_losses():
    model = build()
    packed = model(**pack(DOCUMENTS, 24))[0]
    alone = sum(model(**pack([document], len(document)))[0] for document in DOCUMENTS)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    leaking = pack(DOCUMENTS, 24) | {"documents": DocumentLayout.from_lengths((24,))}
    assert abs(model(**leaking)[0] - alone) > 1e-2  # the comparison would notice one document for the whole row


def test_changing_one_document_leaves_the_others_hidden_states_alone():
    model = build()
    inputs = pack(DOCUMENTS, 24)
    changed = pack([DOCUMENTS[0], [40, 41, 42, 43], DOCUMENTS[2]], 24)
    before, after = (model.model(x["input_ids"], x["position_ids"], x["documents"])[0][0] for x in (inputs, changed))
    torch.testing.assert_close(before[:6], after[:6])
    torch.testing.assert_close(before[10:19], after[10:19])
    assert (before[6:10] - after[6:10]).abs().max() > 0.1


def test_a_model_trains_alike_on_the_reference_backend():
    results = []
    for name in ("reference", "sdpa"):
        model = build(name)
        loss = model(**pack(DOCUMENTS, 24))[0]
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert results[0][1].keys() == results[1][1].keys()
    for name, gradient in results[0][1].items():
        difference = (gradient - results[1][1][name]).norm() / gradient.norm()
        assert difference < 1e-5, (name, difference)


def test_generation_with_a_cache_equals_reading_everything_at_once():
    model = build().eval()
    ids = torch.tensor([[5, 9, 2, 7, 7, 1, 3, 60]])
    with torch.no_grad():
        expected = model(ids)
        caches = [LayerCache(CONFIG.max_position_embeddings) for _ in range(CONFIG.num_hidden_layers)]
        pieces = []
        for start, end in ((0, 3), (3, 4), (4, 7), (7, 8)):
            positions = torch.arange(start, end).unsqueeze(0)
            pieces.append(model(ids[:, start:end], positions, caches=caches))
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=1e-5, atol=1e-5)
