"""Plans: for each operator of a graph search, bound, check, measure, and keep the winner.

A graph's operators are timed first, and prepared with a share of the time by what they take in all their
places: searched, bounded and the most promising candidates timed as they are called. What is left of the time
goes to where most can be gained.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from ollie_compile.config import OllieConfig
from ollie_compile.measure import isolation
from ollie_compile.measure.profile import profile
from ollie_compile.plan import choice, preparing, saved
from ollie_compile.plan.candidates import OUT_OF_TIME, SAME_BUDGET, Plan, rewriting_s
from ollie_compile.problems.operators import Operator
from ollie_compile.rules import of_users

logger = logging.getLogger(__name__)

PREPARED = 0.7  # share of a graph's budget after which no search, bound or first timing begins
LEAST_S = 1.5  # in which an operator can be searched, and its best candidate be built and timed


_plans: dict[tuple[Operator, OllieConfig, int, frozenset[str]], Plan] = {}


def reset() -> None:
    """Forget all plans of this process."""
    _plans.clear()


def plan(operator: Operator, config: OllieConfig, budget_s: float) -> Plan:
    """The plan for one operator.

    Raises:
        Exception: whatever planning failed with.
    """
    made = plan_all({operator: 1}, config, budget_s)[operator]
    if isinstance(made, Exception):
        raise made
    return made


def plan_all(
    operators: Mapping[Operator, int], config: OllieConfig, budget_s: float
) -> dict[Operator, Plan | Exception]:
    """The plans for a graph's operators, of this process, from the disk or made now, or why that failed.

    A plan that the budget cut short is made anew when it is asked for again with a larger one. Where winners
    would take Inductor too long in all their places, the originals are kept.

    Args:
        operators: with how often each occurs.
        budget_s: seconds for all of them, and for compiling what wins in the graph; 0 keeps the originals.
    """

    made: dict[Operator, Plan | Exception] = {}
    left_s = budget_s
    for operator, places in operators.items():
        if config.budget_s == 0:
            made[operator] = Plan(operator, budget_s, reason=OUT_OF_TIME)
            continue
        known = _plans.get(_key(operator, config))
        if known is None or not (known.complete or budget_s <= SAME_BUDGET * known.budget_s):
            with isolation.outside_compilation():
                known = saved.load(operator, config, budget_s)
            if known is None:
                continue
            _plans[_key(operator, config)] = known
        if rewriting_s(known, places) > left_s:
            known = replace(known, winner=None, reason=OUT_OF_TIME)
        left_s -= rewriting_s(known, places)
        made[operator] = known
    new = {operator: count for operator, count in operators.items() if operator not in made}
    if new:
        with isolation.outside_compilation():
            made |= _make(new, config, budget_s, time.perf_counter() + left_s)
    return made


def _key(operator: Operator, config: OllieConfig) -> tuple[Operator, OllieConfig, int, frozenset[str]]:
    return operator, replace(config, budget_s=0), torch.get_num_threads(), frozenset(of_users())


def _make(
    operators: Mapping[Operator, int], config: OllieConfig, budget_s: float, stop: float
) -> dict[Operator, Plan | Exception]:
    made: dict[Operator, Plan | Exception] = {}
    prepared_by = stop - (1 - PREPARED) * (stop - time.perf_counter())

    def in_time(step: Callable[[Plan, float], None], until: float, weight: Callable[[Plan], float]) -> None:
        """Take a step of every plan, those that weigh most first, each with a share of the time by that.

        The first ones get `LEAST_S` where that is more: a short time serves few operators, rather than none.
        """
        plans = sorted((one for one in made.values() if isinstance(one, Plan)), key=weight, reverse=True)
        weights = [weight(one) for one in plans]
        for place, fresh in enumerate(plans):
            begun = time.perf_counter()
            left = sum(weights[place:])
            share = weights[place] / left if left > 0 else 1.0
            try:
                step(fresh, min(until, begun + max(LEAST_S, share * (until - begun))))
            except Exception as error:  # a fault in planning must not take the user's model with it
                made[fresh.operator] = error
            fresh.seconds += time.perf_counter() - begun
            until -= rewriting_s(made[fresh.operator], fresh.places)

    for operator, places in operators.items():
        made[operator] = Plan(operator, budget_s, places)
    in_time(
        lambda fresh, until: preparing.time_original(fresh, config, until), prepared_by, lambda fresh: 1.0
    )
    in_time(
        lambda fresh, until: preparing.prepare(fresh, config, until),
        prepared_by,
        lambda fresh: fresh.places * (fresh.original_s or 0.0),
    )
    in_time(
        lambda fresh, until: choice.decide(fresh, config, until),
        stop,
        lambda fresh: fresh.places * fresh.gain_s,
    )
    for operator, result in made.items():
        if isinstance(result, Plan):
            _plans[_key(operator, config)] = result
            saved.save(result, config)
        else:
            logger.warning("ollie: %s: left as it is, planning failed", operator, exc_info=result)
    profile.save()
    return made
