"""The selectors that `LemoConfig(selector=...)` can name, and what a configuration must know of each.

The classes register themselves (`lemo_trainer.informativeness.selectors`). Checks of a configuration, command
line and help texts read this table, so that none of them lists selectors of its own.
"""

from __future__ import annotations

from typing import ClassVar

AUTO = "auto"


class SelectorTraits:
    """What is known of a selector before there is a model.

    Attributes:
        summary: how it ranks blocks, for help texts and docs.
        modes: the modes of `LemoConfig` in which it can be used.
        options: fields of `LemoConfig` that only this selector reads; with another one they must keep their
            defaults.
        searchable: its scores are a property of the text, so that thresholds can be searched for them.
        stand_in: the selector whose step `lemo plan` predicts, where this one needs a trained model; None
            predicts its own.
    """

    summary: ClassVar[str]
    modes: ClassVar[tuple[str, ...]] = ("detach", "eliminate")
    options: ClassVar[tuple[str, ...]] = ()
    searchable: ClassVar[bool] = False
    stand_in: ClassVar[str | None] = None


SELECTORS: dict[str, type[SelectorTraits]] = {}


def selector_names(mode: str | None = None) -> list[str]:
    """The values that `selector` takes, "auto" first; with a mode, those that can be used in it."""
    fitting = [name for name, traits in SELECTORS.items() if mode is None or mode in traits.modes]
    return [AUTO, *fitting]


def describe_selectors() -> str:
    """One sentence for all registered selectors: `"name": summary; ...`."""
    return "; ".join(f'"{name}": {traits.summary}' for name, traits in SELECTORS.items())
