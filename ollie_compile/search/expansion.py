"""The successors of a state of the search, derived in this process or in several side by side."""

from __future__ import annotations

import contextlib
import functools
import math
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from ollie_compile.expr import Read, Scope, canonical, once
from ollie_compile.lower.layouts import is_lowerable
from ollie_compile.measure import clock
from ollie_compile.rules import EXPLORATIVE, RELATING, rewrites, simplify
from ollie_compile.search.guided import repair_convolution, repair_phases, repair_product
from ollie_compile.targets.matmul import match_matmul
from ollie_compile.targets.transforms import is_transform

Repair = Callable[[Scope], tuple[str, Scope] | None]


@dataclass(frozen=True, slots=True)
class Step:
    """One derivation step: the rules applied and the expression after them."""

    rules: tuple[str, ...]
    scope: Scope

    @classmethod
    def of(cls, rule: str, scope: Scope) -> Step:
        """The step of a rule, its result simplified."""
        scope, simplified = simplify(scope)
        return cls((rule, *simplified), scope)

    def __str__(self) -> str:
        return f"{' + '.join(self.rules)}\n    {self.scope}"


Expansion = Callable[[Scope], Iterator[Step]]


def explored(scope: Scope) -> Iterator[Step]:
    """Every rule of exploration at every scope where it may be applied."""
    for name, rule in (EXPLORATIVE | RELATING).items():
        for derived in rewrites(scope, rule, _is_open if name in EXPLORATIVE else lambda _: True):
            yield Step.of(name, derived)


def _is_open(scope: Scope) -> bool:
    """Whether exploration may change a scope: views and operators' scopes are settled."""
    return not (scope.is_view or is_transform(scope) or match_matmul(scope) is not None)


def completed(repair: Repair, scope: Scope) -> Iterator[Step]:
    """Guided derivation: one repair after the other until every contraction is an operator's.

    It also ends if a repair simplifies back to an earlier expression.
    """
    met: set[str] = set()
    while canonical(scope) not in met:
        met.add(canonical(scope))
        found = next(_repairs(scope, repair), None)
        if found is None:
            return
        name, target, repaired = found
        step = Step.of(name, _replaced(scope, target, repaired))
        yield step
        scope = step.scope


COMPLETIONS: tuple[Expansion, ...] = (
    functools.partial(completed, repair_product),
    functools.partial(completed, repair_convolution),
    functools.partial(completed, repair_phases),
)


def _repairs(scope: Scope, repair: Repair) -> Iterator[tuple[str, Scope, Scope]]:
    for target in scope.scopes():
        if _wants_repair(target) and (step := repair(target)) is not None:
            yield step[0], target, step[1]


def _wants_repair(scope: Scope) -> bool:
    """Whether a product is neither an operator's nor plainly elementwise."""
    unsettled = scope.summation or scope.divisions()
    return scope.terms() > 1 and scope.function == "*" and bool(unsettled) and match_matmul(scope) is None


def _replaced(scope: Scope, target: Scope, repaired: Scope) -> Scope:
    """`scope` with `repaired` wherever it reads `target`."""
    if scope is target:
        return repaired
    factors = (
        Read(_replaced(read.tensor, target, repaired), read.index) if isinstance(read.tensor, Scope) else read
        for read in scope.factors
    )
    return scope.over(factors=tuple(factors))


@once
def is_candidate(scope: Scope) -> bool:
    """Whether an expression can be lowered as it is."""
    return is_lowerable(scope)


@once
def products(scope: Scope) -> int:
    """Multiplications in the contractions of an expression."""
    contractions = (inner for inner in scope.scopes() if inner.is_contraction)
    return sum(math.prod(loop.extent for loop in inner.traversal + inner.summation) for inner in contractions)


@once
def work(scope: Scope) -> tuple[int, int]:
    """The rank of a state: its products, then the elements of all tensors that it computes."""
    return products(scope), sum(math.prod(inner.shape) for inner in scope.scopes())


FACTS: tuple[Callable[[Scope], Any], ...] = (canonical, is_candidate, products, work)
"""The functions that the search asks about every state; other processes compute them ahead."""


class Expander:
    """Expands scopes, lazily one by one or ahead by other processes.

    Attributes:
        elsewhere_s: CPU time that other processes have taken for what was asked for.
    """

    def __init__(self, pool: ProcessPoolExecutor | None = None) -> None:
        self.pool = pool
        self.elsewhere_s = 0.0

    def __call__(self, tasks: Sequence[tuple[Expansion, Scope]]) -> Iterator[Iterable[Step]]:
        """What follows from each scope, in the order given."""
        if self.pool is None:
            return (expansion(scope) for expansion, scope in tasks)
        return map(self._remembered, self.pool.map(_expanded, tasks, chunksize=4))

    def _remembered(self, answer: tuple[list[tuple[Step, list[Any]]], float]) -> list[Step]:
        steps, seconds = answer
        self.elsewhere_s += seconds
        for step, values in steps:
            step.scope.memo.update(zip(FACTS, values, strict=True))
        return [step for step, _ in steps]


@contextlib.contextmanager
def expanding(workers: int) -> Iterator[Expander]:
    """An expander that uses so many forked processes, or none for 1.

    Raises:
        ValueError: `workers` is not positive, or above 1 where processes cannot be forked.
    """
    if workers < 1:
        raise ValueError(f"`workers` must be 1 or more, got {workers}.")
    if workers == 1:
        yield Expander()
        return
    if "fork" not in multiprocessing.get_all_start_methods():
        raise ValueError(f"`workers` must be 1 where processes cannot be forked, got {workers}.")
    # Forked, they have the rules that a user has registered, and do not run the main script again.
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, mp_context=context)
    try:
        yield Expander(pool)
    finally:
        pool.shutdown(cancel_futures=True)


def _expanded(task: tuple[Expansion, Scope]) -> tuple[list[tuple[Step, list[Any]]], float]:
    """The steps from a scope with what the search asks about each, and the CPU time that it took."""
    start = clock.now()
    expansion, scope = task
    steps = [(step, [fact(step.scope) for fact in FACTS]) for step in expansion(scope)]
    return steps, clock.now() - start
