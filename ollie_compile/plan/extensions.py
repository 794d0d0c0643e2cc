"""The rules and kernels of users: decisions that depend on them hold for this process only."""

from __future__ import annotations

from ollie_compile import rules, targets


def user_extensions() -> frozenset[str]:
    """Names of the rules and titles of the kernels that users have registered."""
    return frozenset(rules.of_users() | targets.of_users())
