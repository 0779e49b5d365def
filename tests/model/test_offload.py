"""Activations in host memory: the order of copies and waits, with a link that writes down what it is asked to do."""

import pytest

torch = pytest.importorskip("torch")

from dasd_lite.model import offload
from dasd_lite.model.offload import Link, Transfers

BIG = 1 << 16


class Slow(Link):
    """Copies arrive only when somebody waits for them; until then a tensor on its way is full of NaN."""

    def __init__(self):
        super().__init__()
        self.log, self.pending, self.most = [], {}, 0

    def copy(self, target, source, device, way):
        number = len(self.log)
        self.log.append((way, number))
        target.fill_(float("nan"))
        self.pending[number] = (way, lambda: target.copy_(source))
        self.most = max(self.most, sum(each == way for each, _ in self.pending.values()))
        return number

    def wait(self, event, device):
        self.log.append(("wait", event))
        way = self.log[event][0]
        for number in [n for n in self.pending if n <= event and self.pending[n][0] == way]:  # a stream is in order
            self.pending.pop(number)[1]()


def chain(x, weights):
    for weight in weights:
        x = (x @ weight).sin()
    return x


def step(link):
    """A chain of layers, each of which keeps two tensors, some of them twice."""
    torch.manual_seed(0)
    weights = [torch.randn(256, 256, requires_grad=True) for _ in range(5)]
    x = torch.randn(256, 256, requires_grad=True)
    if link is None:
        chain(x, weights).sum().backward()
    else:
        transfers = Transfers(link)
        with torch.autograd.graph.saved_tensors_hooks(transfers.pack, transfers.unpack):
            out = chain(x, weights)
        out.sum().backward()
    return [x.grad, *(weight.grad for weight in weights)]


def test_nothing_is_read_before_it_has_arrived():
    link = Slow()
    for found, wanted in zip(step(link), step(None), strict=True):
        assert torch.equal(found, wanted)  # no NaN
    ways = [way for way, _ in link.log]
    assert ways.count("out") == ways.count("back") == 9  # the first input and the weights are leaves
    assert "out" not in ways[ways.index("back") :]


def test_the_next_tensor_is_on_its_way_before_the_computation_waits_for_this_one():
    link = Slow()
    step(link)
    backward = link.log[next(i for i, (way, _) in enumerate(link.log) if way == "back") :]
    copies = [number for way, number in backward if way == "back"]
    for i, number in enumerate(copies[:-1]):
        wait = backward.index(("wait", number))
        assert backward.index(("back", copies[i + 1])) < wait
    assert link.most <= 3  # in the forward pass and in the backward pass


def test_memory_on_its_way_out_is_held_until_it_is_copied(monkeypatch):
    """The computation waits for the third copy from the end, so its memory may be used again."""
    monkeypatch.setattr(offload, "_IN_FLIGHT", 2)
    link = Slow()
    transfers = Transfers(link)
    for i in range(4):
        transfers.pack(torch.full((BIG,), float(i), requires_grad=True) * 1)
        assert len(transfers._leaving) == min(i + 1, 2)
    assert link.log == [("out", 0), ("out", 1), ("out", 2), ("wait", 0), ("out", 4), ("wait", 1)]


def test_what_is_never_asked_for_is_waited_for_in_the_end():
    link = Slow()
    transfers = Transfers(link)
    places = [transfers.pack(torch.full((BIG,), float(i), requires_grad=True) * 1) for i in range(3)]
    assert transfers.unpack(places[2])[0] == 2.0
    assert link.pending  # the one before it, fetched in advance
    del transfers
    assert not link.pending


def test_small_tensors_and_weights_stay():
    transfers, weight = Transfers(Slow()), torch.zeros(BIG, requires_grad=True)
    assert transfers.pack(weight) is weight
    view = weight.view(256, -1)
    assert transfers.pack(view) is view
    small = torch.zeros(10) * 1
    assert transfers.pack(small) is small and transfers.unpack(small) is small


def test_a_tensor_can_be_asked_for_twice():
    """As a graph that is kept does."""
    transfers = Transfers(Slow())
    place = transfers.pack(torch.full((BIG,), 2.0, requires_grad=True) * 1)
    assert [transfers.unpack(place)[0].item() for _ in range(2)] == [2.0, 2.0]
