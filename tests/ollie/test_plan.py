"""Planning within a budget: a clock that only the checks and compilations move."""

from types import SimpleNamespace

import pytest
import torch

from ollie_compile.config import OllieConfig
from ollie_compile.measure import calls, pace, timing
from ollie_compile.plan import candidates, checks, choice, placing, planner, preparing
from tests.ollie.strategies import operator

MODEL = OllieConfig(tune="model", margin=0.0, candidates=3)
MEASURE = OllieConfig(margin=0.0, candidates=3)


class Clock:
    now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    """Stands still in planning, where every candidate seems better than the original."""
    clock = Clock()
    for module in ("planner", "preparing", "placing", "choice", "checks"):
        monkeypatch.setattr(f"ollie_compile.plan.{module}.time", clock)
    monkeypatch.setattr("ollie_compile.measure.timing.median_seconds", lambda *_, **__: 1.0)
    monkeypatch.setattr("ollie_compile.plan.planner._plans", {})
    monkeypatch.setattr(pace, "pace", pace.Pace())
    monkeypatch.setattr("ollie_compile.measure.bounds.bound_seconds", lambda *_, **__: 1e-12)
    return clock


@pytest.fixture
def check(monkeypatch, clock):
    """The check of a derivation takes `seconds`."""
    check = SimpleNamespace(seconds=0.0, calls=0)

    def checked(*_):
        clock.now += check.seconds
        check.calls += 1

    monkeypatch.setattr("ollie_compile.plan.checks.check_derivation", checked)
    return check


@pytest.fixture
def compiling(monkeypatch, clock):
    """Compiling takes `seconds`, and every compiled candidate is faster than the original; called ones are
    not where `called` is above its 1."""
    compiling = SimpleNamespace(seconds=0.0, calls=0, called=2.0)

    def compiled(*_, **__):
        clock.now += compiling.seconds
        compiling.calls += 1

    times = iter([1.0])  # of the original

    monkeypatch.setattr(
        "ollie_compile.measure.timing.median_seconds", lambda *_, **__: next(times, compiling.called)
    )
    monkeypatch.setattr(calls, "compiled", compiled)
    monkeypatch.setattr(calls, "called", lambda *_, **__: SimpleNamespace(operators=0))
    monkeypatch.setattr(timing, "measure", lambda calls, stop: [*range(1, len(calls)), 100.0])
    return compiling


def conv(dtype=torch.float32):
    return operator(torch.zeros(1, 2, 8, 8, dtype=dtype), torch.zeros(3, 2, 3, 3, dtype=dtype), padding=1)


def rejected(made):
    return [candidate.rejected for candidate in made.candidates]


@pytest.mark.parametrize("config", [MODEL, MEASURE], ids=["model", "measure"])
def test_no_check_begins_after_the_budget(check, config):
    check.seconds = 11.0
    made = planner.plan(conv(), config, 10.0)
    assert check.calls == 1
    assert set(rejected(made)) <= {candidates.OUT_OF_TIME, placing.LATER, "others need fewer products"}
    assert made.winner is None
    assert made.reason == candidates.OUT_OF_TIME


def test_a_check_that_would_not_end_in_time_does_not_begin(check):
    check.seconds = 6.0
    made = planner.plan(conv(), MODEL, 10.0)
    assert check.calls == 1
    assert made.winner is not None
    assert rejected(made).count(None) == 1
    assert rejected(made).count(candidates.OUT_OF_TIME) >= preparing.MAX_BOUNDED - 1


def test_checks_leave_time_to_measure(check, compiling):
    check.seconds, compiling.seconds = 2.0, 1.0
    made = planner.plan(conv(), MEASURE, 10.0)
    assert check.calls == 3
    assert compiling.calls == 3
    assert made.winner is not None
    assert made.reason == "measured fastest"


def test_no_compilation_begins_that_would_not_end_in_time(check, compiling):
    compiling.seconds = 6.0
    made = planner.plan(conv(), MEASURE, 13.0)  # the winner is compiled in its graph as well
    assert compiling.calls == 1
    assert made.winner is not None
    assert made.winner.compile_s == 6.0
    assert candidates.OUT_OF_TIME in rejected(made)


def test_a_winner_has_time_to_be_compiled_in_all_its_places(check, compiling):
    compiling.seconds = 2.0
    made = planner.plan_all({conv(): 4}, MEASURE, 9.9)[conv()]
    assert compiling.calls == 1  # nothing was known of how long it takes
    assert made.winner is None
    assert made.reason == candidates.OUT_OF_TIME
    assert not made.complete
    assert planner.plan_all({conv(): 4}, MEASURE, 50.0)[conv()].winner is not None


def test_what_no_compilation_can_pay_for_does_not_begin(check, compiling):
    pace.pace.took(2.0, operators=0)
    made = planner.plan_all({conv(): 4}, MEASURE, 9.9)[conv()]
    assert compiling.calls == 0
    assert made.reason == candidates.OUT_OF_TIME


def test_a_known_winner_is_left_out_where_it_has_too_many_places(check, compiling):
    compiling.seconds = 1.0
    known = planner.plan(conv(), MEASURE, 20.0)
    assert known.complete
    assert planner.plan_all({conv(): 20}, MEASURE, 20.0)[conv()] is known
    assert planner.plan_all({conv(): 21}, MEASURE, 20.0)[conv()].winner is None
    assert planner.plan_all({conv(): 1}, MEASURE, 20.0)[conv()] is known


def test_time_for_what_wins_is_not_given_to_other_operators(monkeypatch, check):
    small, large = conv(), conv(torch.float64)
    seen = []

    def decide(made, config, stop):
        seen.append(stop)
        made.winner = candidates.Candidate(None, None, compile_s=0.5)

    monkeypatch.setattr(choice, "decide", decide)
    monkeypatch.setattr("ollie_compile.plan.saved.save", lambda *_: None)
    planner.plan_all({small: 1, large: 9}, MEASURE, 10.0)
    assert seen == pytest.approx([9.0, 5.5])


def test_the_pace_of_compilations_is_that_of_earlier_ones():
    fresh = pace.Pace()
    unknown = fresh.seconds(100)
    assert unknown == pytest.approx(pace.CANDIDATE_S + 100 * pace.OPERATOR_S)
    fresh.took(3 * unknown, operators=100)
    assert fresh.seconds(200) == pytest.approx(3 * (pace.CANDIDATE_S + 200 * pace.OPERATOR_S))


def test_what_is_faster_as_it_is_called_wins_without_time_to_compile(check, compiling):
    compiling.seconds, compiling.called, check.seconds = 100.0, 0.5, 6.0
    made = planner.plan(conv(), MEASURE, 10.0)
    assert check.calls == 1
    assert compiling.calls == 0
    assert made.winner is not None


@pytest.mark.parametrize(
    ("module", "step", "share"), [(preparing, "prepare", planner.PREPARED), (choice, "decide", 1.0)]
)
def test_time_goes_to_operators_by_what_they_take_and_then_by_what_they_can_gain(
    module, step, share, monkeypatch, check
):
    small, large = conv(), conv(torch.float64)
    seen = []
    monkeypatch.setattr(module, step, lambda made, config, stop: seen.append((made.operator, stop)))
    planner.plan_all({small: 1, large: 9}, MEASURE, 10.0)
    assert [operator for operator, _ in seen] == [large, small]
    assert [stop for _, stop in seen] == pytest.approx([9.0 * share, 10.0 * share])


def test_bounds_leave_time_to_check(monkeypatch, clock, check):
    def bound(*_, **__):
        clock.now += 2.0
        return 1e-12

    monkeypatch.setattr("ollie_compile.measure.bounds.bound_seconds", bound)
    made = planner.plan(conv(), MODEL, 10.0)
    assert check.calls == 3
    assert made.winner is not None
    assert candidates.OUT_OF_TIME in rejected(made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_exact_result_is_computed_once_for_an_operator(monkeypatch, clock, dtype):
    calls = []
    reference = type(conv()).reference

    def counted(self, *inputs):
        calls.append(inputs[0].dtype)
        return reference(self, *inputs)

    monkeypatch.setattr(type(conv()), "reference", counted)
    made = planner.plan(conv(dtype), MODEL, 10.0)
    assert sum(candidate.error is not None for candidate in made.candidates) >= 3
    assert calls.count(torch.float64) == 1


@pytest.mark.parametrize("tune", ["model", "measure"])
def test_a_plan_cut_by_its_budget_is_kept_for_budgets_no_larger(check, compiling, tune):
    config = lambda budget_s: OllieConfig(tune=tune, margin=0.0, budget_s=budget_s)  # noqa: E731
    check.seconds = 11.0
    cut = planner.plan(conv(), config(10.0), 10.0)
    assert not cut.complete
    assert planner.plan(conv(), config(10.0), 10.001) is cut
    assert planner.plan(conv(), config(1.0), 1.0) is cut
    assert check.calls == 1
    better = planner.plan(conv(), config(100.0), 100.0)
    assert better.winner is not None
    assert planner.plan(conv(), config(1.0), 1.0) is better


def test_a_complete_plan_is_kept_for_any_budget_but_none(clock):
    made = planner.plan(conv(), MODEL, 10.0)
    assert made.complete
    assert planner.plan(conv(), MODEL, 1000.0) is made
    none = OllieConfig(tune="model", margin=0.0, candidates=3, budget_s=0)
    assert planner.plan(conv(), none, 0.0).winner is None
    assert planner.plan(conv(), MODEL, 10.0) is made


@pytest.mark.parametrize(("stop", "rounds"), [(-1.0, timing.FEWEST_ROUNDS), (float("inf"), timing.ROUNDS)])
def test_measuring_ends_with_the_budget_after_a_few_rounds(monkeypatch, stop, rounds):
    monkeypatch.setattr(timing, "time", Clock())
    monkeypatch.setattr(timing, "SAMPLE_S", 0.0)  # one call a sample
    calls = []
    timing.measure([lambda: calls.append("a"), lambda: calls.append("b")], stop)
    assert calls[4:] == ["a", "b"] * rounds


def test_an_exact_result_stands_for_the_one_that_would_be_computed():
    exact = checks.exact_results(conv())
    assert [result.dtype for result in exact] == [torch.float64]
    assert checks.rounding_error(conv(), None, exact) == checks.rounding_error(conv(), None)
