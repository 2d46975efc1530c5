"""Where the time of a step goes: the parts are what they are called, and are all of it."""

import time

import torch
from torch import nn

from itpn.bench.parts import Parts
from itpn.bench.steps import speedup_of
from itpn.engine.clock import Clock


class Listening(Clock):
    """Calls back at each mark."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.heard = lambda name: None

    def mark(self, name: str) -> None:
        self.heard(name)
        super().mark(name)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Twice(), nn.Linear(4, 1)

    def forward(self, x):
        return self.finish(self.first(x))

    def finish(self, pair):
        time.sleep(0.02)
        return self.second(pair[0] + pair[1])


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x), self.layer(x + 1)


def named() -> tuple[Outer, Listening]:
    model, clock = Outer(), Listening()
    parts = Parts(clock, "rest")
    parts.module(model.first, "first")
    parts.module(model.second, "second")
    parts.method(model, "finish", "finish")
    parts.backward(model.first, "backward: second")
    return model, clock


def test_parts_are_without_those_inside_them_and_sum_to_the_whole():
    model, clock = named()
    clock.mark("begun")
    loss = model(torch.ones(2, 4)).sum()
    clock.mark("rest")
    loss.backward()
    clock.mark("backward: first")
    begun, ended = clock.marks[0][1], clock.marks[-1][1]
    taken = clock.read()
    assert set(taken) == {"rest", "first", "finish", "second", "backward: second", "backward: first"}
    assert abs(sum(taken.values()) - (ended - begun)) < 1e-6
    assert taken["finish"] >= 0.02 > taken["second"] + taken["first"] + taken["rest"]


def test_the_backward_pass_is_cut_where_it_comes_to_a_module():
    model, clock = named()
    has_gradient = []

    def heard(name: str) -> None:
        if name == "backward: second":
            has_gradient.append([p.grad is not None for p in (model.first.layer.weight, model.second.weight)])

    clock.heard = heard
    for _ in range(2):
        model.zero_grad()
        model(torch.ones(2, 4)).sum().backward()
    assert has_gradient == [[False, True]] * 2


def test_a_baseline_is_compared_pair_by_pair():
    assert speedup_of([1.0, 4.0, 9.0], [2.0, 8.0, 9.0]) == 2
    assert speedup_of([1.0, 4.0], [2.0, 4.0]) == 1.5
