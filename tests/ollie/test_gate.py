"""The choice between a rewritten graph, Inductor's and eager torch."""

import importlib

import pytest
import torch
from torch import nn

import ollie_compile
from ollie_compile import backend, store
from ollie_compile.compat import freezing as inductor
from ollie_compile.graph import gate
from ollie_compile.graph.comparing import copied, copies
from ollie_compile.measure.machine import Machine
from ollie_compile.plan.candidates import Plan
from ollie_compile.plan.planner import Planner

OPTIONS = {"margin": 0.0, "candidates": 1, "budget_s": 1e6}
pytestmark = pytest.mark.usefixtures("fresh", "uncompiled")


@pytest.fixture
def seconds(monkeypatch):
    """What is measured: of whole graphs the given seconds, of operators that candidates win."""
    given = {}

    def measured(built, inputs, machine):
        assert all(torch.is_tensor(value) for value in inputs)
        for call in built.values():
            call(*copies(inputs, getattr(call, "held", ())))
        return {which: given[which] for which in built}

    monkeypatch.setattr(gate, "_measured", measured)
    monkeypatch.setattr(
        "ollie_compile.measure.timing.measure", lambda calls, *_: [*range(1, len(calls)), 100.0]
    )
    monkeypatch.setattr("ollie_compile.measure.bounds.bound_seconds", lambda *_, **__: 1e-12)
    return given


class Counting(nn.Module):
    """A convolution that counts its calls in a buffer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        return self.conv(x)


@pytest.mark.parametrize(
    ("times", "chosen"),
    [
        ((1.0, 2.0, 3.0, 4.0), gate.REWRITTEN),
        ((2.0, 1.0, 3.0, 4.0), gate.INDUCTOR),
        ((2.0, 2.0, 1.0, 4.0), gate.EAGER),
        ((1.0, 2.0, 0.99, 4.0), gate.REWRITTEN),  # within the noise
        ((1.0, 0.98, 0.99, 0.98), gate.REWRITTEN),
        ((2.0, 1.0, 0.99, 0.98), gate.INDUCTOR),
        ((2.0, 3.0, 3.0, 1.0), gate.REWRITTEN + gate.CONTIGUOUS),
    ],
)
def test_the_fastest_graph_stays(seconds, times, chosen):
    names = (gate.REWRITTEN, gate.INDUCTOR, gate.EAGER)
    seconds |= dict(zip(names, times, strict=False))
    seconds |= {gate.REWRITTEN + gate.CONTIGUOUS: times[3], gate.INDUCTOR + gate.CONTIGUOUS: times[3]}
    net, x = Counting().eval(), torch.randn(1, 2, 6, 6)
    report = ollie_compile.explain(net, x, **OPTIONS)
    assert report.rewritten == (1 if chosen.startswith(gate.REWRITTEN) else 0)
    (note,) = [note for note in report.notes if "whole graph" in note]
    assert note.endswith(f"chosen: {chosen}")
    assert net.calls.item() == 1  # measuring ran on copies


def test_the_choice_is_kept_on_disk(seconds, tmp_path, monkeypatch):
    monkeypatch.setenv(store.FOLDER, str(tmp_path / "plans"))
    backend.CONTEXT.reset()
    seconds |= {
        gate.REWRITTEN: 2.0,
        gate.INDUCTOR: 1.0,
        gate.EAGER: 3.0,
        gate.INDUCTOR + gate.CONTIGUOUS: 4.0,
    }
    net, x = nn.Conv2d(2, 3, 3).eval(), torch.randn(1, 2, 6, 6)
    ollie_compile.explain(net, x, **OPTIONS)
    seconds.clear()  # what is measured now fails
    backend.CONTEXT.reset()
    report = ollie_compile.explain(net, x, **OPTIONS)
    assert report.notes[-1].endswith("chosen: Inductor")
    assert not report.plans
    with torch.no_grad():
        got = torch.compile(net, backend="ollie", options=OPTIONS, dynamic=False)(x)
        torch.testing.assert_close(got, net(x), rtol=1e-4, atol=1e-5)
    backend.CONTEXT.reset()


@pytest.mark.parametrize(
    "damaged",
    [
        {"chosen": "rewritten", "seconds": ["rewritten"], "planning_s": 1.0},
        {"chosen": "rewritten", "seconds": {"rewritten": "soon"}, "planning_s": 1.0},
        {"chosen": ["rewritten"], "seconds": {"rewritten": 1.0}, "planning_s": 1.0},
        {"chosen": "rewritten", "seconds": {"rewritten": 1.0}, "planning_s": -1.0},
        {"chosen": "rewritten", "seconds": {"rewritten": 1.0}},
        {"chosen": "another", "seconds": {"rewritten": 1.0}, "planning_s": 1.0},
        {},
    ],
)
def test_an_entry_on_disk_that_says_something_else_is_decided_anew(seconds, monkeypatch, damaged):
    monkeypatch.setattr(store, "read", lambda name: damaged if name.startswith("graph") else None)
    ways = (gate.REWRITTEN, gate.INDUCTOR, gate.EAGER, gate.REWRITTEN + gate.CONTIGUOUS)
    seconds |= dict.fromkeys((*ways, gate.INDUCTOR + gate.CONTIGUOUS), 2.0) | {gate.INDUCTOR: 1.0}
    report = ollie_compile.explain(nn.Conv2d(2, 3, 3).eval(), torch.randn(1, 2, 6, 6), **OPTIONS)
    assert report.notes[-1].endswith("chosen: Inductor")


def test_a_graph_in_which_nothing_is_rewritten_is_compiled_once(seconds, monkeypatch):
    finished = []
    compile_fx = importlib.import_module("torch._inductor.compile_fx").compile_fx

    def compiled(gm, inputs, config_patches=None, **named):
        call = compile_fx(gm, inputs, config_patches=config_patches, **named)
        if config_patches is not None:  # it calls itself once they are applied
            finished.append(call)
        return call

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compiled)
    monkeypatch.setattr("ollie_compile.measure.bounds.bound_seconds", lambda *_, **__: 1e12)
    seconds |= {gate.INDUCTOR: 1.0, gate.EAGER: 2.0, gate.INDUCTOR + gate.CONTIGUOUS: 3.0}
    net, x = nn.Conv2d(2, 3, 3).eval(), torch.randn(1, 2, 6, 6)
    report = ollie_compile.explain(net, x, **OPTIONS | {"budget_s": gate.LONG_S - 1})
    assert len(finished) == 1
    assert report.notes[-1].endswith("chosen: Inductor")
    assert [made.winner for _, made in report.plans] == [None]


def test_the_default_budget_is_what_inductor_takes(monkeypatch):
    planned = []
    clock = iter([100.0, 108.0])

    class Slow(Machine):
        def now(self):
            return next(clock, 108.0)

    def make(self, operators, deadline):
        planned.append(self.config)
        return {operator: Plan(operator, self.budget_s) for operator in operators}

    monkeypatch.setattr(backend.CONTEXT, "machine", Slow())
    monkeypatch.setattr(Planner, "make", make)
    ollie_compile.explain(nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU()).eval(), torch.randn(1, 2, 6, 6))
    assert [config.budget_s for config in planned] == [pytest.approx((1 - gate.AGAIN) * 8.0)]


def test_without_room_to_compare_the_rewritten_graph_stays(seconds, monkeypatch):
    def full(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(gate, "_measured", full)
    net, x = nn.Conv2d(2, 3, 3).eval(), torch.randn(1, 2, 6, 6)
    report = ollie_compile.explain(net, x, **OPTIONS)
    assert report.rewritten == 1
    assert "the whole graph was not compared: no room" in report.notes


def test_copies_say_where_their_inputs_are_from():
    """Without that a warm start, which compiles Dynamo's graph, finds nothing in Inductor's cache."""
    graphs = []

    def compiled(gm, inputs):
        graphs.extend((gm, copied(gm)))
        return gm

    torch.compile(nn.Linear(2, 3), backend=compiled)(torch.randn(1, 2))
    known, made = ([node._dynamo_source for node in gm.graph.find_nodes(op="placeholder")] for gm in graphs)
    assert len(known) == 3
    assert made == known
    assert graphs[0]._param_name_to_source == graphs[1]._param_name_to_source


def test_frozen_parameters_leave_the_graph_and_inputs_stay(monkeypatch):
    """Dynamo's own graph keeps its inputs, for it passes them by that graph."""
    seen, graphs = [], []

    def freeze(gm, inputs, weights, *more):
        kept, layout = original(gm, inputs, weights, *more)
        seen.append((len(inputs), len(kept)))
        return kept, layout

    def compiled(gm, inputs):
        graphs.append(gm)
        return backend.ollie(gm, inputs, options={"budget_s": 0, "freeze": True})

    original = inductor.freeze
    monkeypatch.setattr(inductor, "freeze", freeze)
    net, x = nn.Conv2d(2, 3, 3).eval(), torch.randn(1, 2, 6, 6)
    with torch.no_grad():
        got = torch.compile(net, backend=compiled, dynamic=False)(x)
        torch.testing.assert_close(got, net(x), rtol=1e-4, atol=1e-5)
    assert seen == [(3, 1)]
    assert [len(gm.graph.find_nodes(op="placeholder")) for gm in graphs] == [3]


@pytest.mark.parametrize("rows", [1, gate.FEW_ROWS + 1])
def test_frozen_products_of_few_rows_are_tuned(seconds, rows):
    seconds |= {gate.INDUCTOR: 2.0, gate.EAGER: 3.0, gate.INDUCTOR + gate.TUNED: 1.0}
    net, x = nn.Linear(4, 3).eval(), torch.randn(rows, 4)
    report = ollie_compile.explain(net, x, **OPTIONS, freeze=True)
    notes = [note for note in report.notes if note.endswith("chosen: Inductor, tuned products")]
    assert len(notes) == (1 if rows == 1 else 0)


def test_tuning_that_the_budget_does_not_pay_for_is_left_out():
    def planned(graph, budget_s, inductor_s=1.0, freeze=True):
        config = ollie_compile.OllieConfig(budget_s=budget_s, freeze=freeze)
        left, further = gate._for_planning(config, graph, inductor_s)
        return left.budget_s, further

    graphs = []

    def keep(gm, inputs):
        graphs.append(gm.graph)
        return gm

    with torch.no_grad():
        torch.compile(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3)), backend=keep)(torch.randn(1, 4))
        torch.compile(nn.Conv2d(2, 3, 3), backend=keep)(torch.randn(1, 2, 6, 6))
    linear, convolution = graphs
    tuning_s = 1.0 + 2 * gate.TUNING_S
    assert planned(linear, 40.0) == (pytest.approx(40.0 - gate.AGAIN - tuning_s), [gate.TUNED])
    assert planned(linear, 40.0, freeze=False) == (pytest.approx(40.0 - gate.AGAIN), [])
    assert planned(linear, gate.LONG_S - 1)[1] == []
    assert planned(linear, gate.LONG_S, inductor_s=19.0)[1] == []
    assert planned(convolution, gate.LONG_S)[1] == [gate.CONTIGUOUS]
    assert planned(convolution, None, inductor_s=30.0) == (pytest.approx(30.0 * (1 - gate.AGAIN)), [])
