import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ripple_loader import ReorderConfig, RippleConfig
from ripple_loader.config import parse_size
from ripple_loader.registry import CACHE_POLICIES, PLACEMENTS


@settings(deadline=None)
@given(st.integers(1, 1 << 50))
def test_sizes_in_bytes_round_trip(size):
    assert parse_size(size, "x") == parse_size(str(size), "x") == parse_size(f"{size} B", "x") == size


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GiB", 2 << 30), ("1.5 MiB", 3 << 19), ("10kb", 10_000), ("25%", 250), ("100%", 1000)],
)
def test_sizes_with_units(text, size):
    assert parse_size(text, "x", total=1000) == size


@pytest.mark.parametrize("size", [0, -1, "", "many", "5 parsecs", "-3MiB", "0%", "101%", True, None, 1.5e3j])
def test_sizes_that_are_none(size):
    with pytest.raises(ValueError, match="`x` must be"):
        parse_size(size, "x", total=1000)


def test_a_share_needs_a_total():
    with pytest.raises(ValueError, match="25%"):
        parse_size("25%", "x")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0}, "`keep` must be above 0"),
        ({"keep": 1.01}, "got 1.01"),
        ({"keep": "half"}, "`keep`"),
        ({"dram_budget": "lots"}, "`dram_budget`.*'lots'"),
        ({"merge_gap": "25%"}, "`merge_gap`"),
        ({"buffer": 0}, "`buffer`"),
        ({"queue_depth": 0}, "`queue_depth`"),
        ({"strategy": "fast"}, "one of auto, dense, sparse"),
        ({"io_engine": "magic"}, "one of auto, aio, threads"),
        ({"cache_policy": "magic"}, f"one of {CACHE_POLICIES.names()}, got 'magic'"),
        ({"quant_method": "gptq"}, "gptq"),
        ({"dram_bugdet": 1}, "no key 'dram_bugdet'; did you mean dram_budget"),
    ],
)
def test_bad_loader_options(options, message):
    with pytest.raises(ValueError, match=message):
        RippleConfig.from_dict(options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"placement": "magic"}, f"one of {PLACEMENTS.names()}, got 'magic'"),
        ({"active_share": 0.0}, "`active_share`"),
        ({"tokens": 1.5}, "`tokens`"),
        ({"partners": -1}, "got -1"),
        ({"token": 5}, "did you mean tokens"),
    ],
)
def test_bad_reorder_options(options, message):
    with pytest.raises(ValueError, match=message):
        ReorderConfig.from_options(options)


def test_yaml_recipes(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("reorder: {model: here, tokens: 64}\nload: {keep: 0.5, dram_budget: 1GiB}\n")
    assert ReorderConfig.from_yaml(recipe) == ReorderConfig(tokens=64)
    assert RippleConfig.from_yaml(recipe) == RippleConfig(keep=0.5, dram_budget="1GiB")
    for text, message in [("a: {}", "no key 'a'"), ("[1]", "must map"), ("{", "must be YAML")]:
        recipe.write_text(text)
        with pytest.raises(ValueError, match=message):
            RippleConfig.from_yaml(recipe)


def test_a_config_survives_json(tmp_path):
    config = RippleConfig(keep=0.5, dram_budget="25%")
    assert RippleConfig.from_dict(config.to_dict()) == config
