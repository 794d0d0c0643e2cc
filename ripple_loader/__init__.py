"""Ripple: run language models larger than memory by streaming linked MLP neurons from flash."""

from ripple_loader.config import ReorderConfig, RippleConfig
from ripple_loader.loader import RippleQuantizer, attach
from ripple_loader.offline.reordering import reorder
from ripple_loader.report import RippleReport

__all__ = ["ReorderConfig", "RippleConfig", "RippleQuantizer", "RippleReport", "attach", "reorder"]
