"""Plans as plain data: what the store keeps of them, and what is exported and imported."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

import torch

from ollie_compile import store
from ollie_compile.config import OllieConfig
from ollie_compile.expr import Constant, Input, Scope, parse
from ollie_compile.lower.lowering import Program
from ollie_compile.plan.candidates import SAME_BUDGET, Candidate, Plan
from ollie_compile.plan.extensions import user_extensions
from ollie_compile.problems.dynamic import Dynamic
from ollie_compile.problems.operators import Operator
from ollie_compile.problems.polynomials import Calls
from ollie_compile.rules import EXPLORATIVE, RELATING
from ollie_compile.search.expansion import Step
from ollie_compile.search.hybrid import Derivation, SearchStats
from ollie_compile.search.proof import check_derivation
from ollie_compile.targets import ProductLayout, families

logger = logging.getLogger(__name__)

EARLIER = ", in an earlier run"
FORMAT = "ollie plans 1"


def entry_name(operator: Operator, config: OllieConfig) -> str | None:
    """The name of a plan's entry; None where it has no identity beyond this process.

    Rules, kernels and operators of users are code, which may be another in the next process.
    """
    if operator.declared or user_extensions():
        return None
    options = asdict(replace(config, budget_s=0, workers=1))
    rules = (*EXPLORATIVE, *RELATING)
    return store.key("plan", repr(operator), options, rules, store.conditions(operator.device))


def load(operator: Operator, config: OllieConfig, budget_s: float) -> Plan | None:
    """The plan kept for an operator, or None; one that the budget cut short serves budgets no larger."""
    name = entry_name(operator, config)
    content = store.read(name) if name is not None else None
    if content is None:
        return None
    try:
        made = plan_of(content, operator)
    except Exception as error:  # whatever an entry may hold
        logger.warning("ollie: the plan %s of the cache is ignored: %s", name, error)
        return None
    return made if content.get("complete") or budget_s <= SAME_BUDGET * made.budget_s else None


def save(made: Plan, config: OllieConfig) -> None:
    """Keep a plan for later processes."""
    name = entry_name(made.operator, config)
    if name is not None and made.stats.states:
        store.write(name, content_of(made))


def content_of(made: Plan) -> dict[str, Any]:
    operator, winner = made.operator, made.winner
    expression = operator.expression()
    content: dict[str, Any] = {
        "operator": str(operator),
        "expression": str(expression),
        "inputs": {name: list(tensor.shape) for name, tensor in expression.inputs().items()},
        "conditions": store.conditions(operator.device),
        "budget_s": made.budget_s,
        "complete": made.complete,
        "reason": made.reason,
        "original_s": made.original_s,
        "stats": asdict(made.stats),
        "winner": None,
    }
    if winner is not None:
        content["winner"] = {
            "constants": {
                name: [list(constant.shape), [str(value) for value in constant.values]]
                for name, constant in winner.program.scope.constants().items()
            },
            "expression": str(winner.program.scope),
            "layout": winner.program.layout,
            "kernels": winner.program.kernels,
            "bound_s": winner.bound_s,
            "measured_s": winner.measured_s,
            "compile_s": winner.compile_s,
            "error": winner.error,
            "depth": winner.derivation.depth,
            "steps": [[list(step.rules), str(step.scope)] for step in winner.derivation.steps],
        }
        if isinstance(operator, Dynamic):
            content["winner"]["calls"] = operator.calls(winner.program).plain()
    return content


def _expressions(content: Mapping[str, Any]) -> tuple[Scope, list[Scope]]:
    """The winner's expression, and those of its derivation, of an entry that has a winner."""
    winner = content["winner"]
    tensors: dict[str, Input | Constant] = {
        str(name): Input(str(name), tuple(shape)) for name, shape in content["inputs"].items()
    }
    for name, (shape, values) in winner["constants"].items():
        tensors[name] = Constant(str(name), tuple(shape), tuple(map(Fraction, values)))
    steps = [parse(text, tensors) for _, text in winner["steps"]]
    return parse(winner["expression"], tensors), steps


def plan_of(content: Mapping[str, Any], operator: Operator) -> Plan:
    made = Plan(
        operator,
        float(content["budget_s"]),
        reason=f"{content['reason']}{EARLIER}",
        original_s=content["original_s"],
        stats=SearchStats(**content["stats"]),
    )
    winner = content["winner"]
    if winner is None:
        return made
    scope, steps = _expressions(content)
    if scope.shape != operator.expression().shape:
        raise ValueError(f"its winner has the shape {scope.shape}, not {operator.expression().shape}")
    if winner["layout"] not in get_args(ProductLayout) or winner["kernels"] not in families():
        raise ValueError(f"its winner is written as {winner['layout']!r}, {winner['kernels']!r}")
    rules = [tuple(map(str, names)) for names, _ in winner["steps"]]
    derivation = Derivation(scope, tuple(map(Step, rules, steps)), int(winner["depth"]))
    made.winner = Candidate(
        Program(scope, winner["layout"], winner["kernels"]),
        derivation,
        bound_s=winner["bound_s"],
        measured_s=winner["measured_s"],
        compile_s=float(winner["compile_s"]),
        error=winner["error"],
    )
    made.candidates = [made.winner]
    if isinstance(operator, Dynamic):
        operator.take(made.winner.program, Calls.of(winner["calls"]))
    return made


def export_plans(path: Path) -> int:
    """Write every plan of the cache into one JSON file; gives their number."""
    found = dict(store.entries("plan"))
    path.write_text(json.dumps({"format": FORMAT, "plans": found}, indent=1) + "\n", "utf-8")
    return len(found)


def import_plans(path: Path) -> tuple[int, list[str]]:
    """Take the plans of an exported file into the cache, each derivation checked again.

    Returns:
        how many were taken, and why each other one was not.

    Raises:
        ValueError: the file holds no exported plans, or the cache is switched off.
    """
    if store.folder() is None:
        raise ValueError(f"`{store.FOLDER}` must name a folder to import plans, got an empty one.")
    try:
        content = json.loads(path.read_text("utf-8"))
        plans = content["plans"] if content["format"] == FORMAT else None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        plans = None
    if not isinstance(plans, dict):
        raise ValueError(f"{path} must hold plans as `ollie plans export` writes them: export them again.")
    taken, refused = 0, []
    for name, entry in plans.items():
        why = _fault(entry)
        if why is None and str(name).startswith("plan-") and str(name)[5:].isalnum():
            store.write(name, entry)
            taken += 1
        else:
            refused.append(f"{str(name)[:16]}: {why or 'no name of a plan'}")
    return taken, refused


def _fault(entry: Any) -> str | None:
    """Why an entry from elsewhere is not taken, or None."""
    try:
        if entry["winner"] is None:
            return None
        derived, _ = _expressions(entry)
        tensors = {str(name): Input(str(name), tuple(shape)) for name, shape in entry["inputs"].items()}
        wrong = check_derivation(parse(entry["expression"], tensors), derived)
    except Exception as error:  # whatever a foreign file may hold
        return f"it is no plan: {error}"
    return None if wrong is None else f"its derivation {wrong}"


def here(entry: Mapping[str, Any]) -> bool:
    """Whether a plan was made on this device, with these versions and threads."""
    return any(
        entry.get("conditions") == store.conditions(torch.device(kind))
        for kind in (["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
    )
