"""A plan as plain data, written and read back.

An entry may come from anywhere, so nothing in it is believed: every field must have its type and range, our
own parser reads the derived expression over the original's tensors, and its program must be one that lowering
writes, with no more work and memory than a search allows. `saved` checks the algebra.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from fractions import Fraction
from typing import Any, get_args

import torch

from ollie_compile import store
from ollie_compile.expr import Constant, Input, Scope, parse
from ollie_compile.lower.layouts import is_lowerable, programs, with_kernels
from ollie_compile.lower.lowering import Program
from ollie_compile.measure.bounds import largest_elements
from ollie_compile.plan.candidates import Candidate, Plan
from ollie_compile.problems.dynamic import Dynamic
from ollie_compile.problems.operators import MAX_GROWTH
from ollie_compile.problems.polynomials import Calls
from ollie_compile.search.expansion import Step, products
from ollie_compile.search.hybrid import MAX_PRODUCTS, Derivation, SearchStats
from ollie_compile.search.proof import values_needed
from ollie_compile.targets import ProductLayout, families

MOST_TEXT = 1 << 16  # characters of one text
MOST_STEPS, MOST_ENTRIES = 128, 4096  # of a derivation, and of a constant
MOST_ELEMENTS = 1 << 27  # of all inputs of an expression that comes without its operator
MOST_VALUES, MORE_VALUES = 1 << 24, 64  # in a check of the algebra, and times those of the original
_NAME, _FRACTION = re.compile(r"[A-Za-z_]\w{0,63}"), re.compile(r"-?\d{1,12}(/[1-9]\d{0,11})?")
_DEVICES = tuple(map(torch.device, ("cpu", "cuda")))


def plain(made: Plan) -> dict[str, Any]:
    """A plan as an entry of the cache."""
    operator, winner = made.operator, made.winner
    expression = operator.expression()
    return {
        "operator": str(operator),
        "expression": str(expression),
        "inputs": {name: list(tensor.shape) for name, tensor in expression.inputs().items()},
        "conditions": store.conditions(operator.device),
        "budget_s": made.budget_s,
        "complete": made.complete,
        "reason": made.reason,
        "original_s": made.original_s,
        "stats": asdict(made.stats),
        "winner": None if winner is None else _plain_winner(made, winner),
    }


def _plain_winner(made: Plan, winner: Candidate) -> dict[str, Any]:
    constants = winner.program.scope.constants().items()
    return {
        "constants": {name: [list(c.shape), [str(value) for value in c.values]] for name, c in constants},
        "expression": str(winner.program.scope),
        "layout": winner.program.layout,
        "kernels": winner.program.kernels,
        "bound_s": winner.bound_s if math.isfinite(winner.bound_s) else None,
        "measured_s": winner.measured_s,
        "compile_s": winner.compile_s,
        "error": winner.error,
        "mixed_error": winner.mixed_error,
        "depth": winner.derivation.depth,
        "steps": [[list(step.rules), str(step.scope)] for step in winner.derivation.steps],
        "calls": made.operator.calls(winner.program).plain() if isinstance(made.operator, Dynamic) else None,
    }


def expression(content: Any) -> Scope:
    """The original expression of an entry.

    Raises:
        ValueError: the entry is no plan, or its tensors are too large to check a derivation.
    """
    _check_fields(content, _PLAN)
    inputs = content["inputs"]
    for name, shape in inputs.items():
        _check(_NAME.fullmatch(name) is not None, "an input must have a name", name)
        _check(_is_shape(shape), f"the shape of {name} must be whole numbers", shape)
    elements = sum(math.prod(shape) for shape in inputs.values())
    _check(elements <= MOST_ELEMENTS, f"its inputs must have {MOST_ELEMENTS} elements at most", elements)
    scope = _parsed(
        content["expression"], {name: Input(name, tuple(shape)) for name, shape in inputs.items()}
    )
    needed = values_needed(scope)
    _check(needed <= MOST_VALUES, f"a check of it must need {MOST_VALUES} values at most", needed)
    return scope


def winner(content: Any, original: Scope, devices: tuple[torch.device, ...] = _DEVICES) -> Candidate | None:
    """The winner of an entry for an original expression; None keeps the original.

    Args:
        devices: those for which its program may be written.

    Raises:
        ValueError: the entry is no plan for this expression, or its program is none that lowering writes.
    """
    _check_fields(content, _PLAN)
    _check(content["expression"] == str(original), "it must be a plan of this operator", content["operator"])
    given = content["winner"]
    if given is None:
        return None
    _check_fields(given, _WINNER)
    tensors: dict[str, Input | Constant] = {**original.inputs()}
    for constant in _constants(given["constants"]):
        _check(constant.name not in tensors, "a constant must have a name of its own", constant.name)
        tensors[constant.name] = constant
    scope = _parsed(given["expression"], tensors)
    _check(scope.box == original.box, f"its winner must have the box {original.box}", scope.box)
    _check_work(scope, original)
    program = Program(scope, given["layout"], given["kernels"])
    written = is_lowerable(scope) and any(program in _ways(scope, device) for device in devices)
    ways = f"{program.layout}, {program.kernels}"
    _check(written, "its winner must be a program that lowering writes for this device", ways)
    derivation = Derivation(scope, tuple(_steps(given["steps"], tensors)), given["depth"])
    bound_s = math.inf if given["bound_s"] is None else given["bound_s"]
    known = {name: given[name] for name in ("measured_s", "compile_s", "error", "mixed_error")}
    return Candidate(program, derivation, bound_s=bound_s, **known)


def plan(content: Any, operator: Any) -> Plan:
    """The plan of an entry for an operator.

    Raises:
        ValueError: as `winner`; or, of dynamic shapes, calls that are not what torch computes.
        IndexError, TypeError, RuntimeError: calls that torch refuses.
    """
    won = winner(content, operator.expression(), (operator.device,))
    made = Plan(
        operator,
        content["budget_s"],
        winner=won,
        reason=content["reason"],
        original_s=content["original_s"],
        candidates=[won] if won is not None else [],
        stats=SearchStats(**content["stats"]),
    )
    if won is not None and isinstance(operator, Dynamic):
        operator.take(won.program, Calls.of(content["winner"]["calls"]))
    return made


def summary(content: Any) -> str:
    """An entry in one line: operator, times and rules.

    Raises:
        ValueError: the entry is no plan.
    """
    _check_fields(content, _PLAN)
    won = content["winner"]
    chosen = "original kept"
    if won is not None:
        _check_fields(won, _WINNER)
        chosen = " > ".join(rules[0] for rules, _ in won["steps"]) or "as lifted"
    times = [f"{s * 1e3:.3f} ms" for s in (content["original_s"], won and won["measured_s"]) if s]
    return f"{content['operator']}: {' -> '.join(times)}: {chosen}"


def _parsed(text: str, tensors: Mapping[str, Input | Constant]) -> Scope:
    try:
        return parse(text, tensors)
    except RecursionError:
        raise ValueError(f"its expressions must be nested less deeply, got {text!r:.40}") from None


def _ways(scope: Scope, device: torch.device) -> Iterator[Program]:
    for portable in (False, True):
        for program in programs(scope, device, portable=portable):
            yield program
            yield from with_kernels(program, device)


def _constants(given: Mapping[str, Any]) -> Iterator[Constant]:
    for name, value in given.items():
        _check(_NAME.fullmatch(name) is not None, "a constant must have a name", name)
        valid = (
            isinstance(value, list) and len(value) == 2 and _is_shape(value[0]) and isinstance(value[1], list)
        )
        _check(valid, f"{name} must have a shape and values", value)
        shape, values = value
        _check(
            len(values) == math.prod(shape) <= MOST_ENTRIES, f"{name} must have a value for each entry", shape
        )
        for text in values:
            valid = isinstance(text, str) and _FRACTION.fullmatch(text) is not None
            _check(valid, f"the values of {name} must be fractions", text)
        yield Constant(name, tuple(shape), tuple(map(Fraction, values)))


def _steps(given: list[Any], tensors: Mapping[str, Input | Constant]) -> Iterator[Step]:
    for rules, text in given:
        yield Step(tuple(rules), _parsed(text, tensors))


def _check_work(scope: Scope, original: Scope) -> None:
    """Whether an expression needs no more products and memory than a search and a check of it allow."""
    most = MAX_PRODUCTS * max(1, products(original))
    _check(products(scope) <= most, f"its winner must need {most} products at most", products(scope))
    shapes = [tensor.shape for tensor in original.inputs().values()] + [original.shape]
    most = MAX_GROWTH * sum(map(math.prod, shapes))
    largest = largest_elements(scope)
    _check(largest <= most, f"its winner must make tensors of {most} elements at most", largest)
    needed, most = values_needed(scope), max(MOST_VALUES, MORE_VALUES * values_needed(original))
    _check(needed <= most, f"a check of it must need {most} values at most", needed)


def _check(valid: bool, must: str, got: object) -> None:
    if not valid:
        raise ValueError(f"{must}, got {got!r:.60}")


def _check_fields(content: Any, kinds: Mapping[str, Any]) -> None:
    """Whether an entry has the fields of these kinds, and no others."""
    names = content.keys() if isinstance(content, dict) else content
    _check(names == kinds.keys(), f"it must have the fields {', '.join(kinds)}", names)
    for name, (kind, valid) in kinds.items():
        _check(valid(content[name]), f"`{name}` must be {kind}", content[name])


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MOST_TEXT and value.isprintable()


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _is_number(value: Any) -> bool:
    return _is_count(value) or (isinstance(value, float) and 0 <= value < math.inf)


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 16 and all(map(_is_count, value))


def _is_stats(value: Any) -> bool:
    kinds = {"seconds": _is_number, "complete": lambda flag: isinstance(flag, bool)}
    names = [field.name for field in fields(SearchStats)]
    valid = isinstance(value, dict) and list(value) == names
    return valid and all(kinds.get(name, _is_count)(value[name]) for name in names)


def _is_steps(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= MOST_STEPS
        and all(isinstance(step, list) and len(step) == 2 and _is_text(step[1]) for step in value)
        and all(isinstance(rules, list) and rules and all(map(_is_text, rules)) for rules, _ in value)
    )


_TEXT = "a printable text", _is_text
_COUNT = "a whole number, 0 or more", _is_count
_NUMBER = "a number, 0 or more", _is_number
_MAYBE = "a number, 0 or more, or none", lambda value: value is None or _is_number(value)
_MAPPING = "a mapping", lambda value: isinstance(value, dict)
_MAYBE_MAPPING = "a mapping or none", lambda value: value is None or isinstance(value, dict)

_PLAN = {
    "operator": _TEXT,
    "expression": _TEXT,
    "inputs": _MAPPING,
    "conditions": _TEXT,
    "budget_s": _NUMBER,
    "complete": ("true or false", lambda value: isinstance(value, bool)),
    "reason": _TEXT,
    "original_s": _MAYBE,
    "stats": ("the counts of a search", _is_stats),
    "winner": _MAYBE_MAPPING,
}
_WINNER = {
    "constants": _MAPPING,
    "expression": _TEXT,
    "layout": (
        f"one of {', '.join(get_args(ProductLayout))}",
        lambda value: value in get_args(ProductLayout),
    ),
    "kernels": ("a family of kernels", lambda value: value in families()),
    "bound_s": _MAYBE,
    "measured_s": _MAYBE,
    "compile_s": _NUMBER,
    "error": _MAYBE,
    "mixed_error": _MAYBE,
    "depth": _COUNT,
    "steps": ("a list of rules and expressions", _is_steps),
    "calls": _MAYBE_MAPPING,
}
