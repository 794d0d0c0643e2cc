"""Planning within a budget: a clock that only the checks and compilations move."""

import random
from types import SimpleNamespace

import pytest
import torch

from ollie_compile.config import OllieConfig
from ollie_compile.measure import pace, timing
from ollie_compile.measure.machine import Machine
from ollie_compile.plan import candidates, checks, choice, placing, planner, preparing
from ollie_compile.plan.context import Context
from tests.ollie.strategies import operator

MODEL = OllieConfig(tune="model", margin=0.0, candidates=3)
MEASURE = OllieConfig(margin=0.0, candidates=3)


class Still(Machine):
    """A machine whose clock stands still unless it is moved, and where every candidate seems better.

    Calls take 1 s, and no call is compiled unless the test says how long that takes.
    """

    def __init__(self):
        super().__init__()
        self.clock_s = 0.0
        self.bounding_s = 0.0

    def now(self):
        return self.clock_s

    def least_seconds(self, call, *, budget_s=0.0):
        return 1.0

    def bound_seconds(self, program, dtype, device, *, limit=0.0):
        self.clock_s += self.bounding_s
        return 1e-12


class Compiling(Still):
    """Compiling takes `seconds`, and every compiled candidate is faster than the original.

    The original takes 1 s; candidates that are only called take `candidate_s`.
    """

    def __init__(self):
        super().__init__()
        self.seconds, self.calls, self.candidate_s = 0.0, 0, 2.0
        self.times = iter([1.0])

    def called(self, function, inputs, constant):
        return SimpleNamespace(operators=0)

    def compiled(self, function, inputs, constant):
        self.clock_s += self.seconds
        self.calls += 1
        return lambda: None

    def least_seconds(self, call, *, budget_s=0.0):
        return next(self.times, self.candidate_s)

    def measure(self, calls, deadline=0.0):
        return [*range(1, len(calls)), 100.0]


@pytest.fixture
def context():
    return Context(Still())


@pytest.fixture
def check(context):
    """The check of a derivation takes `seconds`."""
    check = SimpleNamespace(seconds=0.0, calls=0)

    class Counted(checks.Checks):
        def check_derivation(self, derived):
            self.machine.clock_s += check.seconds
            check.calls += 1

    context.checks = check.checks = Counted
    return check


@pytest.fixture
def compiling(context):
    context.machine = Compiling()
    return context.machine


def conv(dtype=torch.float32):
    return operator(torch.zeros(1, 2, 8, 8, dtype=dtype), torch.zeros(3, 2, 3, 3, dtype=dtype), padding=1)


def rejected(made):
    return [candidate.rejected for candidate in made.candidates]


@pytest.mark.parametrize("config", [MODEL, MEASURE], ids=["model", "measure"])
def test_no_check_begins_after_the_budget(context, check, config):
    check.seconds = 11.0
    made = planner.plan(conv(), config, 10.0, context)
    assert check.calls == 1
    assert set(rejected(made)) <= {candidates.OUT_OF_TIME, placing.LATER, "others need fewer products"}
    assert made.winner is None
    assert made.reason == candidates.OUT_OF_TIME


def test_a_check_that_would_not_end_in_time_does_not_begin(context, check):
    check.seconds = 6.0
    made = planner.plan(conv(), MODEL, 10.0, context)
    assert check.calls == 1
    assert made.winner is not None
    assert rejected(made).count(None) == 1
    assert rejected(made).count(candidates.OUT_OF_TIME) >= preparing.MAX_BOUNDED - 1


def test_a_candidate_whose_check_fails_leaves_the_others(context, check, caplog, monkeypatch):
    raised = iter([RuntimeError("no such dimension")])

    def fault(self, candidate):
        if (error := next(raised, None)) is not None:
            raise error

    monkeypatch.setattr(check.checks, "_fault", fault)
    made = planner.plan(conv(), MODEL, 10.0, context)
    assert "its check failed: no such dimension" in rejected(made)
    assert made.winner is not None
    assert "is dropped, it raised" in caplog.text
    caplog.clear()


def test_checks_leave_time_to_measure(context, check, compiling):
    check.seconds, compiling.seconds = 2.0, 1.0
    made = planner.plan(conv(), MEASURE, 10.0, context)
    assert check.calls == 3
    assert compiling.calls == 3
    assert made.winner is not None
    assert made.reason == "measured fastest"


def test_noise_of_a_few_percent_does_not_change_the_winner(context, check, compiling):
    winners = set()
    for first, second in ((1.0, 1.04), (1.04, 1.0), (1.0, 1.0), (1.02, 0.99)):
        context.reset()
        compiling.times = iter([1.0])
        times = [first, second, 1.3, *[100.0] * 9]
        compiling.measure = lambda calls, deadline, times=times: times[: len(calls)]
        made = planner.plan(conv(), MEASURE, 10.0, context)
        winners.add(str(made.winner.program))
    assert len(winners) == 1


class Noisy(Compiling):
    """Every time that is measured differs by up to 2% from what it should be."""

    def __init__(self, seed):
        super().__init__()
        self.random = random.Random(seed)
        self.times = iter([1.0, 1.0])  # of the original, in both of its layouts
        self.candidate_s = 0.5

    def noise(self):
        return self.random.uniform(0.98, 1.02)

    def bound_seconds(self, program, dtype, device, *, limit=0.0):
        return 0.1 * self.noise()

    def least_seconds(self, call, *, budget_s=0.0):
        return super().least_seconds(call) * self.noise()

    def measure(self, calls, deadline=0.0):
        return [self.noise() * (0.5 if place < len(calls) - 2 else 1.0) for place in range(len(calls))]


@pytest.mark.parametrize("tune", ["model", "measure"])
def test_noise_decides_nothing_among_equally_fast_programs(check, tune):
    """Bounds, timings as called and timings in turn are all equal but for noise."""
    winners = set()
    for seed in range(4):
        noisy = Context(Noisy(seed), checks=check.checks)
        made = planner.plan(conv(), OllieConfig(tune=tune, margin=0.0, candidates=2), 1e6, noisy)
        assert made.winner is not None
        winners.add((str(made.winner.program), made.winner.program.kernels))
    assert len(winners) == 1


def test_of_equally_fast_candidates_the_one_with_the_least_work_wins(compiling):
    """Whatever their bounds, which are measured."""
    light, heavy = (candidates.Candidate(None, None, order=order, bound_s=2.0 - order) for order in range(2))
    made = candidates.Plan(conv(), 1.0, candidates=[heavy, light])
    compiling.measure = lambda calls, deadline: [0.50, 0.51, *[1.0] * (len(calls) - 2)]
    choice._compare(made, MEASURE, compiling, {heavy: None, light: None}, 0.0)
    assert made.winner is light


def test_times_that_differ_by_noise_keep_their_order():
    times = {"a": 1.04, "b": 1.0, "c": 2.0, "d": 1.06, "e": float("inf"), "f": float("inf")}
    assert "".join(timing.fastest_first(times, times.__getitem__)) == "abdcef"
    assert "".join(timing.fastest_first(times, times.__getitem__, noise=0.0)) == "badcef"


def test_no_compilation_begins_that_would_not_end_in_time(context, check, compiling):
    compiling.seconds = 6.0
    made = planner.plan(conv(), MEASURE, 13.0, context)  # the winner is compiled in its graph as well
    assert compiling.calls == 1
    assert made.winner is not None
    assert made.winner.compile_s == 6.0
    assert candidates.OUT_OF_TIME in rejected(made)


def test_a_winner_has_time_to_be_compiled_in_all_its_places(context, check, compiling):
    compiling.seconds = 2.0
    made = planner.plan_all({conv(): 4}, MEASURE, 9.9, context)[conv()]
    assert compiling.calls == 1  # nothing was known of how long it takes
    assert made.winner is None
    assert made.reason == candidates.OUT_OF_TIME
    assert not made.complete
    assert planner.plan_all({conv(): 4}, MEASURE, 50.0, context)[conv()].winner is not None


def test_what_no_compilation_can_pay_for_does_not_begin(context, check, compiling):
    compiling.pace.took(2.0, operators=0)
    made = planner.plan_all({conv(): 4}, MEASURE, 9.9, context)[conv()]
    assert compiling.calls == 0
    assert made.reason == candidates.OUT_OF_TIME


def test_a_known_winner_is_left_out_where_it_has_too_many_places(context, check, compiling):
    compiling.seconds = 1.0
    known = planner.plan(conv(), MEASURE, 20.0, context)
    assert known.complete
    assert planner.plan_all({conv(): 20}, MEASURE, 20.0, context)[conv()] is known
    assert planner.plan_all({conv(): 21}, MEASURE, 20.0, context)[conv()].winner is None
    assert planner.plan_all({conv(): 1}, MEASURE, 20.0, context)[conv()] is known


def test_time_for_what_wins_is_not_given_to_other_operators(context, check):
    small, large = conv(), conv(torch.float64)
    seen = []

    class Winning(planner.Planner):
        def decide(self, plan, deadline):
            seen.append(deadline)
            plan.winner = candidates.Candidate(None, None, compile_s=0.5)

        def keep(self, plan):
            pass

    Winning(context, MEASURE, 10.0).plan_all({small: 1, large: 9})
    assert seen == pytest.approx([9.0, 5.5])


def test_the_pace_of_compilations_is_that_of_earlier_ones():
    fresh = pace.Pace()
    unknown = fresh.seconds(100)
    assert unknown == pytest.approx(pace.ALONE_S + 100 * pace.OPERATOR_S)
    fresh.took(3 * unknown, operators=100)
    assert fresh.seconds(200) == pytest.approx(3 * (pace.ALONE_S + 200 * pace.OPERATOR_S))


def test_what_is_faster_as_it_is_called_wins_without_time_to_compile(context, check, compiling):
    compiling.seconds, compiling.candidate_s, check.seconds = 100.0, 0.5, 6.0
    made = planner.plan(conv(), MEASURE, 10.0, context)
    assert check.calls == 1
    assert compiling.calls == 0
    assert made.winner is not None


@pytest.mark.parametrize(("step", "share"), [("prepare", planner.PREPARED), ("decide", 1.0)])
def test_time_goes_to_operators_by_what_they_take_and_then_by_what_they_can_gain(context, step, share, check):
    small, large = conv(), conv(torch.float64)
    seen = []
    planning = planner.Planner(context, MEASURE, 10.0)
    setattr(planning, step, lambda plan, deadline: seen.append((plan.operator, deadline)))
    planning.plan_all({small: 1, large: 9})
    assert [operator for operator, _ in seen] == [large, small]
    assert [deadline for _, deadline in seen] == pytest.approx([9.0 * share, 10.0 * share])


def test_bounds_leave_time_to_check(context, check):
    context.machine.bounding_s = 2.0
    made = planner.plan(conv(), MODEL, 10.0, context)
    assert check.calls == 3
    assert made.winner is not None
    assert candidates.OUT_OF_TIME in rejected(made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_exact_result_is_computed_once_for_an_operator(context, monkeypatch, dtype):
    calls = []
    reference = type(conv()).reference

    def counted(self, *inputs):
        calls.append(inputs[0].dtype)
        return reference(self, *inputs)

    monkeypatch.setattr(type(conv()), "reference", counted)
    made = planner.plan(conv(dtype), MODEL, 10.0, context)
    assert sum(candidate.error is not None for candidate in made.candidates) >= 3
    assert calls.count(torch.float64) == 1


@pytest.mark.parametrize("tune", ["model", "measure"])
def test_a_plan_cut_by_its_budget_is_kept_for_budgets_no_larger(context, check, compiling, tune):
    config = lambda budget_s: OllieConfig(tune=tune, margin=0.0, budget_s=budget_s)  # noqa: E731
    check.seconds = 11.0
    cut = planner.plan(conv(), config(10.0), 10.0, context)
    assert not cut.complete
    assert planner.plan(conv(), config(10.0), 10.001, context) is cut
    assert planner.plan(conv(), config(1.0), 1.0, context) is cut
    assert check.calls == 1
    better = planner.plan(conv(), config(100.0), 100.0, context)
    assert better.winner is not None
    assert planner.plan(conv(), config(1.0), 1.0, context) is better


def test_a_complete_plan_is_kept_for_any_budget_but_none(context):
    made = planner.plan(conv(), MODEL, 10.0, context)
    assert made.complete
    assert planner.plan(conv(), MODEL, 1000.0, context) is made
    none = OllieConfig(tune="model", margin=0.0, candidates=3, budget_s=0)
    assert planner.plan(conv(), none, 0.0, context).winner is None
    assert planner.plan(conv(), MODEL, 10.0, context) is made


@pytest.mark.parametrize(
    ("deadline", "rounds"), [(-1.0, timing.FEWEST_ROUNDS), (float("inf"), timing.ROUNDS)]
)
def test_measuring_ends_with_the_budget_after_a_few_rounds(deadline, rounds, monkeypatch):
    calls = []
    monkeypatch.setattr(timing, "_settled", lambda times: True)
    both = [lambda: calls.append("a"), lambda: calls.append("b")]
    timing.measure(both, deadline, sample_s=0.0, now=lambda: 0.0)  # one call a sample
    assert calls[4:] == ["a", "b"] * rounds


@pytest.mark.parametrize("seed", range(3))
def test_what_other_programs_take_is_not_measured(seed, monkeypatch):
    """Beside busy programs calls take up to ten times as long, for four fifths of the time."""
    draw, now = random.Random(seed), 0.0
    true = [20e-6, 18e-6, 300e-6]
    slower = [1 if draw.random() < 0.2 else draw.uniform(1.5, 10) for _ in range(10_000)]  # of each 0.5 ms

    def call(seconds):
        nonlocal now
        now += seconds * slower[int(now / 0.0005) % len(slower)]

    monkeypatch.setattr(timing.clock, "of_calls", lambda: now)
    times = timing.measure([lambda seconds=seconds: call(seconds) for seconds in true], now=lambda: 0.0)
    assert times == pytest.approx(true)
    assert timing.least_seconds(lambda: call(true[0])) == pytest.approx(true[0])


def test_a_quiet_machine_is_measured_in_fewer_rounds_than_a_busy_one(monkeypatch):
    draw, now, calls, quiet = random.Random(0), 0.0, 0, True

    def call():
        nonlocal now, calls
        calls += 1
        now += 0.001 * (1 if quiet else draw.uniform(1, 10))

    monkeypatch.setattr(timing.clock, "of_calls", lambda: now)
    timing.measure([call], now=lambda: 0.0)
    assert calls == 2 + timing.ROUNDS
    calls, quiet = 0, False
    timing.measure([call], now=lambda: 0.0)
    assert calls > 2 * timing.ROUNDS


def test_an_exact_result_stands_for_the_one_that_would_be_computed():
    exact = checks.exact_results(conv())
    assert [result.dtype for result in exact] == [torch.float64]
    assert checks.rounding_error(conv(), None, exact) == checks.rounding_error(conv(), None)
