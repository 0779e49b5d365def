"""Every architecture through score, select, pack, train and export, by each method, read back by transformers.

Right is: the loss of the first step is that of each document alone in the model's own eager attention, and the exported
model is the trained one. A sample runs by default, all of them where slow tests do.
"""

import numpy as np
import pyarrow.parquet as pq
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

from tests.model.zoo import APART, PACKED, build, save

import dasd_lite as dl
from dasd_lite.data.manifest import read_manifest
from dasd_lite.data.metrics import read_metrics
from dasd_lite.errors import DasdError

METHODS = {
    "full": dl.Full(),
    "lora": dl.Lora(kind="lora", rank=4, alpha=8),
    "qlora": dl.Lora(kind="qlora", rank=4, alpha=8),
}
SAMPLE = {
    ("llama", "qlora"),
    ("qwen3_moe", "full"),
    ("qwen3_5", "lora"),
    ("gemma3", "full"),
    ("granite", "lora"),
    ("lfm2", "full"),
    ("phi3_longrope", "lora"),
    ("deepseek_v3", "qlora"),
}
REFUSED = {("mamba", "qlora"): "4 bits", ("falcon", "qlora"): "leaves in 16 bits"}
"""Methods that an architecture rules out, with a word of the reason."""
CASES = [
    pytest.param(name, method, marks=() if (name, method) in SAMPLE else pytest.mark.slow)
    for name in [*PACKED, *APART]
    for method in METHODS
]


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory, demo):
    """Answers of the demo's teacher, of 60 to 200 tokens with their questions."""
    prompts = dl.read_prompts(demo / "train.jsonl", limit=6)
    teacher = dl.Transformers(model=str(demo / "teacher"))
    return dl.sample(
        prompts, teacher, temperature=0.6, num_samples=2, max_tokens=160, out=tmp_path_factory.mktemp("zoo") / "sample"
    )


def loss_alone(folder, rows, method):
    """−log p of the target tokens, each document by itself in eager attention."""
    options = {"attn_implementation": "eager", "dtype": torch.float32}
    if method == "qlora":
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    for module in plain.modules():  # see model/load.py
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    losses = []
    for row in rows:
        edges = np.cumsum(row["doc_lengths"])[:-1]
        pairs = zip(np.split(np.array(row["ids"]), edges), np.split(np.array(row["loss_mask"]), edges), strict=True)
        for ids, mask in pairs:
            tokens = torch.from_numpy(ids.astype(np.int64))
            with torch.no_grad():
                logprobs = plain(input_ids=tokens[None], use_cache=False).logits[0].float().log_softmax(-1)
            losses.append(-logprobs[:-1].gather(1, tokens[1:, None])[:, 0].numpy()[mask[1:]])
    return float(np.concatenate(losses).mean())


@pytest.mark.parametrize(("name", "method"), CASES)
def test_every_architecture_learns_what_its_documents_say_alone(name, method, rollouts, tmp_path):
    # Documents are short of the original positions, so its factors are the short ones where they are served alone.
    context = 600 if name == "phi3_longrope" else None
    folder = save(build(name), tmp_path / "student")
    student = dl.Transformers(model=str(folder), dtype="float32", max_model_len=context)
    scores = dl.score(rollouts, student, out=tmp_path / "score")
    kept = dl.select(
        rollouts, student, scores=scores, rule="likelihood", keep=1, out=tmp_path / "select", require_think=False
    )
    packed = dl.pack(kept, seq_len=512, out=tmp_path / "pack")
    rows = [row for file in sorted(packed.folder.glob("rows*.parquet")) for row in pq.read_table(file).to_pylist()]
    assert max(len(row["doc_lengths"]) for row in rows) > 1

    def train():
        options = {"epochs": 2, "learning_rate": 1e-3, "grad_accum_steps": len(rows), "monitor_questions": 0}
        return dl.train(packed, student, method=METHODS[method], out=tmp_path / "train", **options)

    if (name, method) in REFUSED:  # before anything is sampled by check, see tests/run
        with pytest.raises(DasdError, match=REFUSED[name, method]):
            train()
        return
    trained = train()
    steps = list(read_metrics(trained.folder / "metrics.jsonl"))
    assert steps[0]["loss"] == pytest.approx(loss_alone(folder, rows, method), abs=5e-6)
    assert steps[1]["loss"] < steps[0]["loss"]
    assert read_manifest(trained.folder)["counts"]["export_gap_mean"] < 1e-4
    after = loss_alone(trained.folder / "model", rows, "full")
    assert after < steps[1]["loss"] + 1e-3  # two steps on
