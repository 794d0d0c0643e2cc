from hypothesis import given
from hypothesis import strategies as st

from ollie_compile.expr import Affine, quotient, remainder

RANGES = {"a": (-3, 4), "b": (0, 6), "c": (2, 3)}


def value(index: Affine, at: dict[str, int]) -> int:
    total = index.const
    for atom, coefficient in index.terms:
        if isinstance(atom, str):
            total += coefficient * at[atom]
        else:
            inner = value(atom.of, at)
            total += coefficient * (inner // atom.by if " // " in str(atom) else inner % atom.by)
    return total


affines = st.builds(
    lambda terms, const: Affine.total(iter(terms), const),
    st.lists(st.tuples(st.sampled_from(sorted(RANGES)), st.integers(-5, 5)), max_size=4),
    st.integers(-9, 9),
)
points = st.fixed_dictionaries({name: st.integers(low, high - 1) for name, (low, high) in RANGES.items()})


@given(affines, affines, st.integers(-4, 4), points)
def test_arithmetic_is_exact(left, right, factor, at):
    assert value(left + right, at) == value(left, at) + value(right, at)
    assert value(left - right, at) == value(left, at) - value(right, at)
    assert value(left * factor, at) == value(left, at) * factor


@given(affines, st.integers(1, 6), points)
def test_quotient_and_remainder_are_floor_division(index, by, at):
    assert value(quotient(index, by, RANGES), at) == value(index, at) // by
    assert value(remainder(index, by, RANGES), at) == value(index, at) % by


@given(affines, st.integers(1, 6), points)
def test_bounds_hold(index, by, at):
    for expression in (index, quotient(index, by, RANGES), remainder(index, by, RANGES)):
        low, high = expression.bounds(RANGES)
        assert low <= value(expression, at) <= high


@given(affines, affines, st.integers(1, 6), points)
def test_substitution_commutes_with_evaluation(index, replacement, by, at):
    divided = quotient(index, by, RANGES) + remainder(index, by, RANGES) * 2
    substituted = divided.substitute({"a": replacement}, RANGES)
    assert value(substituted, at) == value(divided, at | {"a": value(replacement, at)})


def test_normal_form_drops_what_ranges_decide():
    b = Affine.of("b")
    assert quotient(b * 6 + Affine.of("c"), 6, RANGES) == b
    assert remainder(b * 6 + Affine.of("c"), 6, RANGES) == Affine.of("c")
    assert str(quotient(b + 7, 4, RANGES)) == "((b + 3) // 4) + 1"
    assert str(quotient(b, 2, RANGES)) == "b // 2"
    assert b - b == Affine()
    assert quotient(b * 12 + Affine.of("c"), 36, RANGES) == quotient(b, 3, RANGES)
    assert remainder(b * 12 + Affine.of("c"), 36, RANGES) == remainder(b, 3, RANGES) * 12 + Affine.of("c")
