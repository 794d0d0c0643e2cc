from __future__ import annotations

import dataclasses

import pytest
from transformers import HfArgumentParser, TrainingArguments

from lemo_trainer import LemoArguments, LemoConfig


def parse(*flags):
    parser = HfArgumentParser((TrainingArguments, LemoArguments))
    return parser.parse_args_into_dataclasses(["--output_dir", "out", *flags])[1]


def test_every_field_of_the_config_is_a_flag_with_its_default_and_documentation():
    arguments = {field.name: field for field in dataclasses.fields(LemoArguments)}
    for field in dataclasses.fields(LemoConfig):
        argument = arguments[f"lemo_{field.name}"]
        assert argument.default == field.default
        assert len(argument.metadata["help"]) > 20
    assert parse("--lemo").config() == LemoConfig()
    assert "share of the tokens" in HfArgumentParser(LemoArguments).format_help()


def test_flags_make_a_config_and_a_callback():
    arguments = parse(
        *["--lemo", "--lemo_mode", "eliminate", "--lemo_keep_ratio", "0.4", "--lemo-layers", "3,10-28"],
        *["--lemo_block_size=32", "--lemo_measure", "--no_lemo_selective_checkpointing"],
    )
    wanted = LemoConfig(
        mode="eliminate", keep_ratio=0.4, layers="3,10-28", block_size=32, selective_checkpointing=False
    )
    assert arguments.config() == wanted
    (callback,) = arguments.callbacks()
    assert (callback.config, callback.measure) == (wanted, True)


def test_without_the_flag_nothing_is_added():
    assert parse().config() is None
    assert parse().callbacks() == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lemo", "--lemo_keep_ratio", "2"], "`keep_ratio` must be .*got 2"),
        (["--lemo", "--lemo_block_size", "0"], "`block_size` must be .*got 0"),
        (["--lemo_keep_ratio", "0.4"], "`lemo_keep_ratio` must come with `--lemo`"),
        (["--lemo_measure"], "`lemo_measure` must come with `--lemo`"),
    ],
)
def test_values_that_cannot_be_are_refused_when_parsed(flags, message):
    with pytest.raises(ValueError, match=message):
        parse(*flags)


def test_a_selector_that_does_not_exist_is_named(capsys):
    with pytest.raises(SystemExit):
        parse("--lemo", "--lemo_selector", "best")
    assert "invalid choice: 'best'" in capsys.readouterr().err
