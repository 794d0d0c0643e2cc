"""Plan files from elsewhere: what is no plan is refused in one sentence, and nothing in it is ever run."""

import copy
import json
import random
import re
import sys

import pytest
import torch

from ollie_compile import store
from ollie_compile.config import OllieConfig
from ollie_compile.plan import candidates, entries, saved
from ollie_compile.problems.dynamic import Dynamic
from ollie_compile.search.hybrid import search
from tests.ollie.strategies import operator

CONFIG = OllieConfig(tune="model", margin=0.0)


def conv():
    return operator(torch.zeros(1, 4, 6, 6), torch.zeros(2, 4, 3, 3), padding=1)


def dynamic():
    """A convolution of images of all sizes, by a product and additions."""
    base = operator(torch.zeros(2, 3, 12, 14), torch.zeros(4, 3, 3, 3), padding=1)
    return Dynamic(base=base, symbols=((0, None, 1, 2), (None,) * 4), hints=(2, 12, 14))


def planned(wanted, pick):
    """A plan whose winner is the first derivation that `pick` accepts, without a search of its programs."""
    found = search(wanted.expression(), max_depth=1, budget_s=60.0)
    derivation = next(one for one in found.derivations if pick(one.scope))
    program = next(entries._ways(derivation.scope, torch.device("cpu")))
    winner = candidates.Candidate(program, derivation, bound_s=1e-6, measured_s=1e-6, error=1e-7)
    if isinstance(wanted, Dynamic):
        assert wanted.refused(program, CONFIG) is None
    return candidates.Plan(wanted, 60.0, winner=winner, original_s=1e-3, reason="made", stats=found.stats)


@pytest.fixture(scope="module")
def bilinear():
    return entries.plain(planned(conv(), lambda scope: scope.constants()))


@pytest.fixture(scope="module")
def of_all_sizes():
    return entries.plain(planned(dynamic(), lambda scope: not scope.constants()))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("OLLIE_CACHE_DIR", str(tmp_path / "plans"))
    return tmp_path / "plans"


def changed(entry, *path, to):
    """A copy of an entry with another value at a path."""
    entry = copy.deepcopy(entry)
    at = entry
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = to
    return entry


def test_an_entry_is_its_plan(bilinear):
    made = entries.plan(json.loads(json.dumps(bilinear)), conv())
    assert made.winner.program.scope.constants()
    assert entries.plain(made) == changed(bilinear, "complete", to=made.complete)
    assert "bilinear decomposition" in entries.summary(bilinear)


REFUSED = {
    "no mapping": (lambda entry: [entry], "it must have the fields operator, expression"),
    "a field more": (lambda entry: {**entry, "run": "x"}, "it must have the fields"),
    "control characters": (
        lambda e: changed(e, "operator", to="\x1b[2J"),
        "`operator` must be a printable text",
    ),
    "a text that is none": (lambda e: changed(e, "reason", to=3), "`reason` must be a printable text, got 3"),
    "a time that is none": (
        lambda e: changed(e, "original_s", to=float("nan")),
        "`original_s` must be a number",
    ),
    "a negative budget": (
        lambda e: changed(e, "budget_s", to=-1.0),
        "`budget_s` must be a number, 0 or more",
    ),
    "counts": (lambda e: changed(e, "stats", "states", to="1"), "`stats` must be the counts of a search"),
    "a layout": (
        lambda e: changed(e, "winner", "layout", to="rowz"),
        "`layout` must be one of rows, columns",
    ),
    "a kernel": (
        lambda e: changed(e, "winner", "kernels", to=["cpp"]),
        "`kernels` must be a family of kernels",
    ),
    "no program": (
        lambda e: changed(e, "winner", "layout", to="convolution"),
        "must be a program that lowering",
    ),
    "a huge constant": (
        lambda e: changed(e, "winner", "constants", "G2x3", 1, 0, to="1e999999999"),
        "the values of G2x3 must be fractions, got '1e999999999'",
    ),
    "a quotient by 0": (
        lambda e: changed(e, "winner", "constants", "G2x3", 1, 0, to="1/0"),
        "the values of G2x3 must be fractions",
    ),
    "too few values": (
        lambda e: changed(e, "winner", "constants", "G2x3", 1, to=["1"]),
        "G2x3 must have a value for each entry",
    ),
    "a constant of an input's name": (
        lambda e: changed(e, "winner", "constants", "K", to=[[1], ["1"]]),
        "a constant must have a name of its own, got 'K'",
    ),
    "a name that is none": (
        lambda e: changed(e, "winner", "constants", "a.b", to=[[1], ["1"]]),
        "a constant must have a name, got 'a.b'",
    ),
    "another operator": (
        lambda e: changed(e, "expression", to=e["expression"].replace("0..4", "0..5")),
        "it must be a plan of this operator",
    ),
    "another box": (
        lambda e: changed(e, "winner", "expression", to="L[n:0..1] A[n, 0, 0, 0]"),
        "its winner must have the box",
    ),
    "no expression": (lambda e: changed(e, "winner", "expression", to="L["), "An expression must look like"),
    "deep": (
        lambda e: changed(e, "winner", "expression", to="L[i:0..1] {" * 5000),
        "must be nested less deeply",
    ),
    "steps that are none": (
        lambda e: changed(e, "winner", "steps", to=[["a", "b"]]),
        "`steps` must be a list of rules and expressions",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_plan_is_refused_in_a_sentence(bilinear, name):
    change, match = REFUSED[name]
    with pytest.raises(ValueError, match=match) as error:
        entries.winner(change(bilinear), conv().expression())
    assert "\n" not in str(error.value)


def test_programs_that_need_more_than_a_search_allows_are_refused(bilinear):
    box = "n:0..1, f:0..2, h:0..6, w:0..6"
    wide = f"L[{box}] {{L[n:0..1, f:0..2, h:0..60000000, w:0..6] A[n, f, h, w]}}[n, f, h, w]"
    with pytest.raises(ValueError, match="must make tensors of 4608 elements at most, got 720000000"):
        entries.winner(changed(bilinear, "winner", "expression", to=wide), conv().expression())
    long = f"L[{box}] Sum[c:0..4000000000] A[n, c, h, w] * K[f, c, 0, 0]"
    with pytest.raises(ValueError, match="must need 10368 products at most, got 288000000000"):
        entries.winner(changed(bilinear, "winner", "expression", to=long), conv().expression())


def test_a_wrong_winner_is_refused_where_it_is_read(folder, bilinear, caplog):
    """Whoever wrote it: its checksum is right, its algebra is not."""
    name = saved.entry_name(conv(), CONFIG)
    text = bilinear["winner"]["expression"]
    wrong = changed(bilinear, "winner", "constants", "G2x3", 1, 1, to="7")
    store.write(name, wrong)
    assert saved.load(conv(), CONFIG, 60.0) is None
    assert "differs" in caplog.text
    caplog.clear()
    store.write(name, changed(bilinear, "winner", "expression", to=text))
    assert saved.load(conv(), CONFIG, 60.0).winner.program.scope.constants()
    assert [one for one in caplog.records if one.name.startswith("ollie_compile")] == []


def test_entries_are_checked_once_for_their_content(folder, bilinear, monkeypatch):
    name = saved.entry_name(conv(), CONFIG)
    checked = []
    real = saved.Checks.passes
    monkeypatch.setattr(saved.Checks, "passes", lambda *given: checked.append(1) or real(*given))
    store.write(name, bilinear)
    for _ in range(2):
        assert saved.load(conv(), CONFIG, 60.0).winner is not None
    assert len(checked) == 1
    store.write(name, changed(bilinear, "budget_s", to=61.0))
    assert saved.load(conv(), CONFIG, 60.0).winner is not None
    assert len(checked) == 2
    made = planned(conv(), lambda scope: not scope.constants())
    saved.save(made, CONFIG)  # what this machine has found has been checked
    assert saved.load(conv(), CONFIG, 60.0).winner.program == made.winner.program
    assert len(checked) == 2


def test_calls_of_all_sizes_are_checked_at_several(of_all_sizes):
    entry = json.loads(json.dumps(of_all_sizes))
    assert entries.plan(entry, dynamic()).winner is not None
    calls = entry["winner"]["calls"]["calls"]
    assert '"terms"' in json.dumps(calls)
    calls.append(["aten.full.default", [[10**9], 1.0], {}])
    with pytest.raises(ValueError, match="its tensors must have 9792 elements at most at sizes"):
        entries.plan(entry, dynamic())
    results = entry["winner"]["calls"]["results"]
    calls[-1] = ["aten.mul.Tensor", [{"value": results[0]}, 2.0], {}]
    results[0] = len(calls) + 1  # after two inputs
    with pytest.raises(ValueError, match="differs by"):
        entries.plan(entry, dynamic())


NUMBERS = [None, True, -1, 0, 1e308, float("nan"), 2**63, 10**30]
TEXTS = ["", "A", "x" * 9, "../x", "\x1b[0m", "1/3", "aten.from_file.default", "antigravity.fly"]
FORMS = [[], {}, [[]], ["rows"], {"value": 0}, {"torch": "load"}, {"terms": [[1, [1]]]}]
FORMS += [{"type": "antigravity.fly", "context": "[]", "children_spec": []}]
CHARACTERS = ["0", "9", "*", "{", "]", " // 0", "A", ""]


def mutations(entry, draw):
    """An entry with one to three of its values exchanged, removed or damaged."""
    entry = copy.deepcopy(entry)
    for _ in range(draw.choice([1, 1, 2, 3])):
        holders = [entry]
        for holder in holders:
            values = holder.values() if isinstance(holder, dict) else holder
            holders += [value for value in values if isinstance(value, (dict, list)) and value]
        holder = draw.choice(holders)
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        key, other = draw.choice(keys), draw.choice(keys)
        value = holder[key]
        if draw.random() < 0.2:
            del holder[key]
        elif isinstance(value, str) and value and draw.random() < 0.5:
            at = draw.randrange(len(value))
            holder[key] = value[:at] + draw.choice(CHARACTERS) + value[at + 1 :]
        elif isinstance(value, int) and draw.random() < 0.5:
            holder[key] = value + draw.choice([-1, 1, 7, 2**31])
        else:
            odd = [copy.deepcopy(holder[other]), *NUMBERS, *TEXTS, *FORMS]
            holder[key] = draw.choice(odd)
    return entry


WATCHED = {
    "import",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.remove",
    "socket.connect",
    "ctypes.dlopen",
}
_seen: list[str] | None = None


def _watch(event, arguments):
    if _seen is not None and (event in WATCHED or (event == "open" and str(arguments[1]) not in ("r", "rb"))):
        _seen.append(f"{event} {arguments[:2]}")


def _is_expected(event, folder):
    """Torch imports modules of its own to say what is wrong with a call; files of the cache are written."""
    written = event.startswith("open (") and (str(folder.parent) in event or event[6].isdigit())
    return written or event.startswith("import ('torch.")


@pytest.fixture
def watched(monkeypatch):
    """What is imported, written or started while something runs; an audit hook cannot be taken back."""
    global _seen
    if not hasattr(sys, "_ollie_watch"):
        sys.addaudithook(_watch)
        sys._ollie_watch = True
    _seen = []
    yield _seen
    _seen = None


@pytest.mark.parametrize("kind", ["bilinear", "of_all_sizes"])
@pytest.mark.parametrize("rounds", [50, pytest.param(2000, marks=pytest.mark.slow)])
def test_mutated_entries_run_nothing(kind, rounds, request, folder, watched, caplog):
    entry = request.getfixturevalue(kind)
    make = conv if kind == "bilinear" else dynamic
    wanted, draw = make(), random.Random(rounds)
    name, file = saved.entry_name(wanted, CONFIG), folder.parent / "plans.json"
    inputs = wanted.example_inputs(torch.float64)
    exact = wanted.reference(*inputs)
    plain = json.loads(json.dumps(entry))
    for round_number in range(rounds):
        mutated = mutations(plain, draw) if round_number else plain  # the first imports what reading needs
        file.write_text(json.dumps({"format": saved.FORMAT, "plans": {f"plan-{'0' * 64}": mutated}}))
        before = len(watched)
        taken, refused = saved.import_plans(file)
        assert taken + len(refused) == 1
        assert all("\n" not in why and len(why) < 400 for why in refused), refused
        if isinstance(mutated, dict):
            store.write(name, mutated)
            made = saved.load(make(), CONFIG, 60.0)
            if made is not None and made.winner is not None:
                constants = made.winner.program.constants(torch.float64, torch.device("cpu")).values()
                got = made.operator.finished(made.winner.program)(*inputs, *constants)
                torch.testing.assert_close(got, exact)
        if round_number:
            assert not [event for event in watched[before:] if not _is_expected(event, folder)], mutated
    assert "antigravity" not in sys.modules
    caplog.clear()


PIECES = [
    "",
    "[" * 5000,
    "{}",
    "[]",
    "null",
    "NaN",
    "-Infinity",
    "1e999",
    "9" * 5000,
    '"',
    "\\ud800",
    "\\u0000",
]
PIECES += ['"antigravity.fly"', '"__import__"', '"aten.from_file.default"', '"format"', '"../x"', "\xff"]


def damaged(text, draw):
    """The text of an exported file, cut off, or with one to three of its pieces exchanged or doubled."""
    if draw.random() < 0.1:
        return text[: draw.randrange(len(text))]
    for _ in range(draw.choice([1, 1, 2, 3])):
        start = draw.randrange(len(text))
        end = min(len(text), start + draw.choice([0, 1, 1, 5, 40, 400]))
        piece = draw.choice([*PIECES, text[start:end] * 2, text[end : end + 40]])
        if draw.random() < 0.5:  # of a whole value, so that the text may still be JSON
            values = [found.span() for found in re.finditer(r'"[^"]*"|-?\d[\d.e+-]*', text)]
            start, end = draw.choice(values)
            other = draw.choice(values)
            piece = draw.choice([text[slice(*other)], '"x"', "-1", "1e999", "9" * 5000, *PIECES])
        text = text[:start] + piece + text[end:] or " "
    return text


def imported(file):
    """How many plans of a file are taken, why others are refused, and the ValueError raised, if any."""
    try:
        return *saved.import_plans(file), None
    except ValueError as error:
        return 0, [], str(error)


@pytest.mark.parametrize("rounds", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_damaged_files_run_nothing(rounds, bilinear, of_all_sizes, folder, watched):
    """Importing a damaged file takes right plans and refuses others, or raises a ValueError of one line."""
    names = [f"plan-{digit * 64}" for digit in "012"]
    plans = dict(zip(names, [bilinear, of_all_sizes, {**bilinear, "winner": None}], strict=True))
    text, file = json.dumps({"format": saved.FORMAT, "plans": plans}), folder.parent / "plans.json"
    file.write_text(text)
    assert saved.import_plans(file) == (3, [])  # and imports what reading needs
    draw, whole = random.Random(rounds), 0
    for _ in range(rounds):
        changed_text = damaged(text, draw)
        file.write_bytes(changed_text.encode("utf-8", "surrogatepass"))
        del watched[:]
        taken, refused, error = imported(file)
        if error is None:
            whole += 1
            assert all("\n" not in why and len(why) < 400 for why in refused), refused
            assert taken + len(refused) == len(json.loads(file.read_bytes())["plans"])
        assert "\n" not in (error or "")
        unexpected = [event for event in watched if not _is_expected(event, folder)]
        assert not unexpected, changed_text
        assert sorted(path.name for path in folder.parent.iterdir()) == ["plans", "plans.json"]
    assert rounds / 10 < whole < rounds  # both happen
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    "text", ["", "[", "[" * 100_000, "null", "{}", '{"format": "ollie plans 1", "plans": {}}']
)
def test_files_that_hold_no_plans_are_refused(folder, text):
    file = folder.parent / "plans.json"
    file.write_text(text)
    with pytest.raises(ValueError, match="must hold plans as `ollie plans export` writes them"):
        saved.import_plans(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="must hold plans as `ollie plans export` writes them"):
        saved.import_plans(file)
    with pytest.raises(
        ValueError, match=r"No such file: .*missing\.json: give the file that `ollie plans export` wrote"
    ):
        saved.import_plans(folder / "missing.json")
