"""The table of the selectors that `LemoConfig(selector=...)` can name, with the traits that it checks.

The classes register themselves (`lemo_trainer.informativeness.selectors`). The checks of a configuration, the
command line and the help texts all read this table.
"""

from __future__ import annotations

from typing import ClassVar

AUTO = "auto"


class SelectorTraits:
    """The properties of a selector that do not depend on a model.

    Attributes:
        summary: how it ranks blocks, for help texts and docs.
        modes: the modes of `LemoConfig` in which it can be used.
        options: fields of `LemoConfig` that only this selector reads; with another selector they must keep
            their defaults.
        searchable: whether thresholds can be searched for its scores, which must then depend on the text
            only.
        stand_in: name of the selector that `lemo plan` predicts instead, for one that needs a trained model.
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
