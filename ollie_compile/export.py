"""Deriving ahead of time: models exported by torch.export and compiled by AOTInductor."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ollie_compile.config import OllieConfig, mode_options
from ollie_compile.report.report import Report


def inductor_configs(
    *, mode: str | None = None, report: Report | None = None, **options: Any
) -> dict[str, Any]:
    """Options that let AOTInductor derive: its argument `inductor_configs`.

        exported = torch.export.export(model, inputs)
        configs = ollie_compile.inductor_configs(budget_s=120)
        torch._inductor.aoti_compile_and_package(exported, package_path=path, inductor_configs=configs)

    Args:
        mode: a mode of torch.compile.
        report: filled with the decisions during the compilation.
        options: fields of `OllieConfig`, and Inductor's own options.

    Raises:
        ValueError: an unknown mode or option, or a value out of its range.
    """
    # The pass brings Inductor, which takes a second to import.
    from ollie_compile.backend import patches

    config, inductor = OllieConfig.with_inductor(options)
    config = replace(config, portable=True, freeze=bool(config.freeze))
    return patches(
        config.for_mode(mode), mode_options(mode) | inductor, Report() if report is None else report
    )
