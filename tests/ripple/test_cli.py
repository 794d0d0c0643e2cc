import json

import datasets
import pytest
import torch
from typer.testing import CliRunner

from ripple_loader.cli import app
from ripple_loader.format.layout import SIDECAR
from ripple_loader.offline.trace import Trace
from ripple_loader.storage.drive import DriveProfile


class Tokenizer:
    """Letters as token ids, for models that come without a tokenizer."""

    def __call__(self, text, return_tensors=None):
        ids = [3 + ord(letter) % 100 for letter in text]
        encoding = type("Encoding", (dict,), {"input_ids": torch.tensor([ids]) if return_tensors else ids})
        return encoding(input_ids=encoding.input_ids)

    def decode(self, ids, **_):
        return " ".join(map(str, ids.tolist()))


@pytest.fixture(autouse=True)
def _tokenizer(monkeypatch):
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: Tokenizer())


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": "some text to trace " * 5}) for _ in range(4)))
    return path


def test_reorder_inspect_generate(saved, text, tmp_path):
    out = tmp_path / "out"
    result = run("reorder", saved("llama"), "--calibration", text, "--out", out, "--tokens", 64)
    assert result.exit_code == 0, result.output
    assert "expected reads per token and MLP" in result.stderr
    result = run("inspect", out, "--verify")
    assert json.loads(result.stdout)["profile"]["tokens"] == 64
    result = run("verify", out, "--original", saved("llama"))
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) == 7
    result = run("generate", out, "hello", "--dram-budget", "1MiB", "--max-new-tokens", 3)
    assert result.exit_code == 0, result.output
    assert len(result.stdout.split()) == len("hello") + 3
    assert "tokens/s" in result.stderr


def test_trace_then_reorder(saved, text, tmp_path):
    traced, out, options = tmp_path / "trace", tmp_path / "out", ("--tokens", 64, "--active", "energy")
    result = run("trace", saved("llama"), "--calibration", text, "--out", traced, *options)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(traced)
    result = run("reorder", saved("llama"), "--trace", traced, "--out", out, "--bundles", "int8")
    assert result.exit_code == 0, result.output
    header = json.loads(run("inspect", out).stdout)
    assert header["profile"]["tokens"] == 64
    assert header["dtype"] == "I8"
    assert "another model" in bad("reorder", saved("opt"), "--trace", traced, "--out", tmp_path / "b")
    both = ("--trace", traced, "--calibration", text)
    assert "got both" in bad("reorder", saved("llama"), *both, "--out", tmp_path / "b")
    assert "differs in tokens" in bad(
        "trace", saved("llama"), "--calibration", text, "--out", traced, "--tokens", 65, "--active", "energy"
    ).replace("sequences, ", "")
    for option in (
        ("--tokens", 32),
        ("--sequence-length", 8),
        ("--active", "top_k"),
        ("--active-share", 0.2),
    ):
        name = option[0].removeprefix("--").replace("-", "_")
        error = bad("reorder", saved("llama"), "--trace", traced, "--out", tmp_path / "b", *option)
        assert f"`{name}` must not be given beside `trace`" in error
    next(traced.glob("sequence*")).unlink()
    assert "1 are missing" in bad("reorder", saved("llama"), "--trace", traced, "--out", tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text.jsonl", "trace"]


def test_recipe(saved, text, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"reorder: {{model: {saved('llama')}, calibration: {text}, out: {tmp_path / 'out'}, tokens: 64}}\n"
        "load: {dram_budget: 1MiB, keep: 0.5}\n"
    )
    assert run("reorder", "--config", recipe, "--placement", "random").exit_code == 0
    assert json.loads(run("inspect", tmp_path / "out").stdout)["profile"]["placement"] == "random"
    result = run("generate", tmp_path / "out", "hello", "--config", recipe, "--max-new-tokens", 3)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("command", ["trace", "reorder", "generate", "inspect", "verify", "probe"])
def test_help_has_an_example(command):
    assert f"ripple {command} out" in run(command, "--help").output.replace("SmolLM2-135M-Instruct ", "out")


def bad(*arguments):
    """Run a command that must fail as a user error; returns its one sentence."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1
    return result.stderr


def test_bad_input_is_one_sentence_and_exit_code_2(saved, reordered, text, tmp_path):
    out, model = tmp_path / "out", saved("llama")
    assert "nowhere must be a directory or a model of the Hugging Face hub" in bad(
        "reorder", "nowhere", "--calibration", text, "--out", out
    )
    assert "nothing.txt does not exist" in bad("reorder", model, "--calibration", "nothing.txt", "--out", out)
    assert "`out` must be given" in bad("reorder", model, "--calibration", text)
    assert "'magic'" in bad("reorder", model, "--calibration", text, "--out", out, "--placement", "magic")
    assert "not exist yet" in bad("reorder", model, "--calibration", text, "--out", tmp_path)
    assert "ripple reorder" in bad("generate", model, "hello")
    assert "got 7.0" in bad("generate", reordered("llama"), "hello", "--keep", 7)
    assert "between 0.8 and 0.999" in bad("generate", reordered("opt"), "hello", "--recall", 0.5)
    assert "use `keep`" in bad("generate", reordered("llama"), "hello", "--recall", 0.9)
    assert "at least" in bad("generate", reordered("llama"), "hello", "--dram-budget", "5")
    assert SIDECAR in bad("inspect", tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("load: {kep: 0.5}")
    assert "did you mean keep" in bad("generate", reordered("llama"), "hello", "--config", recipe)
    assert "No such file" in bad("generate", reordered("llama"), "hello", "--config", tmp_path / "no.yaml")
    text.write_text('{"txt": 1}\n')
    assert "line 1" in bad("reorder", model, "--calibration", text, "--out", out)
    assert not out.exists()


def test_calibration_from_datasets_and_long_files(saved, tmp_path, monkeypatch):
    rows = datasets.Dataset.from_list([{"text": f"row {number} " * 4} for number in range(20)])
    rows.save_to_disk(tmp_path / "rows")
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "splits")
    (tmp_path / "long.txt").write_text("a line of text\n" * 200_000)
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or rows)
    for number, calibration in enumerate([tmp_path / "rows", tmp_path / "long.txt", "hub:org/name:test"]):
        out = tmp_path / f"trace-{number}"
        result = run("trace", saved("llama"), "--calibration", calibration, "--out", out, "--tokens", 64)
        assert result.exit_code == 0, result.output
        assert len(Trace(out).sets(0)) == 64
    assert asked == [(("org/name",), {"split": "test", "streaming": True})]
    options = ("--out", tmp_path / "no")
    assert "holds train" in bad("trace", saved("llama"), "--calibration", tmp_path / "splits", *options)
    assert "Dataset" in bad("trace", saved("llama"), "--calibration", saved("llama"), *options)


def test_probe(tmp_path, monkeypatch):
    monkeypatch.setattr("ripple_loader.storage.probing._WRITTEN", 4 << 20)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    result = run("probe", tmp_path, "--seconds", 0.05)
    assert result.exit_code == 0, result.output
    assert "fit error" in result.output
    (kept,) = (tmp_path / "cache").rglob("*.json")
    assert DriveProfile.load(kept).depths == [1, 4, 16, 32, 64]
    assert list(tmp_path.iterdir()) == [tmp_path / "cache"]
    assert "does not exist" in bad("probe", tmp_path / "no" / "where")
    monkeypatch.chdir(tmp_path)
    assert "nope does not exist" in bad("probe", "nope")
