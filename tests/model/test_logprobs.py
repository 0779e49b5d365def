"""Log-probabilities of packed documents, their sum and its gradient, against full logits of each document alone."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


from tests.model.tiny import VOCAB, documents, full_logprobs, random_row
from tests.rows import loss_sum

from dasd_lite.config.train import Full
from dasd_lite.errors import TrainError
from dasd_lite.model import logprobs
from dasd_lite.model.attention import Documents
from dasd_lite.training.trainable import load_trainable


@pytest.mark.parametrize("lengths", [(7,), (1, 2, 3), (40, 40, 40), (90, 3, 61, 1, 300, 44, 290, 60)])
@pytest.mark.parametrize("chunk_tokens", [5, 1024])
def test_logprobs_equal_full_logits_of_each_document_alone(packed_model, plain_model, lengths, chunk_tokens):
    packed = logprobs.target_logprobs(packed_model, random_row(*lengths).ids, lengths, chunk_tokens)
    assert packed.dtype == np.float32
    np.testing.assert_allclose(packed, full_logprobs(plain_model, random_row(*lengths)), atol=1e-5)
    assert np.isnan(packed[[span.start for span in documents(random_row(*lengths))]]).all()


def gradients(model):
    by_name = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return by_name


@pytest.mark.parametrize("options", [{}, {"chunk_tokens": 11}, {"gradient_checkpointing": True}])
def test_loss_and_gradient_equal_those_of_each_document_alone(tiny, plain_model, options):
    data = random_row(90, 3, 61, 300, 44, 290)
    total = 0.0
    for span in documents(data):
        ids = torch.from_numpy(data.ids[span])
        labels = torch.where(torch.from_numpy(data.loss_mask[span]), ids, -100)
        logits = plain_model(input_ids=ids[None]).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
        loss.backward()
        total += loss.item()
    wanted = gradients(plain_model)

    options = dict(options)
    checkpointing = options.pop("gradient_checkpointing", False)
    model = load_trainable(tiny, Full(), device="cpu", gradient_checkpointing=checkpointing)
    loss = loss_sum(model, data.ids, data.loss_mask, data.doc_lengths, **options)
    loss.backward()
    assert loss.item() == pytest.approx(total, rel=1e-6)
    packed = gradients(model)
    assert packed.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(packed[name], gradient, rtol=1e-4, atol=1e-4, msg=name)


def test_gradient_of_the_head_is_the_analytic_one(tiny):
    """Mask and shift: the gradient is Σ over targets t of (softmax(logits of t−1) − onehot(t)) ⊗ (state of t−1)."""
    model = load_trainable(tiny, Full(), device="cpu")
    data = random_row(6, 5)
    data.loss_mask[:] = [1, 0, 1, 1, 0, 0, 1, 0, 0, 0, 1]  # the first of each document is in the mask, yet no target
    targets = [2, 3, 10]
    assert logprobs.target_positions(data.loss_mask, data.doc_lengths).tolist() == targets
    weight = model.lm_head.weight
    expected = torch.zeros_like(weight)
    for span in documents(data):
        with torch.no_grad():
            states = model.base_model(
                input_ids=torch.from_numpy(data.ids[span])[None],
                use_cache=False,
                documents=Documents.of([span.stop - span.start]),
            ).last_hidden_state[0]
            for target in (t for t in targets if span.start <= t < span.stop):
                state = states[target - 1 - span.start]
                error = (weight @ state).softmax(-1)
                error[data.ids[target]] -= 1
                expected += error[:, None] * state[None]
    loss_sum(model, data.ids, data.loss_mask, data.doc_lengths).backward()
    torch.testing.assert_close(weight.grad, expected, rtol=1e-4, atol=1e-5)


def test_lengths_that_do_not_add_up_are_refused(packed_model):
    with pytest.raises(TrainError, match="documents of 5 tokens in a row of 4"):
        logprobs.target_logprobs(packed_model, np.arange(4), [2, 3])


def offloaded_gradients(tiny, *, offload, checkpointing):
    model = load_trainable(tiny, Full(), device="cpu", gradient_checkpointing=checkpointing)
    ids, lengths = np.arange(4000) % VOCAB, [60] * 66 + [40]
    positions = logprobs.target_positions(np.ones(4000, dtype=bool), lengths)
    terms = logprobs.target_terms(
        model, ids, positions, lengths, lambda x, ids, _: logprobs.negative_logprobs(x, ids), offload=offload
    )
    terms.sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_offloaded_activations_give_the_same_gradients(tiny, monkeypatch):
    moved = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: moved.append(a) or empty(*a, **k))
    wanted = offloaded_gradients(tiny, offload=False, checkpointing=False)
    assert not [a for a in moved if a and getattr(a[0], "numel", lambda: 0)() >= 4000 * 32]
    for checkpointing in (False, True):
        before = len(moved)
        offloaded = offloaded_gradients(tiny, offload=True, checkpointing=checkpointing)
        torch.testing.assert_close(offloaded, wanted, rtol=0, atol=0)
        kept = [a[0].numel() for a in moved[before:] if a and isinstance(a[0], torch.Size)]
        assert kept.count(4000 * 32) >= 2  # at least the input of each of the two layers
        assert VOCAB * 32 not in kept  # weights stay
