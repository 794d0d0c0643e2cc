from __future__ import annotations

import json
import logging

import pytest
import torch
from safetensors.torch import load_file

from lemo_trainer import LemoConfig, apply_lemo, remove_lemo
from lemo_trainer.informativeness.predictor_files import (
    JSON_NAME,
    TENSORS_NAME,
    base_fingerprint,
    load_predictors,
    save_predictors,
)
from lemo_trainer.informativeness.predictors import PatternPredictor, PatternPredictors, recall_at_kept
from lemo_trainer.informativeness.scores import map_scores
from lemo_trainer.informativeness.selection import select_tokens
from lemo_trainer.model.masks import allowed_blocks, valid_tokens
from lemo_trainer.offline.observation import Observer
from lemo_trainer.session import session_of

from .tiny import batch, leaving_out, lora, loss_and_gradients, tiny_model

WIDTH, BLOCK = 32, 4


def predictors_for(model, *, layers=(0, 1, 2), design="paper", folder=None):
    torch.manual_seed(3)
    made = PatternPredictors(layers, design=design, block_size=BLOCK, width=WIDTH, ranks=(5, 6, 7))
    if folder is not None:
        save_predictors(made, folder, base_fingerprint(model))
    return made


@pytest.mark.parametrize("design", ["paper", "max"])
def test_the_map_is_that_of_the_docstring(design):
    torch.manual_seed(0)
    net = PatternPredictor(design, BLOCK, WIDTH, (5, 6, 7))
    x = 3 * torch.randn(2, 14, WIDTH)
    got = net(x)
    sides = []
    for side in (net.query, net.key):
        normed = x[:, :12] / x[:, :12].square().mean(-1, keepdim=True).sqrt()
        h = (normed @ side.first).relu().view(2, 3, 4, 5)
        if design == "paper":
            g = (h.reshape(2, 3, 20) @ side.second).relu()
        else:
            g = torch.stack([h[:, :, t] @ side.second for t in range(4)]).amax(0).relu()
        sides.append(g @ side.third)
    wanted = torch.nn.functional.softplus(sides[0] @ sides[1].transpose(1, 2) / 7)
    torch.testing.assert_close(got, wanted * torch.ones(3, 3).tril())


def test_the_map_follows_the_mask():
    net = PatternPredictor("paper", BLOCK, WIDTH, (5, 6, 7))
    allowed = torch.ones(16, 16).tril().bool().repeat(1, 1, 1, 1)
    allowed[..., 9:, :9] = False  # a second document begins inside the third block
    blocks = allowed_blocks(allowed, BLOCK)[0]
    assert blocks.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 1, 1]]
    map_BNN = net(torch.randn(1, 16, WIDTH), allowed)
    assert torch.equal(map_BNN[0] > 0, blocks)


@pytest.mark.parametrize("design", ["paper", "max"])
def test_pruning_dead_units_changes_nothing(design):
    torch.manual_seed(0)
    net = PatternPredictor(design, BLOCK, WIDTH, (5, 6, 7)).train()
    with torch.no_grad():
        for side in (net.query, net.key):
            side.first[:, 1] = 0
            side.second[:, 2] = 0
    x = torch.randn(2, 16, WIDTH)
    wanted = net(x)
    before = sum(p.numel() for p in net.parameters())
    assert net.query.prune(net.query.seen) >= 2
    assert net.key.prune(net.key.seen) >= 2
    assert sum(p.numel() for p in net.parameters()) < before
    torch.testing.assert_close(net(x), wanted)


def test_a_net_keeps_a_unit_even_if_all_are_dead():
    net = PatternPredictor("paper", BLOCK, WIDTH, (5, 6, 7)).train()
    with torch.no_grad():
        net.query.first.zero_()
    wanted = net(torch.randn(1, 8, WIDTH))
    net.query.prune(net.query.seen)
    assert net.query.first.shape == (WIDTH, 1)
    torch.testing.assert_close(net(torch.randn(1, 8, WIDTH)), wanted)


def test_recall_counts_the_exact_choice_that_was_found():
    exact, predicted = torch.tensor([[4.0, 3, 2, 1]]), torch.tensor([[9.0, 0, 8, 1]])
    assert recall_at_kept(predicted, exact, 1) == 1
    assert recall_at_kept(predicted, exact, 2) == 0.5
    assert recall_at_kept(predicted, exact, 4) == 1


@pytest.mark.parametrize("mode", ["detach", "eliminate"])
@pytest.mark.parametrize("kind", ["plain", "left", "packed"])
def test_layers_choose_by_the_predicted_scores(tmp_path, mode, kind):
    model, inputs = tiny_model(), batch(kind)
    predictors = predictors_for(model, folder=tmp_path)
    seen = Observer(model, leaving_out(layers="all"))(inputs)[0]
    report = apply_lemo(model, leaving_out(mode, selector="predictor", predictors=str(tmp_path)))
    chosen = []
    session = session_of(model)
    plan = session.plan

    def spy(layer, seq_len, *samples):
        made = plan(layer, seq_len, *samples)
        object.__setattr__(made, "on_chosen", lambda index: chosen.append(index))
        return made

    session.plan = spy
    loss_and_gradients(model, inputs)
    scores = map_scores(predictors.pooled_map(0, seen.hidden, seen.mask))
    wanted = select_tokens(scores, valid_tokens(seen.mask), plan(0, seen.hidden.shape[1]), report.config)
    assert torch.equal(chosen[0], wanted)


def test_gradients_under_lora_and_checkpointing_are_the_same_with_one_choice(tmp_path):
    model = lora(tiny_model())
    predictors_for(model, folder=tmp_path)
    inputs = batch("left")
    config = leaving_out("detach", selector="predictor", predictors=str(tmp_path))
    apply_lemo(model, config)
    first = loss_and_gradients(model, inputs)
    again = loss_and_gradients(model, inputs)
    torch.testing.assert_close(first, again)
    remove_lemo(model)


def test_a_saved_predictor_comes_back(tmp_path):
    model = tiny_model()
    made = predictors_for(model, design="max", folder=tmp_path)
    made.recall = {0: 0.5, 1: 0.75, 2: 1.0}
    save_predictors(made, tmp_path, base_fingerprint(model))
    got = load_predictors(tmp_path, model)
    assert (got.design, got.block_size, got.width, got.recall) == ("max", BLOCK, WIDTH, made.recall)
    x = torch.randn(1, 12, WIDTH)
    for layer in got.layers:
        assert torch.equal(got.pooled_map(layer, x, None), made.pooled_map(layer, x, None))
    assert sorted(p.name for p in tmp_path.iterdir()) == [JSON_NAME, TENSORS_NAME]


def test_the_fingerprint_is_that_of_the_base_model():
    model = tiny_model()
    base = base_fingerprint(model)
    assert base_fingerprint(tiny_model().to(torch.bfloat16)) == base
    assert base_fingerprint(lora(tiny_model())) == base
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight += 0.5
    assert base_fingerprint(model) != base


def corrupt_tensors(folder):
    data = bytearray((folder / TENSORS_NAME).read_bytes())
    data[-1] ^= 1
    (folder / TENSORS_NAME).write_bytes(data)


def corrupt_json(folder):
    (folder / JSON_NAME).write_text("{")


def other_format(folder):
    described = json.loads((folder / JSON_NAME).read_text())
    (folder / JSON_NAME).write_text(json.dumps({**described, "format": 9}))


def without_a_field(folder):
    described = json.loads((folder / JSON_NAME).read_text())
    del described["design"]
    (folder / JSON_NAME).write_text(json.dumps(described))


def truncated(folder):
    data = (folder / TENSORS_NAME).read_bytes()
    (folder / TENSORS_NAME).write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (corrupt_tensors, "checksum"),
        (truncated, "checksum"),
        (corrupt_json, "is not valid JSON"),
        (other_format, "format 1, got 9"),
        (without_a_field, "KeyError: 'design'"),
    ],
)
def test_damaged_files_are_refused(tmp_path, damage, message):
    model = tiny_model()
    predictors_for(model, folder=tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        apply_lemo(model, leaving_out(selector="predictor", predictors=str(tmp_path)))
    assert not hasattr(model, "_lemo")


def test_predictors_of_another_base_model_are_refused(tmp_path):
    model = tiny_model()
    predictors_for(model, folder=tmp_path)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight *= 2
    with pytest.raises(ValueError, match=r"another base model: its model\.layers\.2\.mlp\.up_proj\.weight"):
        apply_lemo(model, leaving_out(selector="predictor", predictors=str(tmp_path)))
    with pytest.raises(ValueError, match="no parameter in common"):
        apply_lemo(tiny_model("gpt2"), leaving_out(selector="predictor", predictors=str(tmp_path)))


def test_missing_predictors_layers_and_blocks_are_refused(tmp_path):
    model = tiny_model()
    with pytest.raises(FileNotFoundError, match="lemo predict-train"):
        apply_lemo(model, leaving_out(selector="predictor", predictors=str(tmp_path)))
    predictors_for(model, layers=(1,), folder=tmp_path)
    options = {"selector": "predictor", "predictors": str(tmp_path)}
    with pytest.raises(ValueError, match=r"layers \[0\], got blocks of 4 and layers \[1\]"):
        apply_lemo(model, leaving_out(**options))
    with pytest.raises(ValueError, match="blocks of 8 tokens and layers"):
        apply_lemo(model, leaving_out(**options, layers="1", block_size=8))
    apply_lemo(model, leaving_out(**options, layers="1-2"))  # the first patched layer chooses for all


def test_nan_hidden_states_are_refused(tmp_path):
    model = tiny_model()
    predictors_for(model, folder=tmp_path)
    apply_lemo(model, leaving_out(selector="predictor", predictors=str(tmp_path)))
    model.model.embed_tokens.weight.data[5] = float("nan")
    inputs = batch("plain")
    inputs["input_ids"][0, 7] = 5
    with pytest.raises(ValueError, match="hidden states of this batch hold NaN"):
        model(**inputs)


def test_a_refresh_scores_exactly_and_learns(tmp_path):
    model, inputs = tiny_model(), batch("plain")
    before = predictors_for(model, folder=tmp_path)
    options = {"selector": "predictor", "predictors": str(tmp_path), "predictor_refresh": 3}
    exact = apply_lemo(model, leaving_out("eliminate", attention_score_tokens=4))
    wanted = loss_and_gradients(model, inputs)[0]
    remove_lemo(model)
    report = apply_lemo(model, leaving_out("eliminate", attention_score_tokens=4, **options))
    assert exact is not report
    for step in range(4):
        report.at_step(step)
        loss = loss_and_gradients(model, inputs)[0]
        assert report.predictors.refreshing == (step in (0, 3))
        if report.predictors.refreshing:
            torch.testing.assert_close(loss, wanted)
    assert report.predictors.recall.keys() == {0, 1, 2}
    moved = report.predictors.of(1).query.first.detach()
    assert not torch.equal(moved, before.of(1).query.first)
    names = {name for name, _ in model.named_parameters()}
    assert not any("predict" in name for name in names)
    assert all(p.grad is None for p in report.predictors.parameters())


def test_a_layer_with_a_low_recall_goes_back_to_exact_scores(tmp_path, caplog):
    model, inputs = tiny_model(), batch("plain")
    predictors_for(model, folder=tmp_path)
    config = leaving_out(
        "eliminate",
        selector="predictor",
        predictors=str(tmp_path),
        predictor_refresh=100,
        predictor_recall=1.0,
        attention_score_tokens=4,
    )
    report = apply_lemo(model, config)
    report.at_step(0)
    with caplog.at_level(logging.WARNING, "lemo_trainer"):
        loss_and_gradients(model, inputs)
    assert report.predictors.distrusted
    for layer in report.predictors.distrusted:
        assert f"Layer {layer} goes back to exact scores" in caplog.text
    report.at_step(1)
    assert all(report.predictors.needs_exact(layer) for layer in report.predictors.distrusted)
    loss_and_gradients(model, inputs)


def test_predictors_measured_too_weak_are_distrusted_from_the_start(tmp_path, caplog):
    model = tiny_model()
    made = predictors_for(model)
    made.recall = {0: 0.95, 1: 0.4, 2: 0.9}
    save_predictors(made, tmp_path, base_fingerprint(model))
    options = {"selector": "predictor", "predictors": str(tmp_path), "predictor_recall": 0.8}
    with caplog.at_level(logging.WARNING, "lemo_trainer"):
        report = apply_lemo(model, leaving_out("eliminate", **options))
    assert report.predictors.distrusted == {1}
    assert "Layers [1] use exact scores" in caplog.text


def test_a_sequence_shorter_than_a_block_runs_dense(tmp_path):
    model, inputs = tiny_model(), batch("plain", seq_len=3)
    inputs["labels"] = inputs["input_ids"].clone()
    wanted = loss_and_gradients(model, inputs)
    predictors_for(model, folder=tmp_path)
    report = apply_lemo(model, leaving_out(selector="predictor", predictors=str(tmp_path)))
    torch.testing.assert_close(loss_and_gradients(model, inputs), wanted)
    assert report.kept_share == 1.0


def test_the_tensors_are_those_of_the_nets(tmp_path):
    made = predictors_for(tiny_model(), folder=tmp_path, layers=(2,))
    tensors = load_file(tmp_path / TENSORS_NAME)
    assert tensors.keys() == made.nets.state_dict().keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"predictors": "x"}, 'unless `selector` is "predictor"'),
        ({"predictor_refresh": 5}, 'unless `selector` is "predictor"'),
        ({"selector": "predictor", "predictor_recall": 1.5}, "from 0 to 1"),
        ({"selector": "predictor", "predictor_refresh": -1}, "at least 0"),
        ({"attention_score_tokens": 0}, "at least 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LemoConfig(**options)
