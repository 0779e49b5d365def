"""The student: packed documents, log-probabilities, loss and its gradient, adapters, saving."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from dasd_lite.config.train import Full, Lora
from dasd_lite.errors import ConfigError, TrainError
from dasd_lite.model import load as student
from dasd_lite.model import logprobs
from dasd_lite.model.attention import Documents
from dasd_lite.model.row import Row
from dasd_lite.training import export, trainable

VOCAB = 97
LORA = Lora(kind="lora", rank=4, alpha=8)
QLORA = Lora(kind="qlora", rank=4, alpha=8)


def make_model(folder, *, vocab=VOCAB, dtype="float32", **options):
    config = transformers.Qwen3Config(
        **{
            "vocab_size": vocab,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 512,
            "tie_word_embeddings": False,
            "initializer_range": 0.2,  # far from uniform, so that a leak would show
            **options,
        }
    )
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(config)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
                module.weight.normal_(0, 0.2)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def model(tiny):
    return student.load_model(tiny, device="cpu")


@pytest.fixture(scope="module")
def plain(tiny):
    return student.load_model(tiny, device="cpu", attention="sdpa")


def row(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    num = sum(lengths)
    uids = tuple(f"r{i}" for i in range(len(lengths)))
    return Row(rng.integers(0, VOCAB, num), rng.random(num) < 0.6, np.array(lengths), uids)


def documents(row):
    ends = np.cumsum(row.doc_lengths)
    return [slice(a, b) for a, b in zip(ends - row.doc_lengths, ends, strict=True)]


def full_logprobs(plain, row):
    """Each document alone, full logits, log_softmax."""
    found = np.full(len(row.ids), np.nan, dtype=np.float32)
    for span in documents(row):
        ids = torch.from_numpy(row.ids[span])
        with torch.no_grad():
            logprobs = plain(input_ids=ids[None]).logits[0].log_softmax(-1)
        found[span][1:] = logprobs[:-1].gather(1, ids[1:, None])[:, 0].numpy()
    return found


@pytest.mark.parametrize("lengths", [(7,), (1, 2, 3), (40, 40, 40), (90, 3, 61, 1, 300, 44, 290, 60)])
@pytest.mark.parametrize("chunk_tokens", [5, 1024])
def test_logprobs_equal_full_logits_of_each_document_alone(model, plain, lengths, chunk_tokens):
    packed = logprobs.target_logprobs(model, row(*lengths).ids, lengths, chunk_tokens)
    assert packed.dtype == np.float32
    np.testing.assert_allclose(packed, full_logprobs(plain, row(*lengths)), atol=1e-5)
    assert np.isnan(packed[[span.start for span in documents(row(*lengths))]]).all()


def test_a_neighbour_cannot_leak(model):
    one, other = row(50, 61, 200, 55), row(50, 61, 200, 55)
    second = documents(one)[1]
    other.ids[second] = (one.ids[second] + 1) % VOCAB
    a, b = (logprobs.target_logprobs(model, r.ids, r.doc_lengths) for r in (one, other))
    outside = np.ones(len(a), dtype=bool)
    outside[second] = False
    np.testing.assert_array_equal(a[outside], b[outside])  # to the bit
    assert (np.abs(a - b)[second][1:] > 1e-3).mean() > 0.9
    # The rest of a document follows its beginning, and the beginning not the rest.
    later = row(50, 61, 200, 55)
    later.ids[second.start + 30] += 1
    later.ids[second.start + 30] %= VOCAB
    c = logprobs.target_logprobs(model, later.ids, later.doc_lengths)
    np.testing.assert_array_equal(a[second][1:30], c[second][1:30])
    assert (a[second][31:] != c[second][31:]).all()


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("options", [{}, {"chunk_tokens": 11}, {"gradient_checkpointing": True}])
def test_loss_and_gradient_equal_those_of_each_document_alone(tiny, plain, options):
    data = row(90, 3, 61, 300, 44, 290)
    total = 0.0
    for span in documents(data):
        ids = torch.from_numpy(data.ids[span])
        labels = torch.where(torch.from_numpy(data.loss_mask[span]), ids, -100)
        logits = plain(input_ids=ids[None]).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
        loss.backward()
        total += loss.item()
    wanted = gradients(plain)

    options = dict(options)
    checkpointing = options.pop("gradient_checkpointing", False)
    model = trainable.load_trainable(tiny, Full(), device="cpu", gradient_checkpointing=checkpointing)
    loss = logprobs.loss_sum(model, data.ids, data.loss_mask, data.doc_lengths, **options)
    loss.backward()
    assert loss.item() == pytest.approx(total, rel=1e-6)
    found = gradients(model)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4, msg=name)


def test_gradient_of_the_head_is_the_analytic_one(tiny):
    """Mask and shift: the gradient is Σ over targets t of (softmax(logits of t−1) − onehot(t)) ⊗ (state of t−1)."""
    model = trainable.load_trainable(tiny, Full(), device="cpu")
    data = row(6, 5)
    data.loss_mask[:] = [1, 0, 1, 1, 0, 0, 1, 0, 0, 0, 1]  # the first of each document is masked in and yet no target
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
    logprobs.loss_sum(model, data.ids, data.loss_mask, data.doc_lengths).backward()
    torch.testing.assert_close(weight.grad, expected, rtol=1e-4, atol=1e-5)


def test_plan_of_documents_covers_each_token_once():
    rng = np.random.default_rng(1)
    for case in range(60):
        lengths = rng.integers(1, [3, 30, 200, 3000][case % 4], rng.integers(1, 60))
        plan = Documents.of(lengths)
        num = int(lengths.sum())
        assert sum(n for n, _ in plan.groups) == len(lengths)
        assert plan.position_ids[0].tolist() == [i for n in lengths for i in range(n)]
        if plan.to_padded is None:
            assert sum(n * length for n, length in plan.groups) == num
            continue
        assert len(plan.to_padded) <= 2 * num
        assert plan.to_padded[plan.to_row].tolist() == list(range(num))
        document = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))
        slot = 0
        for number, length in plan.groups:  # every padded line holds one document only
            for _ in range(number):
                assert len(set(document[plan.to_padded[slot : slot + length]].tolist())) == 1
                slot += length


def test_sliding_window_layers(tmp_path):
    folder = make_model(tmp_path / "m", use_sliding_window=True, sliding_window=16, max_window_layers=1)
    model, plain = (student.load_model(folder, device="cpu", attention=a) for a in ("dasd_packed", "sdpa"))
    assert "sliding_attention" in model.config.layer_types
    data = row(60, 12, 45)
    packed = logprobs.target_logprobs(model, data.ids, data.doc_lengths)
    np.testing.assert_allclose(packed, full_logprobs(plain, data), atol=1e-5)


def test_a_model_with_another_attention_is_refused(plain):
    with pytest.raises(TrainError, match="attention 'sdpa', not 'dasd_packed'"):
        logprobs.target_logprobs(plain, np.arange(4), [2, 2])


def test_lengths_that_do_not_add_up_are_refused(model):
    with pytest.raises(TrainError, match="documents of 5 tokens in a row of 4"):
        logprobs.target_logprobs(model, np.arange(4), [2, 3])


def test_no_model_in_the_folder(tmp_path):
    with pytest.raises(ConfigError, match="cannot be loaded as a language model"):
        student.load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no_such_kind"}')
    with pytest.raises(ConfigError, match=str(tmp_path)):
        student.load_model(tmp_path)
    with pytest.raises(ConfigError, match=str(tmp_path)):
        student.model_spec(tmp_path)


def test_model_without_weights_is_refused(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="cannot be loaded"):
        student.load_model(tmp_path / "m")


def test_unknown_target_module_names_those_that_exist(tiny):
    method = Lora(kind="lora", target_modules=["q_proj", "qkv_proj"])
    with pytest.raises(ConfigError, match=r"target_modules.*no layer 'qkv_proj'; it has down_proj, .*q_proj"):
        trainable.load_trainable(tiny, method, device="cpu")


def fit(model, data, steps=30):
    """Train what is trainable on one row; return the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = logprobs.loss_sum(model, data.ids, data.loss_mask, data.doc_lengths) / data.loss_mask.sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("method", [LORA, QLORA], ids=["lora", "qlora"])
def test_adapter_trains_and_merges_into_the_same_logits(tiny, tmp_path, method):
    from peft import PeftModel

    data = row(40, 50, 33)
    torch.manual_seed(1)
    model = trainable.load_trainable(tiny, method, device="cpu")
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 for p in trained)
    assert sum(p.numel() for p in trained) < 0.3 * sum(p.numel() for p in model.parameters())
    losses = fit(model, data)
    assert losses[-1] < 0.7 * losses[0]

    gap = export.export(model, method, tiny, tmp_path, data)
    assert gap < 1e-3
    base = student.load_model(tiny, device="cpu", attention="sdpa", four_bit=method.kind == "qlora")
    base = base.dequantize() if method.kind == "qlora" else base
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.from_numpy(data.ids[:40])[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)
    assert getattr(merged.config, "quantization_config", None) is None


def test_qlora_gradient_is_right_after_an_eval_forward(tiny):
    """On CPUs with AVX512-BF16 an eval forward repacks the weights, and gradients after it are wrong."""
    data = row(40, 50)

    def gradient(model):
        logprobs.loss_sum(model, data.ids, data.loss_mask, data.doc_lengths).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    def build(method):
        torch.manual_seed(1)
        return trainable.load_trainable(tiny, method, device="cpu")

    fresh, used = build(QLORA), build(QLORA)
    used.eval()
    logprobs.target_logprobs(used, data.ids, data.doc_lengths)
    used.train()
    expected = gradient(fresh)
    torch.testing.assert_close(gradient(used), expected, rtol=0, atol=0)
    dequantised = build(LORA)
    whole = student.load_model(tiny, device="cpu", four_bit=True).dequantize().state_dict()
    own = logprobs.causal_model(dequantised).state_dict()
    for name, weight in whole.items():
        own[name.replace("_proj.weight", "_proj.base_layer.weight")].copy_(weight)
    assert float(torch.cosine_similarity(gradient(dequantised), expected, dim=0)) > 0.9999


def test_saved_model_keeps_tokenizer_dtype_and_weights(tmp_path):
    source = make_model(tmp_path / "source", dtype="bfloat16")
    (source / "README.md").write_text("not part of the model")
    model = trainable.load_trainable(source, Full(), device="cpu")
    assert student.is_float32(model)
    data = row(30)
    fit(model, data, steps=3)
    gap = export.export(model, Full(), source, tmp_path / "out", data)
    assert 0 < gap < 0.1  # rounding to bfloat16
    saved = tmp_path / "out" / "model"
    assert (saved / "tokenizer.json").read_text() == "{}"
    assert (saved / "chat_template.jinja").exists() and not (saved / "README.md").exists()
    assert json.loads((saved / "config.json").read_text())["dtype"] == "bfloat16"
    again = transformers.AutoModelForCausalLM.from_pretrained(saved)
    assert again.dtype == torch.bfloat16
    assert "attn_implementation" not in (saved / "config.json").read_text()
    trained = model.to(torch.bfloat16).state_dict()
    torch.testing.assert_close(again.state_dict(), trained, rtol=0, atol=0)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["model"]


def test_saving_replaces_what_a_killed_run_left(model, tiny, tmp_path):
    for name in ("model", "model.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half.safetensors").write_text("x")
    export.save_model(model, tmp_path / "model", tiny)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert not (tmp_path / "model" / "half.safetensors").exists()


def test_the_stage_is_imported_without_torch():
    code = (
        "import sys, dasd_lite.stages.train; print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    )
    path = str(Path(student.__file__).parents[2])
    found = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"
