"""The harness of scripts/bench on toy contenders, and the options of every script."""

import contextlib
import csv
import importlib
import os
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts" / "bench"))
import common
import harness
from harness import (
    Contender,
    OwnProcess,
    Race,
    Times,
    Timing,
    close,
    in_own_process,
    require_equal,
    same,
    timed,
)

BENCH = Path(harness.__file__).parent
SCRIPTS = sorted(path.stem for path in BENCH.glob("*.py") if "__main__" in path.read_text("utf-8"))


def toys(names, log):
    """Contenders that write their name down when they are called, and give 1."""

    def toy(name):
        return lambda: log.append(name) or 1

    return {name: toy(name) for name in names}


def test_each_round_has_a_new_order_and_each_turn_an_untimed_call():
    log = []
    race = Race(toys("abcde", log), equal=same)
    assert race.check() == dict.fromkeys("abcde")
    assert log == list("abcde")
    log.clear()
    times = race.run(6)
    rounds = [log[start : start + 10] for start in range(0, 60, 10)]
    assert all(turns[::2] == turns[1::2] for turns in rounds)  # an untimed and a timed call
    assert all(sorted(turns[::2]) == list("abcde") for turns in rounds)
    assert len({tuple(turns) for turns in rounds}) == 6
    assert [len(each) for each in times.values()] == [6] * 5
    Race(toys("abcde", again := []), equal=same).run(6)
    assert again[5:] == log
    Race(toys("abcde", other := []), equal=same, seed=1).run(6)
    assert other[5:] != log


def test_samples_and_calls_of_a_turn():
    log = []
    times = Race(toys("a", log), equal=None, keep=True).run(2, untimed=2, samples=3, calls=4)
    assert len(log) == 2 * (2 + 3 * 4)
    assert times["a"].results == [1] * 6


@pytest.fixture
def clock(monkeypatch):
    """Advances all of the harness's clocks by so many seconds."""
    now = [0.0]
    monkeypatch.setattr(harness, "clocks", lambda: (now[0], now[0], now[0]))

    def advance(seconds):
        now[0] += seconds

    return advance


def test_the_time_is_that_of_one_call(clock):
    assert timed(lambda: clock(2), calls=3) == Timing(2.0, 2.0, 2.0, None)
    race = Race({"slow": lambda: clock(5), "fast": lambda: clock(1)}, equal=None)
    times = race.run(2, calls=3)
    assert times["slow"].wall == [5.0, 5.0]
    assert times["fast"].median == 1.0


def test_the_clocks_are_those_of_the_wall_the_thread_and_the_process():
    before = harness.clocks()
    time.sleep(0.02)
    wall, thread, process = (now - start for now, start in zip(harness.clocks(), before, strict=True))
    assert wall >= 0.02
    assert thread >= 0
    assert process >= 0


def test_setup_surrounds_each_sample_and_is_not_timed(clock):
    log = []

    @contextlib.contextmanager
    def setup():
        clock(100)
        log.append("in")
        yield
        log.append("out")
        clock(100)

    def call():
        clock(3)
        log.append("call")

    times = Race({"a": Contender(call, setup)}, equal=None).run(1, samples=2)
    assert log == ["in", "call", "out"] * 3
    assert times["a"].wall == [3.0, 3.0]


def test_unequal_results_are_not_timed():
    log = []
    race = Race({**toys("a", log), "b": lambda: log.append("b") or 2}, equal=same)
    with pytest.raises(RuntimeError, match="b must give the reference's result: got 2, want 1"):
        race.run(3)
    assert log == ["a", "b"]
    assert race.times == {"a": [], "b": []}


def test_results_are_compared_with_the_one_wanted_unless_a_contender_is_not_exact():
    calls = {"a": lambda: 2.0, "b": Contender(lambda: 3.0, exact=False)}
    with pytest.raises(RuntimeError, match="a must give"):
        Race(calls, equal=close(rtol=0.1, atol=0), want=1.0).run(1)
    race = Race(calls, equal=close(rtol=0.1, atol=0), want=2.1)
    race.run(1)
    assert race.errors == {"a": None}


def test_same_knows_values_and_tensors():
    for got, want in ((1, 1), ((1, "a"), (1, "a")), (torch.arange(3), torch.arange(3))):
        same(got, want)
    for got, want in (
        (1, 2),
        ([1], [1, 2]),
        (torch.arange(3), torch.arange(4)),
        (torch.ones(2), torch.ones(1)),
    ):
        with pytest.raises(AssertionError, match="want"):
            same(got, want)


def test_what_equality_returns_is_kept():
    assert require_equal([("a", 4), ("b", 5)], lambda got, want: abs(got - want)) == {"a": 0, "b": 1}


@contextlib.contextmanager
def counting(start, folder):
    """A toy whose call gives its process and how often it was called; leaving it makes a file in `folder`."""
    count = [start]

    def call():
        count[0] += 1
        return os.getpid(), count[0], os.environ.get("TOY")

    yield call
    (folder / str(os.getpid())).touch()


def square(number):
    return {"square": number * number, "process": os.getpid(), "toy": os.environ.get("TOY")}


def equal_counts(got, want):
    assert got[1] == want[1], f"{got[1]} is not {want[1]}"


def test_contenders_of_this_and_of_their_own_process_are_timed_side_by_side(monkeypatch, tmp_path):
    monkeypatch.delenv("TOY", raising=False)
    with contextlib.ExitStack() as stack:
        here = stack.enter_context(counting(3, tmp_path))
        there = OwnProcess(counting, 3, tmp_path, environment={"TOY": "yes"})
        stack.enter_context(contextlib.closing(there))
        race = Race({"here": here, "there": there}, equal=equal_counts, keep=True)
        times = race.run(2, samples=2)
    process = times["there"].results[0][0]
    assert process != os.getpid()
    # One call to compare, then in each round an untimed one and two that are timed.
    assert times["here"].results == [(os.getpid(), count, None) for count in (6, 7, 9, 10)]
    assert times["there"].results == [(process, count, "yes") for count in (6, 7, 9, 10)]
    assert all(each.wall > 0 for each in times["there"])
    assert {path.name for path in tmp_path.iterdir()} == {str(os.getpid()), str(process)}
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_unequal_results_of_another_process_are_not_timed(tmp_path):
    with contextlib.closing(OwnProcess(counting, 1, tmp_path)) as there:
        with pytest.raises(RuntimeError, match="there must give the reference's result: 2 is not 1"):
            Race({"here": lambda: (0, 1), "there": there}, equal=equal_counts).run(1)
        assert there.turn(untimed=0)[0].result[1] == 3


def test_a_function_in_a_process_of_its_own(monkeypatch):
    monkeypatch.delenv("TOY", raising=False)
    found = in_own_process(square, 7, environment={"TOY": "yes"})
    assert found["process"] != os.getpid()
    assert (found["square"], found["toy"]) == (49, "yes")
    assert "TOY" not in os.environ


def test_what_fails_in_another_process_is_an_error():
    with pytest.raises(TypeError):
        in_own_process(square, "x")
    with pytest.raises(BrokenProcessPool):
        in_own_process(os._exit, 1)


def test_columns_are_median_and_spread():
    walls = [3.0, 1.0, 2.0, 10.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]
    times = Times(Timing(wall, wall / 2, wall) for wall in walls)
    assert times.columns("s") == {"median_s": 5.5, "p10_s": 2.0, "p90_s": 10.0, "cpu_s": 2.75}
    named = times.columns("ms", median="ms", parts=2)
    assert named == {"ms": 2750.0, "p10_ms": 1000.0, "p90_ms": 5000.0, "cpu_ms": 1375.0}


def test_a_table_is_appended_to_its_csv_and_printed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    for value in (1.5, 2.5):
        table = common.Table("toy", "A toy", "no conditions")
        table.add("a", ms=value)
        table.add("a", note="none")
        table.finish()
    with (tmp_path / "toy.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == ("date", "versions", "machine", "config", "contender", "metric", "value")
    assert [(row["contender"], row["metric"], row["value"]) for row in rows] == [
        ("a", "ms", "1.5"),
        ("a", "note", "none"),
        ("a", "ms", "2.5"),
        ("a", "note", "none"),
    ]
    assert {row["config"] for row in rows} == {"no conditions"}
    assert "A toy" in capsys.readouterr().out


CHOSEN = ("--seq-len", "9", "--nets", "b", "a", "--tiny", "--out", "folder", "--lr", "2")


def test_options(monkeypatch):
    options = {
        "seq_len": 8,
        "lr": 1e-3,
        "nets": common.option(["a"], choices=("a", "b")),
        "tiny": False,
        "out": common.option(Path, "a folder"),
        "name": "x",
    }
    monkeypatch.setattr(sys, "argv", ["toy"])
    parsed = common.parse("A toy.", **options)
    assert vars(parsed) == {
        "seq_len": 8,
        "lr": 1e-3,
        "nets": ["a"],
        "tiny": False,
        "out": None,
        "name": "x",
    }
    assert str(parsed) == "seq-len 8, lr 0.001"
    monkeypatch.setattr(sys, "argv", ["toy", *CHOSEN])
    parsed = common.parse("A toy.", **options)
    assert (parsed.seq_len, parsed.lr, parsed.nets) == (9, 2.0, ["b", "a"])
    assert (parsed.tiny, parsed.out) == (True, Path("folder"))
    monkeypatch.setattr(sys, "argv", ["toy", "--nets", "c"])
    with pytest.raises(SystemExit):
        common.parse("A toy.", **options)


def test_there_are_scripts():
    assert len(SCRIPTS) == 18
    assert "lemo_main" in SCRIPTS


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_says_what_it_does(name, monkeypatch, capsys):
    module = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert (module.__doc__ or "").strip().splitlines()[0] in shown
    assert f"scripts/bench/{name}.py" in shown
