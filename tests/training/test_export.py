"""The exported model: that it is the trained one, and what its folder has; and the trial before the first step."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.model import zoo
from tests.model.tiny import LORA, QLORA, random_model, random_row
from tests.rows import ADAPTER, QUICK, loss_sum, make_model, make_rows, write_rows

from dasd_lite.config.train import Full, Lora, TrainConfig
from dasd_lite.data.run_folder import RunFolder
from dasd_lite.errors import TrainError
from dasd_lite.model.architecture import architecture_of
from dasd_lite.model.load import is_float32, load_model
from dasd_lite.model.logprobs import causal_model
from dasd_lite.model.packed_check import comparison_row
from dasd_lite.stages.train import train
from dasd_lite.training import export
from dasd_lite.training.export import files, weights
from dasd_lite.training.trainable import load_trainable


@pytest.fixture(scope="module")
def random(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("model") / "random")


def fit(model, data, steps=30):
    """Train what is trainable on one row; return the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = loss_sum(model, data.ids, data.loss_mask, data.doc_lengths) / data.loss_mask.sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("method", [LORA, QLORA], ids=["lora", "qlora"])
def test_adapter_trains_and_merges_into_the_same_logits(random, tmp_path, method):
    from peft import PeftModel

    data = random_row(40, 50, 33)
    torch.manual_seed(1)
    model = load_trainable(random, method, device="cpu")
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 for p in trained)
    assert sum(p.numel() for p in trained) < 0.3 * sum(p.numel() for p in model.parameters())
    losses = fit(model, data)
    assert losses[-1] < 0.7 * losses[0]

    gap = export.export(model, method, random, tmp_path, data)
    assert gap.mean <= gap.maximum < 1e-3
    modules = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert len(modules) > 1 and modules == sorted(modules)  # a set's order differs from process to process
    base = load_model(random, device="cpu", attention="sdpa", four_bit=method.kind == "qlora")
    base = base.dequantize() if method.kind == "qlora" else base
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.from_numpy(data.ids[:40])[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)
    assert getattr(merged.config, "quantization_config", None) is None


def test_saved_model_keeps_tokenizer_dtype_and_weights(tmp_path):
    source = random_model(tmp_path / "source", dtype="bfloat16")
    (source / "README.md").write_text("not part of the model")
    model = load_trainable(source, Full(), device="cpu")
    assert is_float32(model)
    data = random_row(30)
    fit(model, data, steps=3)
    trained = {name: p.detach().to(torch.bfloat16) for name, p in model.named_parameters()}
    gap = export.export(model, Full(), source, tmp_path / "out", data)
    assert 0 < gap.mean < gap.maximum < 0.1  # rounding to bfloat16
    saved = tmp_path / "out" / "model"
    assert (saved / "tokenizer.json").read_text() == "{}"
    assert (saved / "chat_template.jinja").exists() and not (saved / "README.md").exists()
    assert json.loads((saved / "config.json").read_text())["dtype"] == "bfloat16"
    again = transformers.AutoModelForCausalLM.from_pretrained(saved)
    assert again.dtype == torch.bfloat16
    assert "attn_implementation" not in (saved / "config.json").read_text()
    torch.testing.assert_close(again.state_dict(), trained, rtol=0, atol=0)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["model"]


def test_saving_replaces_what_a_killed_run_left(random, tmp_path):
    for name in ("model", "model.rejected", "export.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half.safetensors").write_text("x")
    export.export(load_trainable(random, Full(), device="cpu"), Full(), random, tmp_path, random_row(20))
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert not (tmp_path / "model" / "half.safetensors").exists()


def test_a_model_that_is_not_what_was_trained_is_set_aside(tiny, packed, tmp_path, monkeypatch):
    config = TrainConfig(**QUICK | {"epochs": 4, "method": ADAPTER, "learning_rate": 3e-2})
    right = train(packed, tiny, config, out=tmp_path / "right")
    assert right.counts["export_gap_mean"] <= right.counts["export_gap_max"] < 1e-3

    monkeypatch.setattr(weights, "_with_adapter", lambda weight, layer, dtype: weight.to(dtype))
    out = tmp_path / "wrong"
    with pytest.raises(TrainError, match=r"wrong: the saved model's log-probabilities are off by \d\.\d+ nats a token"):
        train(packed, tiny, config, out=out)
    assert not (out / "manifest.json").exists() and not (out / "model").exists()
    assert (out / "model.rejected" / "model.safetensors").exists() and (out / "adapter.rejected").exists()
    monkeypatch.undo()
    train(packed, tiny, config, out=out)  # from the last checkpoint
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == ["adapter", "model"]


def test_all_files_have_the_same_permissions(tiny, packed, tmp_path):
    """safetensors would let only their owner read the weights."""
    model = train(packed, tiny, TrainConfig(**QUICK), out=tmp_path / "out", max_steps=1)
    assert len({path.stat().st_mode for path in model.path.iterdir()}) == 1


# --- architectures ------------------------------------------------------------------------------------

LATENT = {"head_dim": 8, "num_key_value_heads": 4}  # without which transformers does not run DeepSeek
MIXTURES = {"qwen3_moe", "mixtral", "qwen2_moe", "phimoe", "deepseek_v3", "granite_moe", "qwen3_next", "llama4"}
CANNOT = {("falcon", "qlora"), ("mamba", "qlora")}  # have nothing that could be in 4 bits
SAMPLE = ["llama_tied", "qwen3_moe", "gpt2", "deepseek_v3"]


def logits(model):
    model.eval()
    causal = causal_model(model)
    causal.set_attn_implementation(architecture_of(causal.config).own_attention)
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 60)[None], use_cache=False).logits


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=() if name in SAMPLE else pytest.mark.slow)
        for name in sorted(zoo.PACKED | zoo.APART)
        for kind in ("full", "lora", "qlora")
        if (name, kind) not in CANNOT
    ],
)
def test_every_architecture_is_saved_as_it_was_trained(name, kind, tmp_path):
    source = zoo.save(zoo.build(name, **LATENT if name == "deepseek_v3" else {}), tmp_path / "source")
    method = Full()
    if kind != "full":
        parts = {"experts": "adapted", "router": "adapted"} if name in MIXTURES and kind == "lora" else {}
        method = Lora(kind=kind, rank=4, **parts)
    model = load_trainable(source, method, device="cpu", dtype="float32")
    export.try_export(model, method, source, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.02)
    export._save(model, method, source, tmp_path / "saved", export.Ranks(), frozenset(), False)
    saved = load_model(tmp_path / "saved" / "model", dtype="float32", device="cpu")
    before, after = weights.SourceWeights(source), weights.SourceWeights(tmp_path / "saved" / "model")
    assert before.names == after.names
    trained = logits(model)
    torch.testing.assert_close(logits(saved), trained, rtol=1e-4, atol=1e-4 * float(trained.abs().max()))


def test_a_model_with_a_vision_tower_keeps_it(tmp_path):
    text = dict(zoo.HEADS, sliding_window=16, query_pre_attn_scalar=16, vocab_size=97)
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=95,
        boi_token_index=93,
        eoi_token_index=94,
    )
    torch.manual_seed(0)
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "preprocessor_config.json").write_text("{}")
    for method in (Full(), LORA):
        model = load_trainable(tmp_path / "source", method, device="cpu")
        assert not [n for n, p in model.named_parameters() if "lora" in n and "vision" in n]
        export.try_export(model, method, tmp_path / "source", tmp_path / "out")
        export.export(model, method, tmp_path / "source", tmp_path / method.kind, random_row(20, 12))
        saved = tmp_path / method.kind / "model"
        assert (saved / "preprocessor_config.json").exists()
        before, after = weights.SourceWeights(tmp_path / "source"), weights.SourceWeights(saved)
        assert before.names == after.names
        (tower,) = [n for n in after.names if n.endswith("patch_embedding.weight")]
        assert torch.equal(before.read(tower), after.read(tower))


@pytest.mark.parametrize("method", [Full(), LORA, QLORA], ids=["full", "lora", "qlora"])
def test_a_language_model_within_a_larger_one_takes_the_rest_along(tmp_path, method):
    """transformers loads Qwen3.5 without its vision tower; its file has layers for speculative decoding as well."""
    from safetensors.torch import load_file, save_file

    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
    config = transformers.Qwen3_5Config(text_config={**zoo.HEADS, **zoo.LINEAR}, vision_config=vision)
    torch.manual_seed(0)
    source = tmp_path / "source"
    transformers.Qwen3_5ForConditionalGeneration(config).save_pretrained(source)
    tensors = load_file(source / "model.safetensors") | {"mtp.fc.weight": torch.randn(4, 4)}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    model = load_trainable(source, method, device="cpu")
    export.try_export(model, method, source, tmp_path / "out")
    export._save(model, method, source, tmp_path / "saved", export.Ranks(), frozenset(), False)
    saved = load_file(tmp_path / "saved" / "model" / "model.safetensors")
    assert saved.keys() == tensors.keys()
    same = {name: t for name, t in tensors.items() if "language_model" not in name}
    torch.testing.assert_close({name: saved[name] for name in same}, same, rtol=0, atol=0)
    own, new = (json.loads((f / "config.json").read_text()) for f in (source, tmp_path / "saved" / "model"))
    assert {name: new[name] for name in own if name != "text_config"} == {
        n: v for n, v in own.items() if n != "text_config"
    }
    assert new["text_config"]["rope_theta"] == own["text_config"]["rope_parameters"]["rope_theta"]
    transformers.Qwen3_5ForConditionalGeneration.from_pretrained(tmp_path / "saved" / "model")


# --- the trial before the first step --------------------------------------------------------------------


def test_what_a_library_says_is_one_line_before_the_first_step(tiny, packed, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise ValueError("GenerationConfig is invalid:\n- `temperature`")

    monkeypatch.setattr(export, "write_files", fails)
    for method in ({"kind": "full"}, ADAPTER):
        with pytest.raises(TrainError) as raised:
            train(packed, tiny, TrainConfig(**QUICK | {"method": method}), out=tmp_path / "out")
        assert str(raised.value) == f"{tiny}: the student cannot be saved: ValueError: GenerationConfig is invalid:"
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", [Full(), LORA, QLORA], ids=["full", "lora", "qlora"])
def test_a_weight_that_would_be_saved_otherwise_is_seen_before_the_first_step(random, tmp_path, monkeypatch, method):
    model = load_trainable(random, method, device="cpu")
    final = weights._Trained.final

    def turned(self, whole, dtype):
        weight = final(self, whole, dtype)
        return weight.flip(0) if weight.shape == (64, 32) else weight

    monkeypatch.setattr(weights._Trained, "final", turned)
    with pytest.raises(
        TrainError, match=r"saved and read back, the student's weight model\.layers.* is not what it was"
    ):
        export.try_export(model, method, random, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_trial_of_a_continued_adapter_compares_every_weight_with_its_base(random, tmp_path, monkeypatch):
    trained = load_trainable(random, LORA, device="cpu")
    fit(trained, random_row(30), steps=3)
    trained.save_pretrained(tmp_path / "adapter")
    model = load_trainable(random, LORA, device="cpu", adapter=tmp_path / "adapter")
    scalings = [module.scaling["default"] for module in model.modules() if hasattr(module, "lora_A")]
    export.try_export(model, LORA, random, tmp_path / "out")
    assert [m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")] == scalings and all(scalings)
    final = weights._Trained.final
    for shape in ((97, 32), (64, 32)):  # of the embeddings, which have no adapter, and of a layer that has one
        monkeypatch.setattr(
            weights._Trained,
            "final",
            lambda self, whole, dtype, s=shape: (
                final(self, whole, dtype).flip(0) if whole.shape == s else final(self, whole, dtype)
            ),
        )
        with pytest.raises(TrainError, match="is not what it was"):
            export.try_export(model, LORA, random, tmp_path / "out")


def test_a_trial_writes_where_clean_looks_for_what_a_kill_left(random, tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(export, "_check_trial", lambda *_: found.extend(RunFolder(tmp_path).export_trials))
    export.try_export(load_trainable(random, LORA, device="cpu"), LORA, random, tmp_path / "low" / "train")
    assert found == [tmp_path / "low" / ".train.export"]
    assert not RunFolder(tmp_path).export_trials


def test_a_weight_that_was_not_written_is_no_zeros(random, tmp_path, monkeypatch):
    whole = export.whole_weights
    for end in (-1, 2):
        monkeypatch.setattr(export, "whole_weights", lambda model, end=end: iter(list(whole(model))[:end]))
        with pytest.raises(TrainError, match=r"the weight .+ was not saved, nor any after it"):
            export.try_export(load_trainable(random, Full(), device="cpu"), Full(), random, tmp_path / "out")


def test_memory_that_ran_out_under_another_name_is_not_the_fault_of_the_student(random, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(export, "write_files", fails)
    with pytest.raises(RuntimeError, match=r"^CUDA error: out of memory$"):
        export.try_export(load_trainable(random, Full(), device="cpu"), Full(), random, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [QUICK, QUICK | {"method": ADAPTER}], ids=["full", "lora"])
@pytest.mark.parametrize(
    "generation", [{"do_sample": False, "temperature": 0.9}, {"top_p": 0.9, "eos_token_id": [1, 2]}]
)
def test_a_generation_config_that_transformers_would_not_write_is_kept(tmp_path, packed, generation, options):
    student = make_model(tmp_path / "student")
    (student / "generation_config.json").write_text(json.dumps(generation))
    model = train(packed, student, TrainConfig(**options), out=tmp_path / "out", max_steps=1)
    saved = json.loads((model.path / "generation_config.json").read_text())
    assert {name: saved[name] for name in generation if name != "eos_token_id"} == {
        name: value for name, value in generation.items() if name != "eos_token_id"
    }


@pytest.mark.parametrize("method", [{"kind": "full"}, ADAPTER], ids=["full", "lora"])
def test_a_head_of_its_own_where_the_configuration_says_tied(tmp_path, packed, method):
    student = make_model(tmp_path / "student", tie_word_embeddings=False)
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    model = train(packed, student, TrainConfig(**QUICK | {"method": method}), out=tmp_path / "out")
    assert model.counts["export_gap_max"] < 1e-3
    assert json.loads((model.path / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_quantized_student_is_refused(tmp_path, packed):
    student = make_model(tmp_path / "student")
    config = json.loads((student / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (student / "config.json").write_text(json.dumps(config))
    with pytest.raises(TrainError, match=r"student is already quantized \(bitsandbytes, 4 bits\); name the model that"):
        train(packed, student, TrainConfig(**QUICK), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- files for others -----------------------------------------------------------------------------------


def test_the_number_formats_are_those_of_the_files(tmp_path):
    """The configuration may say another one, and single tensors may have their own."""
    from safetensors.torch import load_file, save_file

    source = random_model(tmp_path / "source", dtype="bfloat16")
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    for binary in (False, True):
        if binary:
            torch.save(tensors, source / "pytorch_model.bin")
            (source / "model.safetensors").unlink()
        model = load_trainable(source, LORA, device="cpu")
        out = tmp_path / str(binary)
        export.try_export(model, LORA, source, out)
        export.export(model, LORA, source, out, random_row(30))
        saved = load_file(out / "model" / "model.safetensors")
        assert {name: t.dtype for name, t in saved.items()} == {name: t.dtype for name, t in tensors.items()}
        torch.testing.assert_close(saved, tensors, rtol=0, atol=0)
        config = json.loads((out / "model" / "config.json").read_text())
        assert config["dtype"] == config["torch_dtype"] == "bfloat16"


def test_a_whole_file_counts_and_not_the_index_beside_it(random, tmp_path):
    """As in transformers: left by a model that was saved in parts before."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(random, tmp_path / "source")
    source = tmp_path / "source"
    tensors = load_file(source / "model.safetensors")
    save_file({name: torch.zeros_like(t) for name, t in tensors.items()}, source / "old.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "old.safetensors")}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    found = weights.SourceWeights(source)
    assert all(torch.equal(found.read(name), tensors[name]) for name in found.names)
    export.try_export(load_trainable(source, Full(), device="cpu"), Full(), source, tmp_path / "out")


@pytest.mark.parametrize("binary", [False, True])
def test_a_tensor_that_cannot_be_saved_is_named_with_its_file(random, tmp_path, binary):
    from safetensors.torch import load_file, save_file

    shutil.copytree(random, tmp_path / "source")
    source = tmp_path / "source"
    tensors = load_file(source / "model.safetensors") | {"vision.weight": torch.ones(4, 4).to(torch.float8_e4m3fn)}
    (source / "model.safetensors").unlink()
    file = source / ("pytorch_model.bin" if binary else "model.safetensors")
    torch.save(tensors, file) if binary else save_file(tensors, file, {"format": "pt"})
    model = load_trainable(random, Full(), device="cpu")
    spelled = "float8_e4m3fn" if binary else "F8_E4M3"
    with pytest.raises(TrainError) as raised:
        export.try_export(model, Full(), source, tmp_path / "out")
    assert str(raised.value).startswith(f"{file}: the tensor vision.weight has the number format {spelled}, which")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(TrainError, match=f"^{file}: it cannot be read: "):
        export.try_export(model, Full(), source, tmp_path / "out")


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
OLD_FORM = {"rope_theta": 1e6, "rope_scaling": YARN, "torch_dtype": "float32"}


@pytest.mark.parametrize(
    ("own", "scaling"),
    [
        (OLD_FORM, YARN),
        (OLD_FORM | {"rope_scaling": {"type": "linear", "factor": 2.0}}, {"type": "linear", "factor": 2.0}),
        ({"rope_parameters": YARN | {"rope_theta": 1e6}, "dtype": "float32"}, YARN),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, None),
        ({"rope_theta": 1e6, "torch_dtype": "float32", "max_window_layers": 7, "something_else": [1]}, None),
    ],
)
def test_older_readers_find_rope_and_dtype_under_their_names(tmp_path, own, scaling):
    source = random_model(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config = {name: value for name, value in config.items() if name not in ("rope_parameters", "dtype")} | own
    (source / "config.json").write_text(json.dumps(config))
    model = load_trainable(source, Full(), device="cpu")
    export.export(model, Full(), source, tmp_path / "out", random_row(30))
    saved = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    assert {name: saved[name] for name in config} == config, "what the source had is kept"
    assert saved["rope_theta"] == 1e6 and saved["torch_dtype"] == saved["dtype"] == "float32"
    found = saved["rope_scaling"]
    assert found == scaling or (found["rope_type"], found["factor"]) == (scaling["rope_type"], scaling["factor"])
    read = [transformers.AutoConfig.from_pretrained(folder) for folder in (source, tmp_path / "out" / "model")]
    assert read[0].rope_parameters == read[1].rope_parameters == saved["rope_parameters"]


def test_every_file_of_the_source_is_kept(random, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(random, source)
    names = ["tokenizer.model", "special_tokens_map.json", "preprocessor_config.json", "chat_template.json"]
    names += ["modeling_my.py", "qwen.tiktoken", "vocab.json", "merges.txt", "additional_chat_templates/tools.jinja"]
    for name in names:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("{}")
    (source / "assets.json").mkdir()  # a folder, whatever it is called
    export.export(load_trainable(source, Full(), device="cpu"), Full(), source, tmp_path / "out", random_row(30))
    assert {name for name in names if (tmp_path / "out" / "model" / name).exists()} == set(names)


@pytest.mark.parametrize("listed", [1, 2, [1, 2]])
def test_the_end_token_is_in_all_configurations(demo, tmp_path, listed):
    """Also where generation_config.json, by which engines stop, lists it and the others do not."""
    source = tmp_path / "source"
    shutil.copytree(demo / "student", source)
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    end = next(token for token in tokenizer["added_tokens"] if token["id"] == 2)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": listed, "top_k": 20}))
    (source / "special_tokens_map.json").write_text('{"eos_token": {"content": "</s>", "lstrip": false}}')
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"eos_token_id": 1}))
    rows = make_rows(8)
    for row in rows:
        row["ids"] = [5 if i == 2 else i for i in row["ids"]]
        for length in np.cumsum(row["doc_lengths"]):
            row["ids"][length - 1] = 2
    out = train(write_rows(tmp_path / "rows", rows), source, TrainConfig(**QUICK), out=tmp_path / "out", max_steps=1)
    read = {path.name: json.loads(path.read_text()) for path in out.path.glob("*.json")}
    stops = 2 if listed == 2 else [1, 2]
    assert read["config.json"]["eos_token_id"] == read["generation_config.json"]["eos_token_id"] == stops
    assert read["generation_config.json"]["top_k"] == 20
    assert read["tokenizer_config.json"]["eos_token"] == end["content"]
    assert read["special_tokens_map.json"]["eos_token"] == {"content": end["content"], "lstrip": False}


def test_an_adapter_names_its_base_for_whoever_loads_it(tmp_path):
    def base(source):
        folder = tmp_path / "adapter"
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text('{"target_modules": ["v", "q"], "revision": null}')
        files.describe_adapter(folder, tmp_path / source)
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["target_modules"] == ["q", "v"]
        return config["base_model_name_or_path"], config["revision"]

    commit = "c1899de289a04d12100db370d81485cdf75e47ca"
    assert base(f"hub/models--Qwen--Qwen3-4B/snapshots/{commit}") == ("Qwen/Qwen3-4B", commit)
    assert base("run/low/train/model") == (str(tmp_path / "run" / "low" / "train" / "model"), None)
    assert base("students/mine") == (str(tmp_path / "students" / "mine"), None)


@pytest.mark.parametrize("start", ["merged", "adapter"])
def test_the_adapter_of_a_second_phase_loads_over_its_base_from_anywhere(tiny, packed, tmp_path, monkeypatch, start):
    from peft import AutoPeftModelForCausalLM

    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny, "student")
    config = TrainConfig(**QUICK | {"method": ADAPTER | {"start": start}})
    low = train(packed, "student", config, out="run/low/train")
    base, before = (low.path, None) if start == "merged" else ("student", "run/low/train/adapter")
    train(packed, base, config, out="run/high/train", adapter=before)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    train_folder = tmp_path / "run" / "high" / "train"
    adapted = AutoPeftModelForCausalLM.from_pretrained(train_folder / "adapter")
    named = adapted.peft_config["default"].base_model_name_or_path
    assert named == str(tmp_path / ("run/low/train/model" if start == "merged" else "student"))
    merged = transformers.AutoModelForCausalLM.from_pretrained(train_folder / "model")
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-4, atol=1e-4)


# --- memory -----------------------------------------------------------------------------------------------

MEASURED = """
import re, sys, threading, time
from pathlib import Path
import torch
from dasd_lite.config.train import Full, Lora
from dasd_lite.training import export
from dasd_lite.training.trainable import load_trainable

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10

source, out, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
method = Full() if kind == "full" else Lora(kind=kind, rank=8)
model = load_trainable(source, method, device="cpu", dtype="bfloat16" if kind != "full" else "float32")
before, highest, done = anonymous(), 0, False
def watch():
    global highest
    while not done:
        highest = max(highest, anonymous())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
export._save(model, method, source, out, export.Ranks(), frozenset(), False)
done = True
thread.join()
print(highest - before, sum(path.stat().st_size for path in out.glob("model/*.safetensors")))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora", "qlora"])
def test_saving_needs_little_memory_beside_the_model(tmp_path, kind):
    sizes = {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 6,
        "vocab_size": 16384,
        "head_dim": 128,
    }
    source = random_model(tmp_path / "source", dtype="bfloat16", **sizes)
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, source, tmp_path / "out", kind], capture_output=True, text=True, check=True
    )
    needed, size = map(int, done.stdout.split())
    assert size > 190e6
    assert needed < 150e6, "only single tensors; the largest is 16,384 × 1,024, 67 MB in float32"


@pytest.mark.parametrize("method", [Full(), LORA, QLORA], ids=lambda method: method.kind)
def test_rounding_to_the_format_of_the_student_is_no_fault_of_the_export(method, tmp_path, capsys):
    """A CPU trains in float32 what is saved in 16 bits: many small steps are rounded away, and that is said."""
    source = zoo.save(zoo.build("llama"), tmp_path / "source", "bfloat16")
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    row = comparison_row([rng.integers(3, 440, n) for n in (40, 30, 60)])
    model = load_trainable(source, method, device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * (3e-3 if method.kind == "full" else 0.05))
    gap = export.export(model, method, source, tmp_path / "out", row, dtype=torch.float32)
    assert (tmp_path / "out" / "model").is_dir() and not (tmp_path / "out" / "model.rejected").exists()
    assert ("saving in bfloat16" in capsys.readouterr().err) == (gap.mean > 0.05)
    assert gap.mean > 1e-3
