"""Expressions with symbolic sizes: derived once, instantiated and exact at every size of their range."""

import pytest

from ollie_compile import lift
from ollie_compile.expr import Input, parse
from ollie_compile.problems.symbolic import Size, derive
from ollie_compile.search.proof import check_derivation


def convolution(batch: int, size: int):
    square = (1, 1)
    return lift.convolution(
        (batch, 4, size, size), (3, 4, 3, 3), stride=square, padding=square, dilation=square
    )


def banded(length: int):
    return lift.banded_scores(2, length, 4, width=3, dilation=4)


def test_a_convolution_of_any_batch_and_size_is_derived_once():
    families = derive(convolution, {"batch": Size(2, 64), "size": Size(5, 40)}, max_depth=0, budget_s=60.0)
    offset_adds = [family for family in families if family.rules[:1] == ("summation splitting",)]
    assert offset_adds
    for sizes in ({"batch": 16, "size": 7}, {"batch": 3, "size": 40}):
        derived = offset_adds[-1].at(**sizes)
        assert derived.shape == (sizes["batch"], 3, sizes["size"], sizes["size"])
        assert check_derivation(convolution(**sizes), derived) is None


def test_divisibility_is_declared_and_held():
    families = derive(banded, {"length": Size(24, 400, step=4)}, max_depth=0, budget_s=60.0)
    dense = next(family for family in families if "dimension splitting" in family.rules)
    assert "q1:0..30" in str(dense.at(length=120))
    with pytest.raises(ValueError, match=r"`length` must be a multiple of 4 in \[24, 400\], got 122"):
        dense.at(length=122)


def test_what_is_not_affine_in_the_size_is_dropped():
    """Merging two symbolic dimensions needs their product, and rounding up to a tile steps."""
    families = derive(banded, {"length": Size(24, 400)}, max_depth=0, budget_s=60.0)
    assert families
    assert all("dimension splitting" not in family.rules for family in families)


def test_fits_are_checked_wherever_they_are_used():
    """A fit that two sizes suggest and the expression between them breaks."""

    def make(n: int):
        tensors = {"A": Input("A", (4, n)), "K": Input("K", (4, 3))}
        first = 2 if n == 12 else 1
        return parse(f"L[h:0..{n}] Sum[c:0..4, r:0..3] A[c, h + r - {first}] * K[c, r]", tensors)

    family = derive(make, {"n": Size(6, 20)}, max_depth=0, budget_s=60.0)[-1]
    assert family.at(n=11).shape == (11,)
    with pytest.raises(ValueError, match=r"does not hold at \{'n': 12\}"):
        family.at(n=12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Size(0, 9), "got low 0, high 9 and step 1"),
        (lambda: Size(6, 9, step=4), "got low 6, high 9 and step 4"),
        (lambda: derive(banded, {}, max_depth=0, budget_s=1.0), "at least one symbolic size, got none"),
    ],
)
def test_bad_sizes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_symbols_must_be_given():
    family = derive(banded, {"length": Size(24, 400)}, max_depth=0, budget_s=60.0)[0]
    with pytest.raises(ValueError, match="must be given for length, got size"):
        family.at(size=24)
