"""Plans for the operators of a graph, within a budget.

The operators are timed first. Each is then prepared with a share of the time in proportion to
its own time at all its occurrences: searched, bounded, and its most promising candidates called and timed.
The rest of the time goes first to the operators that can gain most.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from ollie_compile.config import OllieConfig
from ollie_compile.measure.isolation import outside_compilation
from ollie_compile.measure.timing import fastest_first
from ollie_compile.plan import choice, preparing, saved
from ollie_compile.plan.candidates import OUT_OF_TIME, SAME_BUDGET, Plan, compiling_s
from ollie_compile.plan.context import Context, PlanKey
from ollie_compile.plan.extensions import user_extensions
from ollie_compile.problems.operators import Operator

logger = logging.getLogger(__name__)

PREPARED = 0.7  # share of a graph's budget after which no search, bound or first timing begins
LEAST_WEIGHT = 1e-9  # seconds; lighter plans are equally light
LEAST_S = 1.5  # in which an operator can be searched, and its best candidate be built and timed


class Planner:
    """Plans operators with the options of one compilation.

    Args:
        budget_s: seconds for all operators, and for compiling the winners in the graph.
    """

    def __init__(self, context: Context, config: OllieConfig, budget_s: float) -> None:
        self.context, self.config, self.budget_s = context, config, budget_s
        self.machine = context.machine

    def plan_all(self, operators: Mapping[Operator, int]) -> dict[Operator, Plan | Exception]:
        """A plan for each operator, or the exception that planning failed with.

        Args:
            operators: with how often each occurs.
        """
        results: dict[Operator, Plan | Exception] = {}
        if self.config.budget_s == 0:
            return {operator: Plan(operator, self.budget_s, reason=OUT_OF_TIME) for operator in operators}
        left_s = self.budget_s
        for operator, occurrences in operators.items():
            plan = self.known(operator)
            if plan is None:
                continue
            if compiling_s(plan, occurrences) > left_s:
                plan = replace(plan, winner=None, reason=OUT_OF_TIME)
            left_s -= compiling_s(plan, occurrences)
            results[operator] = plan
        new = {operator: count for operator, count in operators.items() if operator not in results}
        if new:
            with outside_compilation():
                results |= self.make(new, self.machine.now() + left_s)
        return results

    def known(self, operator: Operator) -> Plan | None:
        """The plan of this process or of the disk, unless a smaller budget cut it short."""
        key = self._key(operator)
        plan = self.context.plans.get(key)
        if plan is None or not (plan.complete or self.budget_s <= SAME_BUDGET * plan.budget_s):
            with outside_compilation():
                plan = saved.load(operator, self.config, self.budget_s)
            if plan is not None:
                self.context.plans[key] = plan
        return plan

    def make(self, operators: Mapping[Operator, int], deadline: float) -> dict[Operator, Plan | Exception]:
        """New plans, kept for later."""
        results: dict[Operator, Plan | Exception] = {
            operator: Plan(operator, self.budget_s, occurrences)
            for operator, occurrences in operators.items()
        }
        prepared_by = deadline - (1 - PREPARED) * (deadline - self.machine.now())
        self._share(results, self.time_original, prepared_by, lambda plan: 1.0)
        self._share(
            results, self.prepare, prepared_by, lambda plan: plan.occurrences * (plan.original_s or 0.0)
        )
        self._share(results, self.decide, deadline, lambda plan: plan.occurrences * plan.gain_s)
        for operator, result in results.items():
            if isinstance(result, Plan):
                self.keep(result)
            else:
                logger.warning("ollie: %s: left as it is, planning failed", operator, exc_info=result)
        self.machine.profile.save()
        return results

    def time_original(self, plan: Plan, deadline: float) -> None:
        """Time the operator as torch calls it."""
        preparing.time_original(plan, self.config, self.machine, deadline)

    def prepare(self, plan: Plan, deadline: float) -> None:
        """Search, bound and call candidates."""
        preparing.prepare(plan, self.config, self.machine, deadline)

    def decide(self, plan: Plan, deadline: float) -> None:
        """Check, compile and measure candidates, and choose."""
        checks = self.context.checks(plan.operator, self.config, self.machine, deadline)
        choice.decide(plan, self.config, self.machine, checks)

    def keep(self, plan: Plan) -> None:
        """Keep a plan for this process, and on disk for later ones."""
        self.context.plans[self._key(plan.operator)] = plan
        saved.save(plan, self.config)

    def _share(
        self,
        results: dict[Operator, Plan | Exception],
        step: Callable[[Plan, float], None],
        deadline: float,
        weight: Callable[[Plan], float],
    ) -> None:
        """Take a step of every plan, the heaviest first, each with a share of the time by its weight.

        Equally heavy ones come in the order of the graph.

        A plan gets at least `LEAST_S`: a short budget serves a few operators instead of none.
        """
        plans = [one for one in results.values() if isinstance(one, Plan)]
        plans = fastest_first(plans, lambda plan: 1 / max(weight(plan), LEAST_WEIGHT))
        weights = [weight(plan) for plan in plans]
        for place, plan in enumerate(plans):
            start = self.machine.now()
            rest = sum(weights[place:])
            share = weights[place] / rest if rest > 0 else 1.0
            try:
                step(plan, min(deadline, start + max(LEAST_S, share * (deadline - start))))
            except Exception as error:  # a fault in planning must not take the user's model with it
                results[plan.operator] = error
            plan.seconds += self.machine.now() - start
            deadline -= compiling_s(results[plan.operator], plan.occurrences)

    def _key(self, operator: Operator) -> PlanKey:
        options = replace(self.config, budget_s=0)
        return operator, options, torch.get_num_threads(), user_extensions()


def plan_all(
    operators: Mapping[Operator, int], config: OllieConfig, budget_s: float, context: Context
) -> dict[Operator, Plan | Exception]:
    """The plans for a graph's operators: of this process, from the disk, or made now.

    A plan that the budget cut short is made anew when it is asked for again with a larger one. Where winners
    would take Inductor too long at all their occurrences, the originals are kept.

    Args:
        operators: with how often each occurs.
        budget_s: seconds for all of them, and for compiling the winners in the graph; 0 keeps the originals.

    Returns:
        for each operator a plan, or the exception that planning failed with.
    """
    return Planner(context, config, budget_s).plan_all(operators)


def plan(operator: Operator, config: OllieConfig, budget_s: float, context: Context) -> Plan:
    """The plan for one operator, as `plan_all`.

    Raises:
        Exception: the one that planning failed with.
    """
    result = plan_all({operator: 1}, config, budget_s, context)[operator]
    if isinstance(result, Exception):
        raise result
    return result
