"""Clocks that run only while this program computes, so that decisions do not depend on other programs.

A budget of seconds is one of CPU time: of the thread that plans, of the compilers that it starts, and of the
processes that search for it. Beside other work the same is done in it, and only takes longer.
"""

from __future__ import annotations

import os
import time

import torch


def now() -> float:
    """Seconds of CPU time: of this thread, and of the ended processes that this one has started."""
    children = os.times()
    return time.thread_time() + children.children_user + children.children_system


def of_calls() -> float:
    """Seconds by which calls are timed: CPU time of this thread, which waits for those of a parallel kernel.

    Where there is a GPU, of the wall clock, for its kernels run beside the thread.
    """
    return time.perf_counter() if torch.cuda.is_available() else time.thread_time()
