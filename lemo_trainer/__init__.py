"""LeMo: long-context fine-tuning that leaves redundant tokens out (arXiv 2501.09767)."""

from lemo_trainer.arguments import LemoArguments
from lemo_trainer.callback import LemoCallback
from lemo_trainer.config import LemoConfig
from lemo_trainer.patch import apply_lemo, remove_lemo
from lemo_trainer.report import LemoReport

__all__ = ["LemoArguments", "LemoCallback", "LemoConfig", "LemoReport", "apply_lemo", "remove_lemo"]
