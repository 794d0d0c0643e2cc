"""How a winner's numbers behave, in one sentence for the text and the page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ollie_compile.rules.bilinear import growth

if TYPE_CHECKING:  # brings the planner
    from ollie_compile.plan.candidates import Candidate


def numbers(winner: Candidate) -> str:
    """How large the values of a winner may get, and how it rounds."""
    factor = growth(winner.program.scope)
    text = "growth bound 1: values are at most the sums of |products| of the original"
    if factor > 1:
        text = (
            f"growth bound {factor:.1f}: values may be so many times larger than the sums of |products|, and "
            "a result rounds by the largest values that its tile reads, not by its own"
        )
    if winner.error is not None:
        text += f"; rounding error {winner.error:.1e} of the largest result"
    if winner.mixed_error is not None:
        text += f", {winner.mixed_error:.1e} of a result's own sum on magnitudes 1, 1e4 and 1e-4 side by side"
    return text
