"""Sample a teacher, score with a student, select by divergence: the library from Python.

    python examples/sample_score_select.py

Every call writes one folder and returns its manifest; run again, it skips what is there.
"""

from pathlib import Path

import dasd_lite
from dasd_lite.config.models import TransformersModel
from dasd_lite.config.stages import PromptsConfig, SampleConfig, ScoreConfig, SelectConfig
from dasd_lite.data.dataset import read_table
from dasd_lite.stages import sample, score, select

demo, out = Path(dasd_lite.__file__).parent / "demo", Path("runs/from-python")
prompts = PromptsConfig(path=demo / "train.jsonl", limit=32)
teacher = TransformersModel(model=str(demo / "teacher"))
student = TransformersModel(model=str(demo / "student"))
rollouts, scores, chosen = out / "sample", out / "score", out / "select"

settings = SampleConfig(temperature=1.0, num_samples=4, max_tokens=192)
sample.run(prompts, teacher, settings, rollouts, phase="high", seed=0)
score.run(rollouts, student, ScoreConfig(), scores)
rule = SelectConfig(rule="count", keep=1)
manifest = select.run(rollouts, student.model, rule, chosen, scores=scores, max_tokens=512, seed=0)

print(manifest["counts"])
row = read_table(chosen, "kept", ["messages", "completion", "class_counts"]).slice(0, 1).to_pylist()[0]
shared, of_teacher, of_student = row["class_counts"]
print(row["messages"][-1]["content"], row["completion"], sep="\n")
print(f"{of_teacher} teacher sentences, {of_student} student sentences, {shared} shared")
