"""The whole chain from Python, on the demo's tiny models: about a minute on two CPU cores.

    python examples/chain.py [OUT]

Writes one folder per stage to OUT, by default runs/from-python.
"""

import sys
from pathlib import Path

import dasd_lite as dl

demo, out = Path(dl.__file__).parent / "demo", Path(sys.argv[1] if len(sys.argv) > 1 else "runs/from-python")

teacher, student = dl.Transformers(model=str(demo / "teacher")), dl.Transformers(model=str(demo / "student"))
prompts = dl.read_prompts(demo / "train.jsonl", limit=32)
rollouts = dl.sample(prompts, teacher, temperature=1.0, num_samples=2, max_tokens=192, out=out / "sample")
scores = dl.score(rollouts, student, out=out / "score")
kept = dl.select(rollouts, student, scores=scores, rule="count", keep=1, seq_len=512, out=out / "select")
print(f"kept {kept.counts['kept']}, rejected {kept.counts['rejected']}")
rows = dl.pack(kept, seq_len=512, out=out / "pack")
trained = dl.train(rows, student, epochs=2, micro_batch_size=1, grad_accum_steps=2, out=out / "train")
evaluation = dl.evaluate(trained, demo / "heldout.jsonl", limit=20, num_samples=1, max_tokens=192, out=out / "evaluate")
print(f"accuracy {evaluation.accuracy:.3f} ± {evaluation.standard_error:.3f}")
