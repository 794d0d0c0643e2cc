"""OLLIE: a torch.compile backend that derives faster tensor programs (arXiv 2208.02025)."""

from ollie_compile.config import OllieConfig
from ollie_compile.custom import operator
from ollie_compile.explanation import explain
from ollie_compile.export import inductor_configs
from ollie_compile.graph.held import refreeze
from ollie_compile.report.report import Report

__all__ = ["OllieConfig", "Report", "explain", "inductor_configs", "operator", "refreeze"]
