"""The chunked loss against torch's cross-entropy over all logits, values, gradients and memory."""

import pytest
import torch
import torch.nn.functional as F

from lumina_ds.config.precision import loss_chunk_tokens
from lumina_ds.model.loss import LanguageHead

HIDDEN, VOCABULARY = 16, 50


def problem(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 20, HIDDEN, generator=generator)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    labels = torch.randint(VOCABULARY, (2, 20), generator=generator)
    labels[0, :7] = labels[1, 15:] = -100  # 28 trained positions
    return hidden.to(dtype).requires_grad_(), weight.to(dtype), labels


def loss_and_gradients(chunk_tokens, dtype=torch.float32, factor=0.25, autocast=False):
    hidden, weight, labels = problem(dtype)
    head = LanguageHead(HIDDEN, VOCABULARY, chunk_tokens).to(dtype)
    head.weight.data.copy_(weight)
    with torch.autocast("cpu", enabled=autocast):
        loss = head(hidden, labels)
    (factor * loss).backward()
    assert loss.dtype == torch.float32
    return loss.detach(), hidden.grad, head.weight.grad


def by_torch(dtype=torch.float32, factor=0.25):
    hidden, weight, labels = problem(dtype)
    hidden, weight = hidden.detach().double().requires_grad_(), weight.double().requires_grad_()
    loss = F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100)
    (factor * loss).backward()
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("chunk_tokens", [0, 1, 5, 28, 1000])
def test_fp32_equals_torch(chunk_tokens):
    for found, expected in zip(loss_and_gradients(chunk_tokens), by_torch(), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_is_as_near_as_the_plain_loss(autocast):
    """Against float64, the error of chunks of one token is at most a tenth above that of all logits at once."""
    dtype = torch.float32 if autocast else torch.bfloat16
    expected = by_torch(dtype)
    errors = {
        chunk: [
            ((found.double() - wanted).norm() / wanted.norm()).item()
            for found, wanted in zip(loss_and_gradients(chunk, dtype, autocast=autocast), expected, strict=True)
        ]
        for chunk in (0, 1, 5)
    }
    assert max(errors[0]) < 1e-2
    for chunk in (1, 5):
        assert all(found <= 1.1 * plain + 1e-4 for found, plain in zip(errors[chunk], errors[0], strict=True)), errors


def test_gradients_have_their_parameters_types():
    for autocast in (False, True):
        _, hidden, weight = loss_and_gradients(5, torch.float32 if autocast else torch.bfloat16, autocast=autocast)
        assert hidden.dtype == weight.dtype == (torch.float32 if autocast else torch.bfloat16)


def test_tied_weight_adds_up_both_uses():
    embedding = torch.nn.Embedding(VOCABULARY, HIDDEN)
    ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
    gradients = []
    for chunk_tokens in (0, 2):
        embedding.weight.grad = None
        head = LanguageHead(HIDDEN, VOCABULARY, chunk_tokens)
        head.weight = embedding.weight
        head(embedding(ids), ids.roll(-1, 1)).backward()
        gradients.append(embedding.weight.grad.clone())
    torch.testing.assert_close(*gradients)
    assert (gradients[0][1].norm() > gradients[0][40].norm()).item()  # looked up and predicted, against predicted only


def test_without_labels_and_without_gradients():
    hidden, _, labels = problem()
    head = LanguageHead(HIDDEN, VOCABULARY, 5)
    torch.testing.assert_close(head(hidden), hidden @ head.weight.T)
    with torch.no_grad():
        found = head(hidden, labels)
    assert not found.requires_grad
    torch.testing.assert_close(found, head(hidden, labels).detach())


def test_nothing_to_train_costs_nothing_and_still_reaches_the_weight():
    hidden, _, labels = problem()
    head = LanguageHead(HIDDEN, VOCABULARY, 5)
    loss = head(hidden, torch.full_like(labels, -100))
    loss.backward()
    assert loss.item() == 0
    assert head.weight.grad is not None and head.weight.grad.count_nonzero() == 0


def test_chunk_by_vocabulary():
    assert loss_chunk_tokens(None, 8192) == 4096
    assert loss_chunk_tokens(None, 131072) == 1024
    assert (loss_chunk_tokens(0, 8192), loss_chunk_tokens(7, 8192)) == (0, 7)


@pytest.mark.parametrize("chunk_tokens", [0, 1, 5, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_of_groups_of_rows_change_nothing_and_are_exact_sums(chunk_tokens, dtype):
    """The third group has no row, and a row of no group (-1) has no label."""
    loss, *gradients = loss_and_gradients(chunk_tokens or 1000, dtype)
    hidden, weight, labels = problem(dtype)
    padded = torch.cat([hidden.detach(), hidden.detach()[:1]]).requires_grad_()
    head = LanguageHead(HIDDEN, VOCABULARY, chunk_tokens).to(dtype)
    head.weight.data.copy_(weight)
    none = torch.full_like(labels[:1], -100)
    grouped, by_group = head(padded, torch.cat([labels, none]), torch.tensor([1, 0, -1]), 3)
    (0.25 * grouped).backward()
    assert torch.equal(grouped, loss) and not by_group.requires_grad
    assert torch.equal(padded.grad[:2], gradients[0]) and torch.equal(head.weight.grad, gradients[1])
    hidden = hidden.detach()
    rows = [F.cross_entropy((hidden[row] @ weight.T).float(), labels[row], reduction="sum") for row in (1, 0)]
    torch.testing.assert_close(by_group, torch.tensor([*map(float, rows), 0.0], dtype=torch.float64), rtol=2e-3, atol=0)
    assert float(by_group.sum()) == pytest.approx(float(loss), rel=1e-6)


def test_groups_without_a_label_have_a_loss_of_zero_and_the_weight_its_gradient():
    hidden, _, labels = problem()
    head = LanguageHead(HIDDEN, VOCABULARY, 5)
    loss, by_group = head(hidden, torch.full_like(labels, -100), torch.tensor([0, 1]), 2)
    loss.backward()
    assert loss == 0 and by_group.tolist() == [0.0, 0.0] and head.weight.grad.abs().sum() == 0
