"""Plans on disk: what the store keeps of them, and what is exported and imported."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ollie_compile import store
from ollie_compile.config import OllieConfig
from ollie_compile.measure.machine import Machine
from ollie_compile.plan import entries
from ollie_compile.plan.candidates import SAME_BUDGET, Plan
from ollie_compile.plan.checks import Checks
from ollie_compile.plan.extensions import user_extensions
from ollie_compile.problems.operators import Operator
from ollie_compile.problems.polynomials import Calls
from ollie_compile.rules import EXPLORATIVE, RELATING
from ollie_compile.search.proof import check_derivation

logger = logging.getLogger(__name__)

EARLIER = ", in an earlier run"
FORMAT = "ollie plans 2"
MOST_SHOWN = 300  # characters of what is wrong with an entry
_ENTRY = re.compile(r"plan-[0-9a-f]{64}")


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
    """The plan kept for an operator, or None; one that the budget cut short serves budgets no larger.

    An entry that this machine has not written is checked as a candidate is, once for its content.
    """
    name = entry_name(operator, config)
    content = store.read(name) if name is not None else None
    if name is None or content is None:
        return None
    try:
        made = entries.plan(content, operator)
        _check_once(name, content, made, config)
    except Exception as error:  # whatever an entry may hold
        logger.warning("ollie: the plan %s of the cache is ignored: %s", name, _one_line(error))
        return None
    made.reason += EARLIER
    return made if content["complete"] or budget_s <= SAME_BUDGET * made.budget_s else None


def save(made: Plan, config: OllieConfig) -> None:
    """Keep a plan for later processes."""
    name = entry_name(made.operator, config)
    if name is not None and made.stats.states:
        content = entries.plain(made)
        store.write(name, content)
        store.write(_checked_name(name, content), {})


def _check_once(name: str, content: dict[str, Any], made: Plan, config: OllieConfig) -> None:
    """Check the winner of an entry as a candidate, unless an entry of this name and content has passed.

    Raises:
        ValueError: it is wrong, or rounds more than it may.
    """
    mark = _checked_name(name, content)
    if made.winner is None or store.read(mark) is not None:
        return
    checks = Checks(made.operator, replace(config, verify=True), Machine(), math.inf)
    if not checks.passes(made.winner):
        raise ValueError(f"{made.winner.rejected}")
    store.write(mark, {})


def _checked_name(name: str, content: dict[str, Any]) -> str:
    """The name of the entry which says that another has been checked."""
    return store.key("checked", name, json.dumps(content, sort_keys=True))


def _one_line(error: Exception) -> str:
    """The first line of an error; torch's go on with where they were raised."""
    return str(error).strip().partition("\n")[0][:MOST_SHOWN]


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
    if not path.is_file():
        raise ValueError(f"No such file: {path}: give the file that `ollie plans export` wrote.")
    try:
        content = json.loads(path.read_bytes())
        plans, given = content["plans"], content["format"]
    except (ValueError, KeyError, TypeError, RecursionError):
        plans, given = None, "no format"
    if not isinstance(plans, dict) or given != FORMAT:
        raise ValueError(
            f"{path} must hold plans as `ollie plans export` writes them, in the format {FORMAT!r}, got "
            f"{str(given)[:MOST_SHOWN]!r}: export them again."
        )
    taken, refused = 0, []
    for name, entry in plans.items():
        why = _fault(name, entry)
        if why is None:
            store.write(name, entry)
            taken += 1
        else:
            refused.append(f"{str(name)[:16]!r}: {why}")
    return taken, refused


def _fault(name: str, entry: Any) -> str | None:
    """Why an entry from elsewhere is not taken, or None."""
    if _ENTRY.fullmatch(name) is None:
        return "its name must be `plan-` and the hash of what it is a plan for"
    try:
        original = entries.expression(entry)
        won = entries.winner(entry, original)
        if won is None:
            return None
        if entry["winner"]["calls"] is not None:
            Calls.of(entry["winner"]["calls"])
        wrong = check_derivation(original, won.program.scope)
    except Exception as error:  # whatever a foreign file may hold
        return f"it is no plan: {_one_line(error)}"
    return None if wrong is None else f"its derivation {wrong}"


def here(entry: Mapping[str, Any]) -> bool:
    """Whether a plan was made on this device, with these versions and threads."""
    return any(
        entry.get("conditions") == store.conditions(torch.device(kind))
        for kind in (["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
    )
