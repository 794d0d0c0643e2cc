"""What can be tried of the GPU scripts without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_without_a_gpu_the_script_says_so():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", ROOT / "scripts" / "gpu.sh"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "gpu: no GPU, nothing was run" in done.stderr


# peft 0.21 still reads transformers' old name
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_end_to_end_table_runs_on_a_tiny_model(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "scripts" / "bench")
    import common
    import lemo_gpu

    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["lemo_gpu.py", "--tiny", "--repeats", "1", "--seq-lens", "192"])
    lemo_gpu.main()
    rows = (tmp_path / "lemo_gpu_tiny.csv").read_text()
    assert all(rows.count(name) >= 3 for name in lemo_gpu.CONTENDERS if name != lemo_gpu.LIGER)
