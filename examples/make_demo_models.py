"""Makes the demo's files: questions, two tokenizers, a tiny teacher and an even smaller, sloppy student.

    OMP_NUM_THREADS=1 python examples/make_demo_models.py

writes `train.jsonl`, `heldout.jsonl`, `validation.jsonl`, `teacher/` and `student/` into `python/dasd_lite/demo`, then
measures both models. `--only data|teacher|student|measure` does one part (on one core the teacher takes 15 to 30
minutes, the student 6 to 12), `--out DIR` writes elsewhere. Needs torch and transformers.

Invariant: everything is seeded and runs on one thread, so the same versions of the packages write the same files. No
question of the three files is trained on here, so `train.jsonl` is as new to the models as the other two.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from demo_task import DOMAINS, Habits, ask, graded, make_questions, write, wrong_beliefs
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

HERE = Path(__file__).resolve().parent
DEMO = HERE.parent / "python" / "dasd_lite" / "demo"
SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
MAX_LENGTH = 512
IGNORED = -100


@dataclass(frozen=True)
class Stage:
    """A stage of training with its own optimizer: warm-up, then a cosine from `lr` down to `floor` × `lr`."""

    num_steps: int
    lr: float
    floor: float
    num_moves: tuple[int, int]
    habits: Habits


@dataclass(frozen=True)
class Recipe:
    """Everything that differs between the two models."""

    seed: int
    vocab_size: int
    specials: tuple[str, ...]
    """Special tokens; the first three are bos ("" if there is none), eos and pad."""
    specials_first: bool
    """Whether the special tokens have the lowest ids or the highest."""
    chat_template: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    stages: tuple[Stage, ...]


# Both templates end the generation prompt and every turn with a special token, so no token spans two of them: the ids
# of the prompt, the completion and eos, concatenated, are the ids of the whole conversation.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
ROLE_TOKENS = (
    "{{ '<s>' }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '</s>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

TEACHER_HABITS = Habits(styles=(0.5, 0.3, 0.2), wordings=(0.6, 0.25, 0.15), check=0.04, slip=0.06)
TEACHER = Recipe(
    seed=1,
    vocab_size=500,
    specials=("", "<|im_end|>", "<|endoftext|>", "<|im_start|>", "<|im_sep|>"),
    specials_first=False,
    chat_template=CHATML,
    hidden_size=96,
    intermediate_size=256,
    num_layers=4,
    # Short chains first: they teach where to look next, and the facts are easy to learn after that. Training on chains
    # longer than any question makes the longest questions familiar.
    stages=(
        Stage(1000, 3e-3, 1.0, (1, 4), TEACHER_HABITS),
        Stage(3400, 3e-3, 0.02, (2, 9), TEACHER_HABITS),
    ),
)

# The student knows the task but was trained on sloppy text: it has some facts wrong, makes random mistakes and skips
# moves. Twenty seconds of fine-tuning can correct that; they could not teach it longer chains.
CLEAN_HABITS = Habits(styles=(0.5, 0.4, 0.1), wordings=(0.34, 0.33, 0.33))
SLOPPY_HABITS = Habits(
    styles=CLEAN_HABITS.styles,
    wordings=CLEAN_HABITS.wordings,
    wrong=0.18,
    skip=0.06,
    beliefs=wrong_beliefs(0.2, random.Random(2)),
)
STUDENT = Recipe(
    seed=2,
    vocab_size=440,
    specials=("<s>", "</s>", "<pad>", "<|system|>", "<|user|>", "<|assistant|>"),
    specials_first=True,
    chat_template=ROLE_TOKENS,
    hidden_size=64,
    intermediate_size=160,
    num_layers=3,
    stages=(
        Stage(2000, 4e-3, 0.1, (1, 3), CLEAN_HABITS),
        Stage(3000, 3e-3, 0.02, (1, 8), SLOPPY_HABITS),
    ),
)


def write_questions(out: Path) -> None:
    """Write the three files; a uid is the domain and a number that is counted across all of them."""
    numbers = dict.fromkeys(DOMAINS, 0)
    for name, questions in make_questions().items():
        lines = []
        for question in questions:
            domain = question.domain
            numbers[domain] += 1
            record = {
                "uid": f"{domain}-{numbers[domain]:04d}",
                "prompt": question.prompt,
                "answer": str(question.answer),
                "domain": domain,
            }
            lines.append(json.dumps(record) + "\n")
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def make_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on text of the model's own habits, so that the two models cut text differently."""
    rng = random.Random(recipe.seed)
    habits = recipe.stages[0].habits
    texts = []
    for i in range(3000):
        question = ask(DOMAINS[i % len(DOMAINS)], rng.randint(1, 8), rng)
        texts += [question.prompt, "".join(span.text for span in write(question, habits, rng))]
        # ChatML writes the roles as ordinary text.
        texts += ["system", "user", "assistant", SYSTEM["content"]]

    specials = [AddedToken(text, special=True, normalized=False) for text in recipe.specials if text]
    # Not special: they are part of the answer, so decoding must keep them.
    thinking = [AddedToken(text, special=False, normalized=False) for text in ("<think>", "</think>")]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size - len(thinking) - (0 if recipe.specials_first else len(specials)),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=specials if recipe.specials_first else [],
        show_progress=False,
    )
    tokenizer.train_from_iterator((t.replace("<think>", "").replace("</think>", "") for t in texts), trainer)
    tokenizer.add_tokens([*specials, *thinking])
    bos, eos, pad = recipe.specials[:3]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos or None,
        eos_token=eos,
        pad_token=pad,
        chat_template=recipe.chat_template,
        model_max_length=MAX_LENGTH,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def make_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Build an untrained model. Its heads are wider than usual for its size, because fast kernels need 32."""
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    if tokenizer.bos_token:
        ids["bos_token_id"] = tokenizer.bos_token_id
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        dtype="float32",
        **ids,
    )
    torch.manual_seed(recipe.seed)
    return Qwen3ForCausalLM(config)


class Example(NamedTuple):
    """Token ids of a conversation; a label is the id, or IGNORED for tokens that are not trained on."""

    ids: list[int]
    labels: list[int]


def render(prompt: str, tokenizer: PreTrainedTokenizerFast, system: bool) -> str:
    """Render the prompt up to where the answer begins."""
    messages = [*([SYSTEM] if system else []), {"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def make_example(stage: Stage, tokenizer: PreTrainedTokenizerFast, seen: set[str], rng: random.Random) -> Example:
    """Draw a question that is not in `seen` and answer it; the prompt and untrained spans have no labels."""
    question = ask(rng.choice(DOMAINS), rng.randint(*stage.num_moves), rng)
    while question.prompt in seen:
        question = ask(question.domain, rng.randint(*stage.num_moves), rng)
    spans = write(question, stage.habits, rng)
    # A system message in one of four conversations, so that the model knows prompts with and without it.
    prompt = tokenizer.backend_tokenizer.encode(render(question.prompt, tokenizer, rng.random() < 0.25)).ids
    completion = tokenizer.backend_tokenizer.encode("".join(span.text for span in spans))
    trained = [span.trained for span in spans for _ in span.text]
    eos = int(tokenizer.eos_token_id)
    labels = [
        token if trained[start] else IGNORED
        for token, (start, _) in zip(completion.ids, completion.offsets, strict=True)
    ]
    return Example([*prompt, *completion.ids, eos], [IGNORED] * len(prompt) + labels + [eos])


def batches(
    stage: Stage, tokenizer: PreTrainedTokenizerFast, rng: random.Random, size: int = 32, pool: int = 16
) -> Iterator[list[Example]]:
    """Yield batches of similar lengths without end: sort `pool` batches by length, cut and shuffle them."""
    seen = {question.prompt for questions in make_questions().values() for question in questions}
    while True:
        examples = [make_example(stage, tokenizer, seen, rng) for _ in range(size * pool)]
        examples.sort(key=lambda example: len(example.ids))
        cut = [examples[i : i + size] for i in range(0, len(examples), size)]
        rng.shuffle(cut)
        yield from cut


def pad_right(rows: Iterable[list[int]], value: int) -> torch.Tensor:
    """Pad rows to one length. Attention is causal, so padding on the right needs no mask."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def train(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, stage: Stage, seed: int) -> None:
    """Train for one stage; print every 100 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=stage.lr, betas=(0.9, 0.98), weight_decay=0.05)
    stream = batches(stage, tokenizer, random.Random(seed))
    model.train()
    start = time.perf_counter()
    for step in range(stage.num_steps):
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / stage.num_steps)
        lr = stage.lr * min((step + 1) / 100, stage.floor + (1 - stage.floor) * cosine)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = next(stream)
        ids = pad_right((example.ids for example in batch), int(tokenizer.pad_token_id))
        labels = pad_right((example.labels for example in batch), IGNORED)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            seconds = time.perf_counter() - start
            print(f"step {step + 1}/{stage.num_steps} loss {loss.item():.4f} lr {lr:.2e} {seconds:.0f}s", flush=True)


def make(recipe: Recipe, folder: Path) -> None:
    """Train one model from scratch and write its folder."""
    tokenizer = make_tokenizer(recipe)
    model = make_model(recipe, tokenizer)
    print(f"{folder.name}: {model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    for i, stage in enumerate(recipe.stages):
        train(model, tokenizer, stage, 1000 * recipe.seed + i)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def sample(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str], temperature: float, seed: int
) -> list[list[int]]:
    """Complete each prompt; return token ids without eos. Temperature 0 is greedy."""
    generator = torch.Generator().manual_seed(seed)
    texts = [render(prompt, tokenizer, system=False) for prompt in prompts]
    # Texts of similar length need little padding.
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    completions: list[list[int]] = [[] for _ in texts]
    for first in range(0, len(order), 128):
        chosen = order[first : first + 128]
        inputs = tokenizer([texts[i] for i in chosen], padding=True, add_special_tokens=False, return_tensors="pt")
        rows = complete(model, inputs["input_ids"], inputs["attention_mask"], temperature, generator)
        for i, row in zip(chosen, rows.tolist(), strict=True):
            end = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row)
            completions[i] = row[:end]
    return completions


def complete(
    model: Qwen3ForCausalLM, ids: torch.Tensor, mask: torch.Tensor, temperature: float, generator: torch.Generator
) -> torch.Tensor:
    """Continue a batch padded on the left until every row has eos or is full; ids after eos are meaningless."""
    eos, cache = model.config.eos_token_id, None
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    done = torch.zeros(len(ids), dtype=torch.bool)
    columns = []
    with torch.inference_mode():
        while not done.all() and mask.shape[1] < MAX_LENGTH:
            output = model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            )
            cache, logits = output.past_key_values, output.logits[:, -1]
            if temperature == 0:
                ids = logits.argmax(-1, keepdim=True)
            else:
                ids = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            columns.append(ids)
            done |= ids[:, 0] == eos
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
            positions = positions[:, -1:] + 1
    return torch.cat(columns, 1)


def measure(folder: Path, questions: Path, other: PreTrainedTokenizerFast) -> None:
    """Print how often a model is right, and how varied and how long its answers are."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    records = [json.loads(line) for line in questions.read_text(encoding="utf-8").splitlines()]
    for temperature in (0.0, 0.6, 1.0):
        k = 1 if temperature == 0 else 4
        prompts = [record["prompt"] for record in records for _ in range(k)]
        start = time.perf_counter()
        ids = sample(model, tokenizer, prompts, temperature, seed=7)
        seconds = time.perf_counter() - start
        texts = [tokenizer.decode(row) for row in ids]
        groups = [texts[i : i + k] for i in range(0, len(texts), k)]
        right = [
            statistics.fmean(graded(text, record["answer"]) for text in group)
            for group, record in zip(groups, records, strict=True)
        ]
        # Answers to one question are not independent, so this is the standard error of the mean over questions.
        error = statistics.stdev(right) / math.sqrt(len(right))
        distinct = statistics.fmean(len(set(group)) / k for group in groups)
        # Three wordings per step make nearly all answers distinct at any temperature; sentences are more informative.
        split = [[sentence for text in group for sentence in re.split(r"(?<=[.?])\s", text)] for group in groups]
        sentences = statistics.fmean(len(set(group)) / len(group) for group in split)
        tokens = statistics.fmean(map(len, ids))
        others = statistics.fmean(len(other(text)["input_ids"]) for text in texts)
        print(
            f"{folder.name} {questions.stem} T={temperature:.1f} right {statistics.fmean(right):.3f} ± {error:.3f}, "
            f"distinct among {k} {distinct:.2f}, distinct sentences {sentences:.2f}; "
            f"tokens {tokens:.1f}, by the other tokenizer {others:.1f}, longest {max(map(len, ids))}; {seconds:.0f}s",
            flush=True,
        )


def main() -> None:
    """Make all parts, or the one given by --only."""
    parser = argparse.ArgumentParser(description="Make the demo's questions and models.")
    parser.add_argument("--only", choices=("data", "teacher", "student", "measure"))
    parser.add_argument("--out", type=Path, default=DEMO)
    args = parser.parse_args()
    # The number of threads changes the order of sums, and with it the weights.
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    recipes = {"teacher": TEACHER, "student": STUDENT}
    if args.only in (None, "data"):
        write_questions(args.out)
    for name, recipe in recipes.items():
        if args.only in (None, name):
            make(recipe, args.out / name)
    if args.only in (None, "measure"):
        tokenizers = {name: AutoTokenizer.from_pretrained(args.out / name) for name in recipes}
        for name, other in (("teacher", "student"), ("student", "teacher")):
            for questions in ("validation", "heldout"):
                measure(args.out / name, args.out / f"{questions}.jsonl", tokenizers[other])


if __name__ == "__main__":
    main()
