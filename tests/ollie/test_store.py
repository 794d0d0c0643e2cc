"""The cache on disk: whole entries or none, whoever writes, is killed or has edited them."""

import json
import logging
import multiprocessing
import os
import time

import pytest
import torch
from torch import nn

import ollie_compile
from ollie_compile import backend, store
from ollie_compile.cli import main
from ollie_compile.config import OllieConfig
from ollie_compile.plan import planner, saved
from ollie_compile.problems.gradients import Gradient
from tests.ollie.strategies import operator

MODEL = OllieConfig(tune="model", margin=0.0)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("OLLIE_CACHE_DIR", str(tmp_path / "plans"))
    backend.CONTEXT.reset()
    yield tmp_path / "plans"
    backend.CONTEXT.reset()


def conv(**options):
    return operator(torch.zeros(1, 4, 6, 6), torch.zeros(2, 4, 3, 3), padding=1, **options)


def planned(budget_s=60.0):
    backend.CONTEXT.reset()
    return planner.plan(conv(), MODEL, budget_s, backend.CONTEXT)


@pytest.fixture
def low_bounds(monkeypatch):
    monkeypatch.setattr("ollie_compile.measure.bounds.bound_seconds", lambda *_, **__: 1e-12)


@pytest.fixture
def no_search(monkeypatch):
    def forbid():
        monkeypatch.setattr(
            "ollie_compile.plan.preparing.search", lambda *_, **__: pytest.fail("a search began")
        )

    return forbid


def test_a_kept_plan_is_the_plan(folder, low_bounds, no_search):
    made = planned()
    no_search()
    again = planned()
    assert again is not made
    assert again.winner.program == made.winner.program
    assert [step.rules for step in again.winner.derivation.steps] == [
        step.rules for step in made.winner.derivation.steps
    ]
    assert again.reason == made.reason + saved.EARLIER
    assert saved.entry_name(conv(), MODEL) != saved.entry_name(conv(), OllieConfig(tolerance=1.0))


def test_plans_of_gradients_are_kept(folder, low_bounds, no_search):
    forward = conv()
    wanted = Gradient(forward=forward, of="input", gradient=forward.output, result=forward.input)
    made = planner.plan(wanted, MODEL, 60.0, backend.CONTEXT)
    backend.CONTEXT.reset()
    no_search()
    assert planner.plan(wanted, MODEL, 60.0, backend.CONTEXT).winner.program == made.winner.program


def test_a_warm_start_neither_searches_nor_measures(folder, fresh, uncompiled, monkeypatch, no_search):
    net, x = nn.Conv2d(4, 2, 3, padding=1).eval(), torch.randn(1, 4, 6, 6)
    first = ollie_compile.explain(net, x, margin=0.0, candidates=1)
    no_search()
    backend.CONTEXT.reset()
    monkeypatch.setattr(
        "ollie_compile.measure.timing.measure", lambda *_: pytest.fail("something is measured")
    )
    again = ollie_compile.explain(net, x, margin=0.0, candidates=1)
    assert again.rewritten == first.rewritten
    monkeypatch.undo()


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "\0" * len(text),
        lambda text: "\udcff" * 9,
        lambda text: "[" * 100_000,
        lambda text: json.dumps({"name": "x", "checksum": "y", "content": {}}),
        lambda text: text.replace("rows", "rowz").replace("columns", "rowz").replace("batched", "rowz"),
    ],
    ids=["empty", "cut", "zeros", "no text", "deep", "foreign", "edited"],
)
def test_a_damaged_entry_is_ignored_aloud(folder, low_bounds, caplog, damage):
    made = planned()
    (path,) = folder.glob("*/plan-*.json")
    path.write_text(damage(path.read_text()), "utf-8", "surrogateescape")
    with caplog.at_level(logging.WARNING):
        again = planned()
    assert "is ignored" in caplog.text
    assert again.winner.program == made.winner.program
    assert saved.EARLIER not in again.reason
    assert planned().reason.endswith(saved.EARLIER)  # it has been written anew


def test_entries_of_other_versions_and_devices_are_not_met(folder, low_bounds, monkeypatch):
    planned()
    for change in ("versions", "device_fingerprint"):
        monkeypatch.setattr(store, change, lambda *_: "another")
        assert saved.EARLIER not in planned().reason
        monkeypatch.undo()
        monkeypatch.setenv("OLLIE_CACHE_DIR", str(folder))


def test_a_plan_cut_by_its_budget_serves_no_larger_one(folder, low_bounds, monkeypatch):
    made = planned()
    made.stats.complete = False
    made.budget_s = 5.0
    saved.save(made, MODEL)
    assert saved.load(conv(), MODEL, 5.0) is not None
    assert saved.load(conv(), MODEL, 50.0) is None


def test_folders_are_their_users_alone_and_files_are_on_the_disk_before_they_are_seen(folder, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *given, n=name, f=real: calls.append(n) or f(*given))
    store.write("plan-aa", {"a": 1})
    assert calls == ["fsync", "replace"]
    for place in (folder, folder / "aa"):
        assert place.stat().st_mode & 0o777 == 0o700
    assert (folder / "aa" / "plan-aa.json").stat().st_mode & 0o777 == 0o600


def test_a_killed_writer_leaves_no_entry(folder, low_bounds, monkeypatch):
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        planned()
    monkeypatch.undo()
    monkeypatch.setenv("OLLIE_CACHE_DIR", str(folder))
    assert not [path for path in folder.rglob("*") if path.is_file()]
    torn = folder / "aa" / ".torn.tmp"
    torn.parent.mkdir(parents=True, exist_ok=True)
    torn.write_text("{")
    os.utime(torn, (0, time.time() - 2 * store.ABANDONED_S))
    store.write("plan-aa", {"a": 1})
    assert not torn.exists()
    assert store.read("plan-aa") == {"a": 1}


def _writer(place):
    for number in range(50):
        store.write("plan-ab", {"from": place, "values": [number] * 1000})
        entry = store.read("plan-ab")
        assert entry is not None
        assert len(set(entry["values"])) == 1


def test_processes_that_write_one_entry_at_once_read_whole_ones(folder):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_writer, args=(place,)) for place in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]


def test_the_oldest_go_when_the_limit_is_passed(folder, monkeypatch):
    monkeypatch.setenv("OLLIE_CACHE_MIB", "0.1")
    for number in range(20):
        store.write(f"plan-{number:02d}", {"values": "x" * 8000})
        os.utime(store._path(folder, f"plan-{number:02d}"), (number, number))
    left = sorted(path.stem for path in folder.rglob("*.json"))
    assert sum(path.stat().st_size for path in folder.rglob("*.json")) <= 0.1 * 2**20
    assert "plan-19" in left
    assert "plan-00" not in left
    monkeypatch.setenv("OLLIE_CACHE_MIB", "none")
    with pytest.raises(ValueError, match="OLLIE_CACHE_MIB must be a number of MiB above 0, got 'none'"):
        store.limit_bytes()


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path, monkeypatch, low_bounds, caplog):
    place = tmp_path / "file"
    place.write_text("")
    monkeypatch.setenv("OLLIE_CACHE_DIR", str(place))
    assert planned().winner is not None
    assert "is not written" in caplog.text


def test_plans_are_exported_and_imported(folder, low_bounds, no_search, capsys, monkeypatch):
    made = planned()

    def run(*words):
        monkeypatch.setattr("sys.argv", ["ollie", "plans", *map(str, words)])
        with pytest.raises(SystemExit) as done:
            main()
        return done.value.code, capsys.readouterr()

    file = folder.parent / "plans.json"
    assert "1 plans written" in run("export", file)[1].out
    assert "conv2d 1x4x6x6" in run("show")[1].out
    assert "entries removed" in run("clear")[1].out
    assert "0 plans" in run("show")[1].out
    exported = json.loads(file.read_text())
    ((name, entry),) = exported["plans"].items()
    wrong = json.loads(json.dumps(entry))
    wrong["winner"]["expression"] = entry["winner"]["expression"].replace(
        "K[f, c, r1, r2]", "K[f, c, r2, r1]"
    )
    others = {f"plan-{'1' * 64}": wrong, f"plan-{'2' * 64}": {"winner": 3}, "../x": entry}
    exported["plans"] = {name: entry, **others}
    file.write_text(json.dumps(exported))
    _, said = run("import", file)
    assert "1 plans taken, 3 refused" in said.out
    assert "its derivation differs" in said.err
    assert "it is no plan: it must have the fields operator" in said.err
    assert "refused '../x': its name must be `plan-` and the hash" in said.err
    no_search()
    assert planned().winner.program == made.winner.program
    code, said = run("import", file.with_name("missing.json"))
    assert code == 2
    assert said.err.startswith("ollie: No such file: ")
    assert said.err.count("\n") == 1
    file.write_text("{}")
    code, said = run("import", file)
    assert code == 2
    assert "must hold plans as `ollie plans export` writes them" in said.err
