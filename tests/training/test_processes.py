"""Where training runs: in this process, or in others of its own, and what those get and leave behind."""

import json
import os
import sys
import threading
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.rows import QUICK, make_model

from dasd_lite.config.extensions import add_import_folder
from dasd_lite.config.train import Full, TrainConfig
from dasd_lite.costs import cards
from dasd_lite.errors import ConfigError, TrainError
from dasd_lite.model.attention import Documents
from dasd_lite.model.load import load_model
from dasd_lite.model.logprobs import target_logprobs
from dasd_lite.stages import train as stage
from dasd_lite.training import environment, job, launch, loop, ranks, trainable
from dasd_lite.training.objectives import sft

RECORDER = """
import json
import os
from pathlib import Path
from dasd_lite.training.objectives.sft import loss, per_token
class Objective:
    per_token, loss = staticmethod(per_token), staticmethod(loss)
names = ("OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF", "WORLD_SIZE")
Path({file!r}).write_text(repr([os.getpid(), *(os.environ.get(name) for name in names)]))
"""


@pytest.fixture
def with_gpu(monkeypatch):
    """One GPU, as far as the process that starts the training can see."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: True)
    for name in ("OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


def test_with_a_gpu_training_runs_in_a_process_of_its_own(tiny, packed, tmp_path, with_gpu, monkeypatch):
    """Here that process sees no GPU, since CUDA_VISIBLE_DEVICES makes none, and trains on the CPU."""
    (tmp_path / "recorder.py").write_text(RECORDER.format(file=str(tmp_path / "child")))
    add_import_folder(tmp_path)
    given = environment.rank_environment(1, ["0"])
    assert given.pop("OMP_NUM_THREADS") == str(os.cpu_count())
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # two threads per process only get in each other's way here
    model = stage.train(packed, tiny, TrainConfig(**QUICK), out=tmp_path / "out", objective="recorder:Objective")
    assert (model.folder / "manifest.json").exists()
    pid, threads, allocator, size = eval((tmp_path / "child").read_text())
    assert pid != os.getpid() and size == "1"
    assert threads == "1"
    assert allocator == "expandable_segments:True"
    assert len(given) == 3 and not given.keys() & os.environ.keys()  # nothing else that this process starts gets them


def test_what_cannot_be_sent_trains_in_this_process_with_a_note(tiny, packed, tmp_path, with_gpu, monkeypatch, capsys):
    class Local:
        per_token, loss = staticmethod(sft.per_token), staticmethod(sft.loss)

    trained = []
    monkeypatch.setattr(stage, "Model", lambda folder: folder)  # which nobody has written
    monkeypatch.setattr(stage, "launch", lambda *arguments: trained.append("in a child"))
    monkeypatch.setattr(loop, "run_task", lambda *arguments: trained.append("here"))
    stage.train(packed, tiny, TrainConfig(**QUICK), out=tmp_path / "out", objective=Local())
    stage.train(packed, tiny, TrainConfig(**QUICK), out=tmp_path / "out", grader=lambda text, answer: True)
    stage.train(packed, tiny, TrainConfig(**QUICK), out=tmp_path / "out")
    assert trained == ["here", "here", "in a child"]
    notes = " ".join(capsys.readouterr().err.split())
    assert "Local cannot be sent to another process, so training runs in this one" in notes
    assert "evaluate.grader" in notes


def test_a_gpu_of_another_kind_is_left_out(tiny, packed, tmp_path, monkeypatch):
    kinds = [("card", 24 << 30), ("display", 2 << 30), ("card", 24 << 30)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(kinds))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: True)
    monkeypatch.setattr(cards, "_cards", lambda names: kinds)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6,7")
    launched = []
    monkeypatch.setattr(stage, "Model", lambda folder: folder)
    monkeypatch.setattr(stage, "launch", lambda number, task: launched.append(number))
    stage.train(packed, tiny, TrainConfig(**QUICK), out=tmp_path / "out")
    assert launched == [2]
    assert environment.rank_environment(2, environment.training_gpus())["CUDA_VISIBLE_DEVICES"] == "5,7"
    with pytest.raises(ConfigError, match=r"num_processes = 3: this machine has 2 GPUs to train on"):
        stage.train(packed, tiny, TrainConfig(**QUICK, num_processes=3), out=tmp_path / "out")


def test_the_environment_of_the_user_stays(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:native")
    assert environment.rank_environment(1, ["0"]) == {environment.LAUNCHED: "1", "CUDA_VISIBLE_DEVICES": "0"}
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    assert "PYTORCH_ALLOC_CONF" not in environment.rank_environment(2)  # on a CPU


def test_a_process_waits_less_long_in_training_than_for_a_model(monkeypatch, tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:

        def minutes():
            backend = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
            return backend.options._timeout.total_seconds() / 60

        with ranks.Ranks(size=2).training():
            assert minutes() == environment.WAIT_MINUTES
        assert minutes() == 120
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("text", ["CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"])
def test_memory_that_ran_out_under_another_name_is_the_same_line(tiny, packed, tmp_path, monkeypatch, text):
    def full(*args, **options):
        raise RuntimeError(text)

    monkeypatch.setattr(job, "_gpu", lambda: ("NVIDIA T4", 16e9, 13e9))
    monkeypatch.setattr(job.trainable, "load_trainable", full)
    message = "^out of GPU memory: NVIDIA T4 has 16.0 GB, of which other processes hold 3.0 GB; try"
    with pytest.raises(TrainError, match=message):
        stage.train(packed, tiny, TrainConfig(**QUICK), out=tmp_path / "out")


@pytest.fixture
def stub_liger(monkeypatch):
    """Liger as it is in one respect: it replaces names of a model's module, by what a CPU cannot compute."""
    modeling = transformers.models.qwen3.modeling_qwen3

    class Norm(torch.nn.Module):
        def __init__(self, *arguments, **options):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(arguments[0]))

        def forward(self, x):
            raise RuntimeError("cannot be accessed from Triton (cpu tensor?)")

    def apply(model, **options):
        modeling.Qwen3RMSNorm = Norm
        modeling.apply_rotary_pos_emb = rope

    plain_rope, calls = modeling.apply_rotary_pos_emb, []

    def rope(*arguments, **options):
        calls.append(1)
        return plain_rope(*arguments, **options)

    package = ModuleType("liger_kernel")
    package.transformers = ModuleType("liger_kernel.transformers")
    package.transformers._apply_liger_kernel_to_instance = apply
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package.transformers)
    monkeypatch.setattr(trainable, "liger_conflict", lambda **options: None)
    monkeypatch.setattr(trainable, "has_liger", lambda *kind: True)
    names = dict(vars(modeling))
    yield calls
    for name, value in names.items():
        setattr(modeling, name, value)


def test_models_loaded_after_training_with_liger_compute_as_before(packed, tmp_path, stub_liger, monkeypatch):
    """Training reads its own model again when it exports, in the same process."""
    folder = make_model(tmp_path / "model")
    monkeypatch.setattr(stage, "conflicts", lambda *arguments: ())
    stage.train(packed, folder, TrainConfig(**QUICK, liger="on"), out=tmp_path / "out")
    assert stub_liger  # the patches were there during training
    rows, lengths = torch.arange(20).numpy(), [12, 8]
    del stub_liger[:]
    target_logprobs(load_model(folder, device="cpu"), rows, lengths)
    trainable.load_trainable(folder, Full(), device="cpu", liger="on")  # nobody to undo it later
    target_logprobs(load_model(folder, device="cpu"), rows, lengths)
    assert not stub_liger


@pytest.fixture
def sharded(tiny, tmp_path):
    """A model sharded over one process, which behaves as over several."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    model = trainable.load_trainable(tiny, Full(), device="cpu", to_shard=True)
    yield ranks.shard(model, torch.float32, ranks.mesh_of(ranks.Ranks(device="cpu")))
    dist.destroy_process_group()


def test_weights_stay_gathered_while_answers_are_written_and_are_sharded_and_trained_afterwards(sharded):
    def are_sharded():
        return {name: hasattr(p, "full_tensor") for name, p in sharded.named_parameters()}

    ids = torch.arange(12)[None]
    with torch.no_grad():
        sharded(input_ids=ids, documents=Documents.of([12]))
        assert all(are_sharded().values())
        with ranks.gathered(sharded):
            sharded(input_ids=ids, documents=Documents.of([12]))
            assert not any(are_sharded().values())
        assert all(are_sharded().values())
    sharded(input_ids=ids, documents=Documents.of([12])).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.full_tensor().any() for p in sharded.parameters())


@pytest.mark.parametrize(("free", "linked", "wanted"), [(9, False, "whole"), (0, True, "gathered"), (0, False, None)])
def test_answers_are_written_where_that_does_not_take_minutes(sharded, monkeypatch, free, linked, wanted):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free << 30, 9 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: linked)
    here = SimpleNamespace(is_sharded=True, model=sharded, dtype=torch.float32, ranks=ranks.Ranks(device="cuda:0"))
    context = job.Job.generating(here)
    found = None if context is None else "gathered" if isinstance(context, nullcontext) else "whole"
    assert found == wanted


def test_processes_of_a_machine_load_one_after_the_other():
    """Here they are threads that meet at a barrier."""
    meet, present, most, done = threading.Barrier(3), [], [], []

    class Thread(ranks.Ranks):
        def gather(self, value):
            meet.wait()
            return [0, 1, 2]

    def work(number):
        present.append(number)
        most.append(len(present))
        present.remove(number)
        return number

    threads = [
        threading.Thread(target=lambda i=i: done.append((i, Thread(i, 3, "cpu", i).in_turn(lambda: work(i)))))
        for i in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1]
    assert sorted(done) == [(0, 0), (1, 1), (2, 2)]


@pytest.mark.parametrize(
    "text",
    [
        "RuntimeError: [gloo/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv operation to complete",
        "DistBackendError: [Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7) ran too long",
    ],
)
def test_a_process_that_hangs_is_one_line(tmp_path, text):
    (tmp_path / "error.json").write_text(json.dumps({"message": {"message": text, "extraInfo": {}}}))
    with pytest.raises(TrainError, match=r"^a process waited 30 minutes for another one .* resume from the last"):
        launch._raise(RuntimeError("ChildFailedError"), tmp_path, 2)
