import json

import pytest

from ollie_compile import cli

NET = "import torch\ndef build():\n    return torch.nn.Conv2d(1, 4, 3)\n"


def run(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["ollie", *arguments])
    with pytest.raises(SystemExit) as done:
        cli.main()
    return done.value.code or 0


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: {tmp_path}/net.py:build\ninput_shape: [1, 1, 6, 6]\noptions: {{tune: model}}\n")
    return path


def test_explain_prints_and_writes_json(recipe, tmp_path, monkeypatch, capsys):
    out = tmp_path / "deep" / "report.json"
    assert run(monkeypatch, "explain", str(recipe), "--json", str(out), "--max-depth", "0") == 0
    assert "conv2d 1x1x6x6 -> 4 channels, 3x3" in capsys.readouterr().out
    assert json.loads(out.read_text())["operators"][0]["search"]["complete"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-depth", "-1"], "`max_depth` must be a whole number, 0 or more, got -1"),
        (["--model", "missing.py:f"], "The model file missing.py does not exist"),
        (["--model", "math:nothing"], "math has no function `nothing`"),
        (["--model", "no.such.module:f"], "The model 'no.such.module:f' names no module"),
        (["--model", "torch.nn:Conv2d"], "it failed: "),
        (["--input-shape", "1x3x6x6"], "for an input of shape [1, 3, 6, 6]; it failed: "),
        (["--input-shape", "1x-1x6x6"], "`input_shape` must look like 1x3x224x224, got '1x-1x6x6'"),
        (["--input-shape", "1xbig"], "`input_shape` must look like 1x3x224x224, got '1xbig'"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(recipe, monkeypatch, capsys, arguments, message):
    assert run(monkeypatch, "explain", str(recipe), *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "text",
    [
        "model: x",
        "- 1",
        "model: a\ninput_shape: [1]\nextra: 1",
        "a: [",
        "model: a\ninput_shape: 1\noptions: 3",
    ],
)
def test_bad_recipes_are_named(tmp_path, monkeypatch, capsys, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert run(monkeypatch, "explain", str(path)) == 2
    assert str(path) in capsys.readouterr().err
