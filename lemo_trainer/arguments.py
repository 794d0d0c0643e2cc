"""LeMo's options as command-line flags, for scripts built on `transformers.HfArgumentParser`."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from lemo_trainer.callback import LemoCallback
from lemo_trainer.config import LemoConfig
from lemo_trainer.registry import describe_selectors, selector_names

_T = TypeVar("_T")
PREFIX = "lemo_"


def documented_fields(cls: type) -> dict[str, str]:
    """The text about each name in the "Args:" section of a class's docstring, as one line."""
    section = inspect.getdoc(cls).partition("Args:\n")[2]  # type: ignore[union-attr]
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def config_help() -> dict[str, str]:
    """The documentation of each field of `LemoConfig`, with the selectors that are registered."""
    documentation = documented_fields(LemoConfig)
    return documentation | {"selector": f"{documentation['selector']} {describe_selectors()}."}


class _SelectorNames:
    """The values of `selector` as choices of a parser, also those that are registered later."""

    def __contains__(self, name: object) -> bool:
        return name in selector_names()

    def __iter__(self) -> Iterator[str]:
        return iter(selector_names())


def flag_type(hint: Any) -> Any:
    """The type of a field on the command line: text if the field takes text or a sequence."""
    if get_origin(hint) is types.UnionType and str in get_args(hint):
        return str | None if type(None) in get_args(hint) else str
    return hint


def _with_config_fields(cls: type[_T]) -> type[_T]:
    """The dataclass `cls` with a field `lemo_NAME` for each field NAME of `LemoConfig`."""
    hints, documentation = get_type_hints(LemoConfig), config_help()
    fields = []
    for known in dataclasses.fields(LemoConfig):
        metadata: dict[str, Any] = {"help": documentation[known.name].replace("%", "%%")}
        if known.name == "selector":
            metadata["choices"] = _SelectorNames()
        option = field(default=known.default, metadata=metadata)
        fields.append((PREFIX + known.name, flag_type(hints[known.name]), option))
    namespace = {"__doc__": cls.__doc__, "__module__": cls.__module__}
    return dataclasses.make_dataclass(cls.__name__, fields, bases=(cls,), namespace=namespace)


@_with_config_fields
@dataclass
class LemoArguments:
    """Flags for `HfArgumentParser`: `--lemo --lemo_keep_ratio 0.4`, and so on for each field of `LemoConfig`.

        parser = HfArgumentParser((ModelArguments, TrainingArguments, LemoArguments))
        model_args, training_args, lemo_args = parser.parse_args_into_dataclasses()
        trainer = Trainer(model, training_args, train_dataset=data, callbacks=lemo_args.callbacks())

    Raises:
        ValueError: a value that `LemoConfig` refuses, or an option of LeMo without `--lemo`.
    """

    lemo: bool = field(default=False, metadata={"help": "train with LeMo; the other options need it"})
    lemo_measure: bool = field(
        default=False,
        metadata={"help": "measure saved bytes and FLOPs of the first step that leaves tokens out"},
    )

    def __post_init__(self) -> None:
        self.config()
        if not self.lemo:
            for known in dataclasses.fields(self):
                if getattr(self, known.name) != known.default:
                    raise ValueError(f"`{known.name}` must come with `--lemo`, which is not set; add it.")

    def config(self) -> LemoConfig | None:
        """The checked configuration; None without `--lemo`."""
        values = {known.name: getattr(self, PREFIX + known.name) for known in dataclasses.fields(LemoConfig)}
        config = LemoConfig.from_dict(values)
        return config if self.lemo else None

    def callbacks(self) -> list[LemoCallback]:
        """The callbacks for a `Trainer`: one `LemoCallback`, or none without `--lemo`."""
        config = self.config()
        return [] if config is None else [LemoCallback(config, measure=self.lemo_measure)]
