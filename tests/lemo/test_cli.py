from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from lemo_trainer.cli import app
from lemo_trainer.informativeness.predictor_files import load_predictors

from .training import save_model_and_text

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / ".cache" / "assets" / "SmolLM2-135M-Instruct"


# peft 0.21 still reads transformers' old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def recipe(tmp_path):
    """A recipe for a tiny model with the real tokenizer, as a dict; write it with `save`."""
    save_model_and_text(tmp_path)
    return {
        "model": str(tmp_path / "model"),
        "train_file": str(tmp_path / "text.txt"),
        "eval_file": str(tmp_path / "text.txt"),
        "output_dir": str(tmp_path / "out"),
        "seq_len": 64,
        "lemo": {"keep_ratio": 0.5, "block_size": 8},
        "training": {"max_steps": 1, "use_cpu": True, "save_strategy": "no", "dataloader_pin_memory": False},
    }


def invoke(recipe, tmp_path, *options):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return CliRunner().invoke(app, ["train", str(path), *options])


def test_train_runs_a_recipe_with_overrides(recipe, tmp_path):
    result = invoke(recipe, tmp_path, "--layers", "0,2", "--checkpointing", "--keep-ratio", "0.4")
    assert result.exit_code == 0, result.output
    assert "patched 2 of 3 layers" in result.output
    assert "held-out loss, dense:" in result.output
    assert (tmp_path / "out" / "model.safetensors").exists()
    saved = yaml.safe_load((tmp_path / "out" / "lemo_config.json").read_text())
    assert (saved["layers"], saved["keep_ratio"], saved["block_size"]) == ("0,2", 0.4, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "./no/such/model"}, "No such model folder: ./no/such/model"),
        ({"train_file": "absent.jsonl"}, "No such text file: absent.jsonl"),
        ({"seq_len": 100_000}, "at least `seq_len` 100000 tokens"),
        ({"seq_len": 0}, "`seq_len` must be .*got 0"),
        ({"sequence_len": 5}, "no option 'sequence_len'; the closest are seq_len"),
        ({"lemo": {"keep_ratio": 2}}, "`keep_ratio` must be .*got 2"),
        ({"lemo": {"keep": 0.5}}, "no option 'keep'"),
        ({"lemo": {"keep_ratio": 0.5, "layers": "7"}}, "from 0 to 2 in this model, got '7'"),
        ({"lemo": 0.5}, "`lemo` must be a mapping"),
        ({"training": {"max_step": 1}}, "no option 'max_step'; the closest are max_steps"),
        ({"lora": {"rank": 8}}, "`lora` has no option 'rank'"),
        ({"lora": {"r": 2, "target_modules": ["lm_head", "q_proj"]}}, "output head"),
    ],
)
def test_a_recipe_that_cannot_run_says_why_and_writes_nothing(recipe, tmp_path, change, message):
    result = invoke({**recipe, **change}, tmp_path)
    assert result.exit_code == 2
    last_line = result.stderr.splitlines()[-1]  # a progress bar may come before
    assert re.match(f"lemo: .*{message}", last_line), result.stderr
    assert not (tmp_path / "out").exists()


def test_a_recipe_without_a_model_or_a_recipe_that_is_not_there(recipe, tmp_path):
    del recipe["model"]
    assert "must name `model`" in invoke(recipe, tmp_path).stderr
    result = CliRunner().invoke(app, ["train", "absent.yaml"])
    assert (result.exit_code, result.stderr) == (
        2,
        "lemo: No such file: absent.yaml (expected a YAML file).\n",
    )


def test_inspect_shows_what_would_be_patched():
    result = CliRunner().invoke(
        app, ["inspect", str(MODEL), "--mode", "eliminate", "--keep-ratio", "0.4", "--seq-len", "2000"]
    )
    assert result.exit_code == 0, result.output
    for fact in ("patched 14 of 30 layers", "15-28", "12 of 31 x 64 tokens, + 16", "784 of 2000 (39%)"):
        assert fact in result.output


def test_inspect_shows_thresholds_in_the_place_of_a_kept_share():
    result = CliRunner().invoke(app, ["inspect", str(MODEL), "--thresholds", "20-21:0.8"])
    assert result.exit_code == 0, result.output
    assert "20:0.8,21:0.8" in result.output
    assert "%" not in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["./nowhere"], "No such model folder: ./nowhere"),
        ([str(MODEL), "--block-size", "0"], "`block_size` must be a whole number of at least 1, got 0"),
        ([str(MODEL), "--seq-len", "0"], "`seq_len` must be at least 1, got 0"),
        ([str(MODEL), "--mode", "detach", "--layers", "30"], "from 0 to 29 in this model, got '30'"),
    ],
)
def test_inspect_names_what_is_wrong(arguments, message):
    result = CliRunner().invoke(app, ["inspect", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr


def test_an_unsupported_architecture_is_named(tmp_path):
    from transformers import BloomConfig

    BloomConfig(n_layer=1, n_head=2, hidden_size=16, vocab_size=32).save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["inspect", str(tmp_path), "--mode", "detach"])
    assert result.exit_code == 2
    assert "'bloom'" in result.stderr


def test_help_has_examples():
    for command in ("train", "inspect", "plan", "search-thresholds"):
        result = CliRunner().invoke(app, [command, "--help"])
        assert result.exit_code == 0
        assert f"lemo {command} " in result.output


def test_plan_compares_four_ways_of_a_step(tmp_path):
    save_model_and_text(tmp_path)
    options = ["--mode", "detach", "--seq-len", "32", "--block-size", "4", "--fit-memory", "1 GiB"]
    result = CliRunner().invoke(app, ["plan", str(tmp_path / "model"), *options])
    assert result.exit_code == 0, result.output
    for fact in ("keep_ratio: 1.0", "without LeMo + checkpointing", "LeMo + checkpointing", "peak"):
        assert fact in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seq-len", "0"], "`seq_len` must be at least 2, got 0"),
        (["--batch-size", "0"], "`batch_size` must be at least 1, got 0"),
        (["--dtype", "int8"], "`dtype` must be float32, bfloat16 or float16, got 'int8'"),
        (["--fit-memory", "lots"], "`fit_memory` must be like"),
        (["--thresholds", "1:0.8"], "got thresholds '1:0.8'"),
        (["--fit-memory", "1GiB", "--fit-flops", "0.5"], "not both"),
    ],
)
def test_plan_names_what_is_wrong(options, message):
    result = CliRunner().invoke(app, ["plan", str(MODEL), *options])
    assert result.exit_code == 2
    assert message in result.stderr.splitlines()[-1]


def search(folder, *options):
    arguments = ["search-thresholds", str(folder / "model"), "--data", str(folder / "text.txt")]
    arguments += ["--output", str(folder / "found.yaml"), "--seq-len", "32", "--block-size", "4"]
    return CliRunner().invoke(app, [*arguments, "--rounds", "0", *options])


def test_search_thresholds_writes_a_config(tmp_path):
    from lemo_trainer import LemoConfig

    save_model_and_text(tmp_path)
    result = search(tmp_path, "--max-increase", "100")
    assert result.exit_code == 0, result.output
    assert LemoConfig.from_yaml(tmp_path / "found.yaml").layer_thresholds == {1: 1.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples", "0"], "`samples` must be at least 1, got 0"),
        (["--seq-len", "1"], "`seq_len` must be at least 2, got 1"),
        (["--rounds", "-1"], "`rounds` must be at least 0, got -1"),
        (["--output", "no/such/folder/found.yaml"], "must lie in a folder that exists"),
        (["--mode", "detach"], 'mode="eliminate"'),
        (["--selector", "recency"], "got 'recency'"),
        (["--max-increase", "nan"], "`max_increase` must be a number of nats, got nan"),
        (["--samples", "100000"], "must hold 100000 samples"),
        (["--max-increase", "-100"], "No layer can leave tokens out within -100.0 nats"),
        (["--fit-share", "0.5", "--fit-flops", "0.5"], "Give one of `fit_share`, `fit_flops`, `fit_memory`"),
        (["--fit-share", "0"], "`fit_share` must be above 0 and at most 1, got 0.0"),
        (["--fit-share", "0.1"], "the cheapest takes a mean kept share of"),
        (["--fit-share", "0.9", "--kept-shares", "half"], "`kept_shares` must be numbers like"),
        (["--fit-share", "0.9", "--kept-shares", "0.5,1"], "must lie between 0 and 1, got [0.5, 1.0]"),
        (["--fit-share", "0.9", "--max-increase", "-100"], "`max_increase` must be at least"),
        (["--plot", "no/such/folder/kept.png"], "`plot` must lie in a folder that exists"),
    ],
)
def test_search_thresholds_names_what_is_wrong_and_writes_nothing(tmp_path, options, message):
    save_model_and_text(tmp_path)
    result = search(tmp_path, *options)
    assert result.exit_code == 2
    assert message in result.stderr.splitlines()[-1]
    assert not (tmp_path / "found.yaml").exists()


PREDICT = ["--block-size", "8", "--seq-len", "64", "--ranks", "4,4,4", "--steps", "2", "--held-out", "2"]


def test_predict_train_makes_predictors_that_a_run_uses(recipe, tmp_path):
    folder = tmp_path / "predictors"
    arguments = [
        str(tmp_path / "model"),
        "--data",
        str(tmp_path / "text.txt"),
        "--output",
        str(folder),
        *PREDICT,
    ]
    result = CliRunner().invoke(app, ["predict-train", *arguments])
    assert result.exit_code == 0, result.output
    assert "of the model's parameters; recall of 2 held-out samples" in " ".join(result.output.split())
    lemo = {"block_size": 8, "selector": "predictor", "predictors": str(folder), "predictor_refresh": 1}
    result = invoke({**recipe, "lemo": lemo}, tmp_path)
    assert result.exit_code == 0, result.output
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"lemo_predictors.safetensors", "lemo_predictors.json", "lemo_config.json"}


@pytest.mark.slow
def test_predict_train_runs_in_two_processes(recipe, tmp_path):
    folder = tmp_path / "predictors"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = str(Path(sys.executable).with_name("lemo"))
    arguments = [
        str(tmp_path / "model"),
        "--data",
        str(tmp_path / "text.txt"),
        "--output",
        str(folder),
        *PREDICT,
    ]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(
        [*launch, script, "predict-train", *arguments], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("wrote ") == 1
    assert load_predictors(folder).layers == (1,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ranks", "4,4"], "must be three whole numbers like \"32,32,32\", got '4,4'"),
        (["--design", "best"], "`design` must be paper or max, got 'best'"),
        (["--steps", "0"], "`steps` must be at least 1, got 0"),
        (["--seq-len", "15"], "`seq_len` must be at least 16, got 15"),
        (["--held-out", "100000"], "must hold more than the 100000 held-out samples"),
        (["--data", "absent.txt"], "No such text file: absent.txt"),
    ],
)
def test_predict_train_names_what_is_wrong_and_writes_nothing(recipe, tmp_path, options, message):
    folder = tmp_path / "predictors"
    arguments = [
        str(tmp_path / "model"),
        "--data",
        str(tmp_path / "text.txt"),
        "--output",
        str(folder),
        *PREDICT,
    ]
    result = CliRunner().invoke(app, ["predict-train", *arguments, *options])
    assert result.exit_code == 2
    assert message in result.stderr
    assert not folder.exists()


def test_search_thresholds_fits_a_budget_and_draws_what_it_kept(monkeypatch, tmp_path):
    from lemo_trainer import LemoConfig
    from lemo_trainer.offline.step_cost import StepCost

    def predict(setup, lemo, **options):
        assert setup.seq_len == 32
        return StepCost(0, 0, 1.0 if lemo is None else lemo.keep_ratio, 0)

    monkeypatch.setattr("lemo_trainer.offline.budget.predict", predict)
    save_model_and_text(tmp_path)
    result = search(tmp_path, "--layers", "all", "--fit-flops", "0.9", "--plot", str(tmp_path / "kept.png"))
    assert result.exit_code == 0, result.output
    assert "of the dense operations" in result.output
    assert LemoConfig.from_yaml(tmp_path / "found.yaml").layer_thresholds
    assert "# layer  threshold  kept share" in (tmp_path / "found.yaml").read_text()
    assert (tmp_path / "kept.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_without_matplotlib_says_what_to_install(monkeypatch, tmp_path):
    save_model_and_text(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = search(tmp_path, "--plot", str(tmp_path / "kept.png"))
    assert result.exit_code == 2
    assert "needs matplotlib; install it with" in result.stderr


@pytest.mark.parametrize("command", ["train", "inspect"])
def test_every_field_of_the_config_is_an_option(command):
    from typer.main import get_command

    from lemo_trainer import LemoConfig

    parameters = {each.name: each for each in get_command(app).commands[command].params}
    for field in dataclasses.fields(LemoConfig):
        assert parameters[field.name].help
        assert parameters[field.name].default is None


def test_the_published_recipe_is_valid(monkeypatch):
    from lemo_trainer.commands.recipe import Recipe

    monkeypatch.chdir(ROOT)
    recipe = Recipe.from_yaml("configs/lemo/smollm2_lora.yaml")
    assert Path(recipe.model).is_dir()
    assert Path(recipe.train_file).is_file()


def test_importing_the_package_leaves_heavy_modules_alone():
    code = (
        "import sys, torch; from transformers import AttentionInterface, TrainerCallback;"
        "before = set(sys.modules); import lemo_trainer;"
        "print(sorted({name.partition('.')[0] for name in set(sys.modules) - before} - {'lemo_trainer'}))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout == "[]\n"
