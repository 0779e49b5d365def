"""The benchmark on a GPU, `benchmarks/train_gpu.py`: its dry run with our side alone, its arithmetic, its verdicts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import train_gpu

    return train_gpu


@pytest.mark.parametrize("names", [["lora-16k"], pytest.param(["full-32k", "lora-16k"], marks=pytest.mark.slow)])
def test_the_dry_run_goes_through_both_kinds_of_training(tmp_path, names):
    pytest.importorskip("peft")
    results = tmp_path / "results.json"
    command = [sys.executable, str(BENCHMARKS / "train_gpu.py"), "--dry", "--cases", ",".join(names)]
    done = subprocess.run(
        [
            *command,
            *["--ablate"] * (len(names) > 1),
            "--sides",
            "ours",
            "--folder",
            str(tmp_path / "kept"),
            "--json",
            str(results),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    logs = "\n".join(path.read_text() for path in (tmp_path / "kept" / "logs").glob("*"))
    assert done.returncode == 0, done.stderr + logs
    cases = json.loads(results.read_text())["cases"]
    for case in names:
        assert cases[case]["ours"].get("tokens_per_second", 0) > 0, logs
        assert len(cases[case]["ours"]["seconds"]) == 5
        assert all("tokens_per_second" in side for side in cases[case].values()), logs
        assert len(cases[case]) == (5 if len(names) > 1 else 1)
        assert cases[case]["ours"]["losses"][0] == pytest.approx(5.99, abs=0.1)  # log 400: nothing is learned yet
    assert "not run" in done.stdout  # TRL's column


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_documented_formula_is_the_one_that_training_reports(bench, method):
    from dasd_lite.config.train import Full, Lora
    from dasd_lite.costs.flops import training_flops
    from dasd_lite.costs.shape import shape_of

    options = Full() if method == "full" else Lora(kind="lora", rank=bench.RANK)
    shape = shape_of({**bench.SHAPE, "model_type": "qwen3", "tie_word_embeddings": True})
    lengths = [20000, 9000, 3000]
    assert bench.flops(bench.SHAPE, method, lengths) == pytest.approx(training_flops(shape, lengths, options))


def test_a_token_of_qwen3_4b_costs_six_times_its_weights(bench):
    assert bench.flops(bench.SHAPE, "full", [1]) / 6 == pytest.approx(4.022e9, rel=1e-3)


def test_verdicts(bench):
    cases = {
        "full-32k": {"ours": {"tokens_per_second": 12.0, "mfu": 0.51}, "trl": {"tokens_per_second": 10.0}},
        "full-64k": {"ours": {"missing": "out of memory"}, "trl": {"missing": "out of memory"}},
        "qlora-8k": {"ours": {"tokens_per_second": 9.0, "mfu": None, "peak_bytes": 8.5e9}},
        "lora-16k": {"ours": {"missing": "peft not installed"}},
    }
    assert [met for _, _, met in bench.verdicts(cases)] == [True, None, True, False, False, None]
