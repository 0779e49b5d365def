"""The task of a training run: the same value on both sides of a process boundary."""

from pathlib import Path

from dasd_lite.config.train import Full, Lora, TrainConfig
from dasd_lite.data.manifest import identify
from dasd_lite.data.records import Prompt
from dasd_lite.training.task import TrainTask

QUESTION = Prompt(
    "q1", ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "é ≠ e?"}), "all", "yes"
)


def test_a_task_survives_json():
    for method in (Full(), Lora(kind="qlora", rank=4, alpha=8.1, target_modules=["q_proj"])):
        config = TrainConfig(method=method, learning_rate=1e-3 / 3, num_processes=2)
        task = TrainTask(
            rows=Path("run/low/pack"),
            model=Path("models/tiny"),
            config=config,
            out=Path("run/low/train"),
            identity=identify("train", 2, config, {"rows": "a", "seed": "0"}),
            seed=2**40,
            max_steps=7,
            force=True,
            trust_remote_code=True,
            adapter=Path("run/base/adapter"),
            questions=(QUESTION,),
            max_answer_tokens=9,
            import_folders=("/extensions",),
        )
        again = TrainTask.from_json(task.to_json())
        assert again == task
        assert again.identity.fingerprint == task.identity.fingerprint


def test_what_may_be_left_out():
    config = TrainConfig()
    task = TrainTask(Path("rows"), Path("model"), config, Path("out"), identify("train", 2, config, {}))
    assert TrainTask.from_json(task.to_json()) == task
