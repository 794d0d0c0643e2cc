import json
import re

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


def test_explain_prints_and_writes_json_and_html(recipe, tmp_path, monkeypatch, capsys, uncompiled):
    out, page = tmp_path / "deep" / "report.json", tmp_path / "pages" / "report.html"
    arguments = ["--json", str(out), "--html", str(page), "--max-depth", "0", "--budget-s", "20"]
    assert run(monkeypatch, "explain", str(recipe), *arguments) == 0
    assert "conv2d 1x1x6x6 -> 4 channels, 3x3" in capsys.readouterr().out
    assert json.loads(out.read_text())["operators"][0]["search"]["complete"]
    html = page.read_text()
    assert "conv2d 1x1x6x6 -&gt; 4 channels, 3x3" in html
    assert "<svg" in html
    assert not re.search(r"(src|href)=\"?(http|//)", html)


def test_explain_takes_functions_and_hugging_face_folders(recipe, tmp_path, monkeypatch, capsys, uncompiled):
    from transformers import LlamaConfig, LlamaModel

    function = str(recipe.with_name("net.py")) + ":build"
    assert run(monkeypatch, "explain", function, "--input-shape", "2x1x5x5", "--budget-s", "0") == 0
    assert "conv2d 2x1x5x5" in capsys.readouterr().out
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    LlamaModel(LlamaConfig(**sizes, **heads)).save_pretrained(tmp_path / "llama")
    assert run(monkeypatch, "explain", str(tmp_path / "llama"), "--budget-s", "0") == 0
    assert "products side by side" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RECIPE", "--max-depth", "-1"], "`max_depth` must be a whole number, 0 or more, got -1"),
        (["missing.py:f", "--input-shape", "1"], "The model file missing.py does not exist"),
        (["math:nothing", "--input-shape", "1"], "math has no function `nothing`"),
        (["no.such.module:f", "--input-shape", "1"], "The model 'no.such.module:f' names no module"),
        (["torch.nn:Conv2d", "--input-shape", "1"], "it failed: "),
        (["torch.nn:Conv2d"], "`input_shape` must be given for torch.nn:Conv2d"),
        (
            ["no/such/model"],
            "'no/such/model' is not a recipe, a function, or a Hugging Face model: give a recipe",
        ),
        (["RECIPE", "--mode", "fast"], "`mode` must be one of default"),
        (["RECIPE", "--input-shape", "1x3x6x6"], "for an input of shape [1, 3, 6, 6]; it failed: "),
        (["RECIPE", "--input-shape", "1x-1x6x6"], "`input_shape` must look like 1x3x224x224, got '1x-1x6x6'"),
        (["RECIPE", "--input-shape", "1xbig"], "`input_shape` must look like 1x3x224x224, got '1xbig'"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(recipe, monkeypatch, capsys, arguments, message):
    given = [str(recipe) if argument == "RECIPE" else argument for argument in arguments]
    assert run(monkeypatch, "explain", *given) == 2
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
