"""transformers and vLLM load what train exports, and get the same model from it.

As a program, `python test_export.py JOBS ANSWERS`, this file is the side of vLLM: a process of its own, because vLLM
leaves threads and settings that should not affect other tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

METHODS = ("full", "lora", "qlora")
RANK = 20  # no power of two, and over the 16 that vLLM allows by default
VOCAB, NUM_NEW, NUM_TOP = 440, 24, 8
UNSURE = 1e-3  # nats between the two likeliest tokens below which two readers may choose differently


# --- the side of vLLM: one engine after another -------------------------------------------------------


def read_in_vllm(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Let each model, or each base with its adapter, answer greedily."""
    import gc

    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    gc.freeze()  # vLLM collects garbage often, half a second each time for what its import created
    # Not `prompt_logprobs`: with an adapter they crash vLLM 0.32, or ignore it in the head (its issue 16668).
    greedy = SamplingParams(temperature=0.0, max_tokens=NUM_NEW, logprobs=NUM_TOP, detokenize=False)
    answers = []
    for job in jobs:
        options: dict[str, Any] = {"enable_lora": True, "max_lora_rank": 32} if job["adapter"] else {}
        options |= {"max_model_len": 512, "max_num_seqs": 8, "num_gpu_blocks_override": 64, "enforce_eager": True}
        engine = LLM(job["model"], dtype="float32", **options)
        lora = LoRARequest("trained", 1, job["adapter"]) if job["adapter"] else None
        outputs = engine.chat(job["questions"], greedy, lora_request=lora, use_tqdm=False)
        texts: Any = [{"prompt_token_ids": ids} for ids in job["texts"]]
        outputs += engine.generate(texts, greedy, lora_request=lora, use_tqdm=False)
        firsts: Any = [output.outputs[0] for output in outputs]
        top = [[[(token, at.logprob) for token, at in place.items()] for place in first.logprobs] for first in firsts]
        prompts: Any = [output.prompt_token_ids for output in outputs]
        answers.append(
            {"prompts": list(map(list, prompts)), "new": [list(first.token_ids) for first in firsts], "top": top}
        )
        engine.llm_engine.engine_core.shutdown()
    return answers


if __name__ == "__main__":
    answered = read_in_vllm(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(answered))
    sys.stdout.flush()
    os._exit(0)  # its threads may keep the interpreter from exiting


# --- the side of transformers, and what is compared -----------------------------------------------------


@dataclass
class Read:
    """Greedy answers of one reader's model."""

    prompts: list[list[int]]
    new: list[list[int]]
    logprobs: list[npt.NDArray[np.float32]]
    """[new tokens, vocabulary] of each answer; NaN where the reader returned none."""


def from_vllm(answer: dict[str, Any]) -> Read:
    logprobs = []
    for top in answer["top"]:
        table = np.full((len(top), VOCAB), np.nan, dtype=np.float32)
        for place, entries in enumerate(top):
            for token, logprob in entries:
                table[place, token] = logprob
        logprobs.append(table)
    return Read(answer["prompts"], answer["new"], logprobs)


def read_in_transformers(model: Any, tokenizer: Any, questions: list[Any], texts: list[list[int]]) -> Read:
    import torch

    prompts = [tokenizer.apply_chat_template(q, add_generation_prompt=True, return_dict=False) for q in questions]
    read = Read([*prompts, *texts], [], [])
    for ids in read.prompts:
        prompt = torch.tensor([ids])
        text = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=NUM_NEW
        )
        with torch.no_grad():  # one plain forward pass, without the cache of generate
            logprobs = model(input_ids=text).logits[0, len(ids) - 1 : -1].float().log_softmax(-1)
        read.new.append(text[0, len(ids) :].tolist())
        read.logprobs.append(logprobs.numpy())
    return read


def difference(one: Read, other: Read) -> float:
    """Return the largest difference of a log-probability, up to the first token at which the two differ.

    They may differ only where the two likeliest tokens of `one` have almost the same probability.
    """
    assert one.prompts == other.prompts
    gaps, compared = [], 0
    for a, b, x, y in zip(one.new, other.new, one.logprobs, other.logprobs, strict=True):
        until = next((i for i, (m, n) in enumerate(zip(a, b, strict=False)) if m != n), None)
        if until is None:
            assert len(a) == len(b)
        else:
            best = np.sort(x[until])[-2:]
            assert best[1] - best[0] < UNSURE, f"token {until}: {a[until]}, {b[until]}"
        num = len(a) if until is None else until + 1
        gaps.append(float(np.nanmax(np.abs(x[:num] - y[:num]))))
        compared += num
    assert compared > 0.9 * sum(map(len, one.new))
    return max(gaps)


# --- training, and what each reader makes of it ---------------------------------------------------------


@dataclass
class Trained:
    """The base before training, and each reader's view of the merged model and of the adapter over the base."""

    before: Read
    model: list[Read]
    adapter: list[Read] = field(default_factory=list)


def untie(student: Path, folder: Path) -> Path:
    """Write the student with a head of its own, as larger models have it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(student)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 1.1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(student).save_pretrained(folder)
    return folder


def write_rows(folder: Path, student: Path, questions: list[dict[str, str]]) -> Path:
    """Pack a row of three documents each of questions with a made-up answer."""
    import pyarrow as pa

    from dasd_lite.chat.chat import Chat
    from dasd_lite.data.manifest import Identity
    from dasd_lite.data.records import ROW
    from dasd_lite.data.writer import ShardWriter

    chat, rows = Chat(student), []
    for i in range(0, len(questions) - 2, 3):
        row: dict[str, list[Any]] = {"ids": [], "loss_mask": [], "doc_lengths": [], "uids": []}
        for question in questions[i : i + 3]:
            answer = f"<think>\nIt must be {question['answer']}, as a look tells.</think>\nAnswer: {question['answer']}"
            ids, context = chat.example([{"role": "user", "content": question["prompt"]}], answer)
            row["ids"] += list(ids)
            row["loss_mask"] += [place >= context for place in range(len(ids))]
            row["doc_lengths"].append(len(ids))
            row["uids"].append(question["uid"])
        rows.append(row)
    with ShardWriter(folder, Identity("pack", 1, {}, {}), {"rows": ROW}) as writer:
        writer.write("rows", pa.RecordBatch.from_pylist(rows, schema=ROW))
        writer.publish({})
    return folder


def train_and_read(kind: str, student: Path, rows: Path, out: Path, read: dict[str, Any]) -> tuple[Trained, list[Any]]:
    """Train by one method; return what transformers reads, and the jobs for vLLM."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dasd_lite.config.train import TrainConfig
    from dasd_lite.model.load import load_model
    from dasd_lite.stages.train import train

    method = {"kind": kind} if kind == "full" else {"kind": kind, "rank": RANK, "alpha": 40}
    config = TrainConfig.model_validate({"method": method, "epochs": 2, "learning_rate": 3e-3, "grad_accum_steps": 1})
    train(rows, student, config, out=out, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    base = load_model(student, attention="sdpa", four_bit=kind == "qlora")
    base = base.dequantize() if kind == "qlora" else base
    trained = Trained(read_in_transformers(base, tokenizer, **read), [])
    model = AutoModelForCausalLM.from_pretrained(out / "model", attn_implementation="sdpa")
    trained.model.append(read_in_transformers(model, tokenizer, **read))
    jobs = [{"model": str(out / "model"), "adapter": None, **read}]
    if kind != "full":
        if kind == "qlora":
            student = out.with_name("dequantized")
            base.save_pretrained(student)
            tokenizer.save_pretrained(student)
        trained.adapter.append(
            read_in_transformers(PeftModel.from_pretrained(base, out / "adapter"), tokenizer, **read)
        )
        jobs.append({"model": str(student), "adapter": str(out / "adapter"), **read})
    return trained, jobs


@pytest.fixture(scope="module")
def trained(vllm_installed: None, demo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """Train by each method, and let transformers and vLLM read the results."""
    folder = tmp_path_factory.mktemp("export")
    students = {"full": demo / "student", "lora": untie(demo / "student", folder / "untied"), "qlora": demo / "student"}
    questions = [json.loads(line) for line in (demo / "heldout.jsonl").read_text().splitlines()[:29]]
    rows = write_rows(folder / "rows", demo / "student", questions[5:])
    rng = np.random.default_rng(0)
    read = {
        "questions": [[{"role": "user", "content": question["prompt"]}] for question in questions[:5]],
        "texts": [rng.integers(3, VOCAB, size=num).tolist() for num in (1, 40, 300)],
    }
    by_kind, jobs = {}, []
    for kind in METHODS:
        by_kind[kind], more = train_and_read(kind, students[kind], rows, folder / kind, read)
        jobs += more
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, __file__, folder / "jobs.json", folder / "answers.json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answers = iter(json.loads((folder / "answers.json").read_text()))
    for one in by_kind.values():
        one.model.append(from_vllm(next(answers)))
        if one.adapter:
            one.adapter.append(from_vllm(next(answers)))
    return by_kind


@pytest.mark.parametrize("kind", METHODS)
def test_training_changes_what_is_read(trained: dict[str, Trained], kind: str) -> None:
    """Otherwise a reader that ignores the adapter would pass below. The first new token follows the same text."""
    pairs = zip(trained[kind].before.logprobs, trained[kind].model[0].logprobs, strict=True)
    assert max(float(np.abs(before[0] - after[0]).max()) for before, after in pairs) > 0.2


@pytest.mark.parametrize("kind", METHODS)
def test_transformers_and_vllm_read_the_same_model(trained: dict[str, Trained], kind: str) -> None:
    in_transformers, in_vllm = trained[kind].model
    assert difference(in_transformers, in_vllm) < 1e-3


@pytest.mark.parametrize("reader", ["transformers", "vllm"])
@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_the_adapter_over_its_base_is_the_merged_model(trained: dict[str, Trained], kind: str, reader: str) -> None:
    adapter = trained[kind].adapter[reader == "vllm"]
    assert difference(trained[kind].model[0], adapter) < 2e-3


# --- other architectures --------------------------------------------------------------------------------

# Those of tests/model/zoo.py that vLLM's build for CPUs runs too, with heads of 32, the smallest that it takes.
WIDE = {"hidden_size": 128, "head_dim": 32}
IN_VLLM: dict[str, dict[str, Any]] = {
    "llama": WIDE,
    "llama_tied": WIDE,
    "mistral_window": WIDE,
    "mixtral": WIDE,
    "qwen2": {"hidden_size": 128},
    "qwen2_moe": {"hidden_size": 128},
    "qwen3": WIDE,
    "qwen3_moe": WIDE,
    "gemma3": {**WIDE, "query_pre_attn_scalar": 32},
    "phi3": {"hidden_size": 128},
    "glm4": WIDE,
    "smollm3": {"hidden_size": 128},
    "olmo2": {"hidden_size": 128},
    "olmo3": {"hidden_size": 128},
    "exaone4": {"hidden_size": 128},
    "granite": {"hidden_size": 128},
    "opt": {"hidden_size": 128, "word_embed_proj_dim": 128},
    "gpt2": {"n_embd": 128},
}


@pytest.mark.slow
def test_transformers_and_vllm_read_the_same_model_of_every_architecture(
    vllm_installed: None, demo: Path, tmp_path: Path
) -> None:
    from tests.model.zoo import build, save

    questions = [json.loads(line) for line in (demo / "heldout.jsonl").read_text().splitlines()[:11]]
    rows = write_rows(tmp_path / "rows", demo / "student", questions[5:])
    read = {"questions": [[{"role": "user", "content": q["prompt"]}] for q in questions[:3]], "texts": [[5] * 9]}
    models, jobs = {}, []
    for name, options in IN_VLLM.items():
        student = save(build(name, **options), tmp_path / name / "student")
        kind = "full" if len(models) % 2 else "lora"
        models[name], more = train_and_read(kind, student, rows, tmp_path / name / "train", read)
        jobs.append(more[0])
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, __file__, tmp_path / "jobs.json", tmp_path / "answers.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    answers = json.loads((tmp_path / "answers.json").read_text())
    gaps = {n: difference(m.model[0], from_vllm(a)) for (n, m), a in zip(models.items(), answers, strict=True)}
    assert max(gaps.values()) < 2e-3, gaps
