"""Distil from a model behind a URL: one command.

    python examples/distil_endpoint.py http://localhost:8000/v1
    python examples/distil_endpoint.py https://api.example.com/v1 --model big-teacher --questions q.jsonl \
        --student Qwen/Qwen3-4B-Instruct-2507 --max-cost 5 --prices 0.2 0.8

Without --questions and --student it uses the demo's: 48 questions and a student of 195K parameters. This shows whether
the endpoint provides what the method needs, in a minute and for a few thousand tokens. The key, if one is needed, is
read from OPENAI_API_KEY. The script writes a recipe, run.toml in the folder --out, which `dasd-lite run` can resume.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import httpx


def models_of(url: str) -> dict[str, int]:
    """Return the models that the server lists, each with its context (vLLM reports it; else a large number)."""
    key = os.environ.get("OPENAI_API_KEY")
    try:
        reply = httpx.get(f"{url}/models", headers={"Authorization": f"Bearer {key}"} if key else {}, timeout=10)
        reply.raise_for_status()
        return {str(model["id"]): int(model.get("max_model_len") or 1 << 17) for model in reply.json()["data"]}
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
        sys.exit(f"{url}/models: {error or type(error).__name__}; a URL looks like http://localhost:8000/v1")


def main() -> None:
    """Write the recipe, and run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="base URL, up to and with /v1")
    parser.add_argument("--model", help="the teacher's name; default: the first that the server lists")
    parser.add_argument("--tokenizer", help="its tokenizer, a folder or hub id; sends token ids (vLLM servers)")
    parser.add_argument("--questions", default="demo:train.jsonl", help='lines like {"prompt": "…", "answer": "…"}')
    parser.add_argument("--limit", type=int, default=48, help="number of questions")
    parser.add_argument("--student", default="demo:student", help="folder or hub id")
    parser.add_argument("--prices", type=float, nargs=2, metavar=("IN", "OUT"), help="per million tokens")
    parser.add_argument("--max-cost", type=float, help="spending limit")
    parser.add_argument("--out", type=Path, default=Path("runs/endpoint"))
    args = parser.parse_args()

    args.url = args.url.rstrip("/")
    models = {} if args.model else models_of(args.url)
    model = args.model or next(iter(models))
    max_tokens = min(2048, models.get(model, 1 << 17) // 2)  # leaves room for the question
    teacher = {"kind": "endpoint", "base_urls": [args.url], "model": model}
    if args.tokenizer:
        teacher["tokenizer"] = args.tokenizer
    lines = [f"{key} = {json.dumps(value)}" for key, value in teacher.items()]
    if args.prices:
        lines.append(f"prices = {{ input = {args.prices[0]}, output = {args.prices[1]} }}")
    if args.max_cost:
        lines.append(f"budget = {{ max_cost = {args.max_cost} }}")
    recipe = args.out / "run.toml"
    args.out.mkdir(parents=True, exist_ok=True)
    recipe.write_text(
        f"out = {json.dumps(str(args.out / 'results'))}\n"
        f"prompts = {{ path = {json.dumps(args.questions)}, limit = {args.limit} }}\n"
        f'student = {{ kind = "transformers", model = {json.dumps(args.student)} }}\n'
        f"sample = {{ num_samples = 2, max_tokens = {max_tokens} }}\n"
        "pack = { seq_len = 4096 }\n"
        "train = { epochs = 1, grad_accum_steps = 1 }\n"
        "[teacher]\n" + "\n".join(lines) + '\n[[phase]]\nname = "low"\nsample.temperature = 0.6\n',
        encoding="utf-8",
    )
    sys.exit(subprocess.call([sys.executable, "-m", "dasd_lite", "run", str(recipe)]))


if __name__ == "__main__":
    main()
