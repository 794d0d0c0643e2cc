"""LeMo: long-context fine-tuning that leaves redundant tokens out (arXiv 2501.09767)."""

from .callback import LemoCallback
from .config import LemoConfig
from .patch import LemoReport, apply_lemo, remove_lemo

__all__ = ["LemoCallback", "LemoConfig", "LemoReport", "apply_lemo", "remove_lemo"]
