"""The training script of the ReLU model: a run that was killed ends with the numbers of one that was not."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_relu_lm.py"
TEXTS = [f"def f{number}(x):\n    return x + {number} * {number}\n" * 10 for number in range(60)]


@pytest.fixture(params=["opt", "arcee"])
def script(request, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(SCRIPT.parent / "bench")
    spec = importlib.util.spec_from_file_location("train_relu_lm", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    if request.param == "opt":
        shape |= {"model_type": "opt", "ffn_dim": 32, "word_embed_proj_dim": 16, "dropout": 0.0}
    else:
        shape |= {"model_type": "arcee", "intermediate_size": 32}
    for name, value in {
        "SHAPES": {"tiny": shape},
        "VOCABULARY": 300,
        "LENGTH": 16,
        "LOG_EVERY": 2,
        "documents": lambda: (TEXTS, TEXTS[:20]),
        "CACHE": tmp_path,
    }.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(sys.modules["common"], "RESULTS", tmp_path)
    return module


def numbers(folder):
    """The CSV's metrics and values, without the date and the conditions."""
    rows = [line.rsplit(",", 3)[1:] for line in (folder / "relu_lm.csv").read_text().splitlines()]
    (folder / "relu_lm.csv").unlink()
    return rows


def test_a_killed_run_ends_with_the_same_numbers(script, tmp_path, monkeypatch):
    script.main("tiny", 7, 0.9, 2)
    whole, model = numbers(tmp_path), tmp_path / "tiny"
    weights = AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert len(whole) > 15

    original, calls = torch.optim.AdamW.step, []

    def killed(self, *arguments):
        calls.append(self)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        script.main("tiny", 7, 0.9, 2)
    assert (tmp_path / "tiny.partial").exists()
    script.main("tiny", 7, 0.9, 2)
    assert len(calls) == 6 + 3  # steps 5 to 7, after the checkpoint of step 4
    assert numbers(tmp_path) == whole
    for name, weight in AutoModelForCausalLM.from_pretrained(model).state_dict().items():
        assert torch.equal(weight, weights[name])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny"]


def test_a_checkpoint_of_another_run_is_not_gone_on_with(script, tmp_path, capsys):
    layer = torch.nn.Linear(2, 2)
    script.Checkpoint(tmp_path / "file", "one", layer=layer).save(step=3)
    assert script.Checkpoint(tmp_path / "file", "other", layer=layer).load() is None
    assert "other arguments" in capsys.readouterr().err
    assert script.Checkpoint(tmp_path / "file", "one", layer=layer).load() == {"step": 3}
