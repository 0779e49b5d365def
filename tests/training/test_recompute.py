"""What is computed again in the backward pass, and what is kept instead: the same gradients to the bit."""

import dataclasses

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.model.tiny import random_model, random_row
from tests.rows import loss_sum
from torch.utils._python_dispatch import TorchDispatchMode

from dasd_lite.config.train import Full, Lora, TrainConfig
from dasd_lite.costs import memory
from dasd_lite.costs.hardware import Hardware
from dasd_lite.costs.shape import read_shape
from dasd_lite.training import job
from dasd_lite.training.trainable import load_trainable

ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("model"), num_hidden_layers=4)


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))

    def count(self, name):
        return self.names.count(name)


def step(folder, method, **options):
    """Gradients of one pass over one document, operators called, and bytes that autograd keeps."""
    torch.manual_seed(0)
    trained = load_trainable(folder, method, device="cpu", **options)
    data, kept = random_row(90), {}

    def pack(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with Calls() as calls:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = loss_sum(trained, data.ids, data.loss_mask, data.doc_lengths)
        loss.backward()
    return torch.cat([p.grad.flatten() for p in trained.parameters() if p.requires_grad]), calls, sum(kept.values())


@pytest.mark.parametrize("method", [Full(), Lora(kind="lora", rank=4)], ids=lambda method: method.kind)
def test_the_last_layers_keep_theirs(model, method):
    wanted, none_again, everything = step(model, method)
    forwards, kept = [], []
    for layers_kept in (0, 1, 3, 4, 9):
        gradient, calls, size = step(model, method, gradient_checkpointing=True, layers_kept=layers_kept)
        assert torch.equal(gradient, wanted)
        forwards.append(calls.count(ATTENTION))
        kept.append(size)
    assert none_again.count(ATTENTION) == 4
    assert forwards == [8, 7, 5, 4, 4]
    assert kept == sorted(kept) and kept[0] < kept[1] < kept[2] < kept[3] == kept[4]
    assert kept[4] == pytest.approx(everything, rel=0.03)


@pytest.mark.parametrize("method", [Full(), Lora(kind="lora", rank=4)], ids=lambda method: method.kind)
def test_attention_is_not_computed_again_where_its_output_is_kept(model, method):
    wanted, again, _ = step(model, method, gradient_checkpointing=True)
    gradient, kept, _ = step(model, method, gradient_checkpointing=True, keep_attention=True)
    assert torch.equal(gradient, wanted)
    assert (again.count(ATTENTION), kept.count(ATTENTION)) == (8, 4)
    assert kept.count("silu") == again.count("silu") == 8


def a_step(folder, **options):
    config = TrainConfig(method=Lora(), gradient_checkpointing="on", **options)
    return memory.TrainingStep(read_shape(folder), config, 20_000, 1, Hardware())


def test_as_much_is_kept_as_memory_has_room_for(model):
    auto = a_step(model)
    bare = memory.predict_step(auto).total
    with_attention = memory.predict_step(dataclasses.replace(auto, keeps_attention=True)).total
    assert with_attention > bare
    assert job._recomputing(auto, bare / 0.9) == job.Recomputing(True, 0, False)
    assert job._recomputing(auto, with_attention / 0.9) == job.Recomputing(True, 0, True)
    two = memory.predict_step(dataclasses.replace(auto, keeps_attention=True, layers_kept=2)).total
    assert job._recomputing(auto, two / 0.9 + 1) == job.Recomputing(True, 2, True)
    assert job._recomputing(auto, 80e9) == job.Recomputing(True, 4, True)
    assert job._recomputing(auto, 0.0) == job.Recomputing(True, 0, False)  # a CPU
    assert job._recomputing(dataclasses.replace(auto, tokens=8000), 80e9) == job.Recomputing(True, 4, False)
    assert job._recomputing(a_step(model, offload_activations=True), 80e9) == job.Recomputing(True, 0, False)
    assert job._recomputing(a_step(model, keep_layers=1, keep_attention="on"), 0.0) == job.Recomputing(True, 1, True)
    off = dataclasses.replace(auto, config=TrainConfig(gradient_checkpointing="off"))
    assert job._recomputing(off, 80e9) == job.Recomputing(False)


def test_the_prediction_of_kept_layers_lies_between_none_and_all(model):
    none = a_step(model)
    all_kept = dataclasses.replace(none, config=none.config.model_copy(update={"gradient_checkpointing": "off"}))
    kept = [dataclasses.replace(none, layers_kept=k).kept for k in range(5)]
    assert kept[0] == none.kept and kept == sorted(set(kept))
    assert kept[4] == pytest.approx(all_kept.kept, rel=0.01)
