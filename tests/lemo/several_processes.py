"""Runs scripts/finetune.py in each process of a torchrun, once for each list of arguments (JSON)."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from scripts import finetune


def load_model_for_fsdp(*arguments: Any) -> Any:
    """accelerate keeps FSDP to GPUs and silently takes DDP on the CPU: let it take the CPU for one."""
    PartialState().distributed_type = DistributedType.MULTI_GPU
    return load_model(*arguments)


load_model = finetune.load_model


def run(arguments: list[str]) -> Any:
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    finetune.load_model = load_model_for_fsdp if "--fsdp" in arguments else load_model
    sys.argv = ["finetune.py", *arguments]
    return finetune.main()


if __name__ == "__main__":
    for arguments in json.loads(sys.argv[1]):
        model = run(arguments).model
        for name, part in model.named_modules():
            assert not [attribute for attribute in vars(part) if "lemo" in attribute], name
            assert type(part).__module__.partition(".")[0] != "lemo_trainer", name
        assert not [name for name in model.state_dict() if "lemo" in name]
        layer = next(part for part in model.modules() if hasattr(part, "mlp"))
        # Processes share the pipe: a line must be written at once.
        print(f"layer class: {type(layer).__name__}\n", end="", flush=True)
