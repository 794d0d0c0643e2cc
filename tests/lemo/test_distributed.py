"""Two processes train as one does with the same global batch: DDP and FSDP2, over gloo on the CPU."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from lemo_trainer import LemoConfig
from lemo_trainer.compat import checkpointing_argument

from .several_processes import run
from .training import losses, save_model_and_text

# peft 0.21 still reads transformers' old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

FSDP2 = {
    "version": 2,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
}
DEFAULTS = {field.name: field.default for field in dataclasses.fields(LemoConfig)}
WITHOUT_BLOCKS = {f"lemo_{name}": DEFAULTS[name] for name in ("layers", "block_size")}
EXACT = WITHOUT_BLOCKS | {"lemo_mode": "exact", "lemo_segment_tokens": 8}
AUTO = WITHOUT_BLOCKS | {"lemo_mode": "auto", "lemo_segment_tokens": 8}
RUNS = {
    "ddp, everything": {"lemo_keep_ratio": 1.0},
    "ddp, half": {"lemo_keep_ratio": 0.5, "gradient_accumulation_steps": 2},
    "ddp, segments": WITHOUT_BLOCKS
    | {"lemo_mode": "segments", "lemo_segment_tokens": 8, "lemo_keep_ratio": 1.0},
    "ddp, auto": AUTO | {"lora_r": 2},
    "ddp, exact by segments": EXACT | {"lemo_scheme": "segments", "gradient_accumulation_steps": 2},
    "ddp, exact by layers": EXACT | {"lemo_scheme": "layers", "lora_r": 2},
    "fsdp2, exact": EXACT | {"lemo_scheme": "layers", "lemo_boundaries": "disk"},
    "fsdp2, auto": AUTO,
    "fsdp2, half": {
        "lemo_mode": "eliminate",
        "lemo_keep_ratio": 0.5,
        "lora_r": 2,
        checkpointing_argument(): True,
    },
}


def flags(folder: Path, output: Path, batch_size: int, **options: object) -> list[str]:
    options = {
        "model_name_or_path": folder / "model",
        "train_file": folder / "text.txt",
        "output_dir": output,
        "seq_len": 32,
        "per_device_train_batch_size": batch_size,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "lemo": True,
        "lemo_layers": "all",
        "lemo_block_size": 4,
        "lemo_loss_segment": 32,
        **options,
    }
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def check(name: str, folder: Path, arguments: dict[str, object]) -> None:
    """The logs and files of two processes in folder/`name` are those of one."""
    alone = run(flags(folder, folder / "alone", 4, **arguments))
    state = json.loads((folder / name / "trainer_state.json").read_text())
    for metric in ("loss", "grad_norm", "lemo_kept_share"):
        logged = [entry[metric] for entry in state["log_history"] if metric in entry]
        wanted = [entry[metric] for entry in alone.state.log_history if metric in entry]
        assert logged == pytest.approx(wanted, rel=1e-4), metric
    assert len(losses(alone)) == 2
    file = "adapter_model.safetensors" if "lora_r" in arguments else "model.safetensors"
    got, wanted_weights = load_file(folder / name / file), load_file(folder / "alone" / file)
    assert_close(got, wanted_weights, rtol=1e-3, atol=1e-4)


def launch(runs: list[list[str]]) -> str:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    script = Path(__file__).with_name("several_processes.py")
    process = subprocess.run([*launcher, script, json.dumps(runs)], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-5000:]
    return process.stdout


def test_two_processes_train_as_one(tmp_path):
    save_model_and_text(tmp_path)
    sharded = ["--fsdp", "full_shard auto_wrap", "--fsdp_config", json.dumps(FSDP2)]
    runs = [
        flags(tmp_path, tmp_path / name, 2, **options) + sharded * name.startswith("fsdp2")
        for name, options in RUNS.items()
    ]
    output = launch(runs)
    assert output.count("layer class: LlamaDecoderLayer") == 12
    assert output.count("layer class: FSDPLlamaDecoderLayer") == 6
    for name, options in RUNS.items():
        check(name, tmp_path, options)


@pytest.mark.slow  # DeepSpeed compiles an extension when it is used for the first time
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_trains_as_one_process(tmp_path, stage):
    save_model_and_text(tmp_path)
    config = {
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": "auto",
        "gradient_accumulation_steps": "auto",
        "train_micro_batch_size_per_gpu": "auto",
    }
    (tmp_path / "zero.json").write_text(json.dumps(config))
    options = {"lemo_keep_ratio": 0.5}
    launch([[*flags(tmp_path, tmp_path / "zero", 2, **options), "--deepspeed", str(tmp_path / "zero.json")]])
    check("zero", tmp_path, options)
