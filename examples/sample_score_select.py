"""Sample a teacher, score with a student, select by divergence: the library from Python.

    python examples/sample_score_select.py

Every call writes one folder and returns its manifest; run again, it skips what is there.
"""

from pathlib import Path

import dasd_lite
from dasd_lite.config import PromptsConfig, SampleConfig, ScoreConfig, SelectConfig, TransformersModel
from dasd_lite.dataset import batches
from dasd_lite.stages import sample, score, select

demo = Path(dasd_lite.__file__).parent / "demo"
out = Path("runs/from-python")
teacher = TransformersModel(model=str(demo / "teacher"))
student = TransformersModel(model=str(demo / "student"))
prompts = PromptsConfig(path=demo / "train.jsonl", limit=32)

sample.run(prompts, teacher, SampleConfig(temperature=1.0, num_samples=4, max_tokens=192), out / "sample", seed=0)
score.run(out / "sample", student, ScoreConfig(), out / "score")
chosen = select.run(
    out / "sample",
    student.model,
    SelectConfig(rule="count", keep=1),
    out / "select",
    max_tokens=512,
    seed=0,
    scores=out / "score",
)

print(chosen["counts"])
for batch in batches(out / "select", "kept", ("messages", "completion", "class_counts"), batch_size=1):
    row = batch.to_pylist()[0]
    shared, teachers, students = row["class_counts"]
    print(row["messages"][-1]["content"], row["completion"], f"{shared=} {teachers=} {students=}", sep="\n")
    break
