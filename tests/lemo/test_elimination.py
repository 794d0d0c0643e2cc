from __future__ import annotations

import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lemo_trainer import LemoConfig, apply_lemo, elimination, remove_lemo
from lemo_trainer.architectures import ARCHITECTURES
from lemo_trainer.elimination import BlockPlan, add_rows, flat_rows, select_tokens, take_mask, take_rows

from .tiny import assert_same_step, batch, checkpointing, loss_and_gradients, tiny_model

CONFIG = LemoConfig(keep_ratio=0.4, block_size=4, layers="all", loss_segment=16, mlp_score_tokens=2)


@given(
    seq_len=st.integers(1, 300),
    block=st.integers(1, 70),
    keep=st.floats(0.01, 1),
    sink=st.integers(0, 3),
    recent=st.integers(0, 3),
)
def test_a_plan_is_the_nearest_count_that_keeps_the_protected_blocks(seq_len, block, keep, sink, recent):
    plan = BlockPlan.of(
        seq_len, LemoConfig(keep_ratio=keep, block_size=block, sink_blocks=sink, recent_blocks=recent)
    )
    assert plan.blocks * block + plan.tail == seq_len
    assert 1 <= plan.kept_tokens <= seq_len
    assert plan.keeps_all == (plan.kept_tokens == seq_len)
    assert plan.kept_blocks >= min(sink + recent, plan.blocks)
    if not plan.keeps_all and plan.kept_blocks > max(sink + recent, 1):
        assert abs(plan.kept_tokens - keep * seq_len) <= block / 2 + 1e-6
    if keep == 1:
        assert plan.keeps_all


@given(data=st.data(), batch_size=st.integers(1, 3), blocks=st.integers(1, 8), tail=st.integers(0, 3))
def test_selection_is_sorted_whole_and_by_score(data, batch_size, blocks, tail):
    block = 4
    kept = data.draw(st.integers(0 if tail else 1, blocks))
    plan = BlockPlan(blocks, kept, tail, block)
    flat = data.draw(st.lists(st.integers(0, 5), min_size=batch_size * blocks, max_size=batch_size * blocks))
    scores = torch.tensor(flat, dtype=torch.float32).view(batch_size, blocks)
    index = select_tokens(scores, None, plan, sink_blocks=0, recent_blocks=0)
    assert index.shape == (batch_size, plan.kept_tokens)
    for row, score in zip(index.tolist(), scores, strict=True):
        assert row == sorted(set(row))
        assert row[len(row) - tail :] == list(range(blocks * block, blocks * block + tail))
        chosen = {position // block for position in row[: len(row) - tail]}
        assert len(chosen) == kept
        others = set(range(blocks)) - chosen
        assert not chosen or not others or score[list(chosen)].min() >= score[list(others)].max()


def test_sink_and_recent_blocks_are_those_of_the_sample_and_padding_goes_first():
    plan = BlockPlan(6, 3, 0, 2)
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[0, :5] = False  # left: the sample's first block is 2
    valid[1, 8:] = False  # right: its last block is 3
    scores = torch.tensor([[9.0, 9, 0, 5, 7, 0], [0, 5, 7, 0, 9, 9]])
    index = select_tokens(scores, valid, plan, sink_blocks=1, recent_blocks=1)
    assert (index[:, ::2] // 2).tolist() == [[2, 4, 5], [0, 2, 3]]


def test_nan_scores_are_an_error():
    with pytest.raises(ValueError, match="NaN"):
        select_tokens(
            torch.tensor([[0.0, torch.nan]]), None, BlockPlan(2, 1, 0, 4), sink_blocks=0, recent_blocks=0
        )


def test_rows_are_taken_and_added_with_the_gradients_of_indexing():
    torch.manual_seed(0)
    index = torch.tensor([[0, 2, 3], [1, 4, 6]])
    rows = flat_rows(index, 7)
    x = torch.randn(2, 7, 5, dtype=torch.float64, requires_grad=True)
    picked = torch.stack([x[b, index[b]] for b in range(2)])
    torch.testing.assert_close(take_rows(x, rows), picked)
    update = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, u: add_rows(x, u * take_rows(x, rows), rows), (x, update))
    wanted = x.detach().clone()
    for b in range(2):
        wanted[b, index[b]] += update[b]
    torch.testing.assert_close(add_rows(x, update, rows), wanted)


def test_masks_keep_the_chosen_rows_and_columns():
    mask = torch.rand(2, 1, 7, 7)
    index = torch.tensor([[0, 2, 3], [1, 4, 6]])
    got = take_mask(mask, index)
    for b in range(2):
        torch.testing.assert_close(got[b, 0], mask[b, 0][index[b]][:, index[b]])
    assert take_mask(None, index) is None


def reference_forward(architecture, chosen):
    """A layer that computes every token and masks what was not chosen; slow, and plain to see."""

    def forward(
        self, hidden_states, attention_mask=None, position_ids=None, position_embeddings=None, **kwargs
    ):
        x = hidden_states
        keep = chosen.pop(0)  # bool [B, S]
        batch_size, seq_len = keep.shape
        allowed = torch.ones(seq_len, seq_len, dtype=torch.bool).tril()[None, None]
        if attention_mask is not None:
            allowed = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
        allowed = allowed & keep[:, None, None, :]
        mask = torch.zeros(batch_size, 1, seq_len, seq_len).masked_fill(
            ~allowed, torch.finfo(torch.float32).min
        )
        update = architecture.attention_branch(
            self, x, attention_mask=mask, position_ids=position_ids, position_embeddings=position_embeddings
        )
        x = x + update * keep[..., None]
        keep = chosen.pop(0)
        return x + architecture.mlp_branch(self, x) * keep[..., None]

    return forward


@pytest.mark.parametrize("kind", ["plain", "left", "right", "packed"])
@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_gradients_equal_those_of_a_mask_based_reference(monkeypatch, model_type, kind):
    model = tiny_model(model_type)
    inputs = batch(kind)
    chosen: list[torch.Tensor] = []

    def spy(*args, **kwargs):
        index = select_tokens(*args, **kwargs)
        keep = torch.zeros(2, 45, dtype=torch.bool)
        chosen.append(keep.scatter_(1, index, True))
        return index

    monkeypatch.setattr(elimination, "select_tokens", spy)
    report = apply_lemo(model, CONFIG)
    got = loss_and_gradients(model, inputs)
    remove_lemo(model)
    assert len(chosen) == 6
    assert all(keep.sum(1).tolist() == [report.kept_tokens] * 2 for keep in chosen)

    for layer in model.model.layers:
        layer.forward = types.MethodType(reference_forward(ARCHITECTURES[model_type], chosen), layer)
    assert_same_step(got, loss_and_gradients(model, inputs), rtol=1e-4, atol=1e-5)
    assert not chosen


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_samples_of_a_batch_choose_for_themselves(implementation):
    model = tiny_model(implementation=implementation)
    apply_lemo(model, CONFIG)
    inputs = batch("plain", size=3)
    together = model(**inputs, num_items_in_batch=1).loss
    alone = sum(
        model(**{k: v[b : b + 1] for k, v in inputs.items()}, num_items_in_batch=1).loss for b in range(3)
    )
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["plain", "left"])
def test_checkpointing_recomputes_the_same_choice(monkeypatch, reentrant, kind):
    model = tiny_model()
    inputs = batch(kind)
    apply_lemo(model, CONFIG)
    wanted = loss_and_gradients(model, inputs)
    chosen: list[torch.Tensor] = []

    def spy(*args, **kwargs):
        chosen.append(select_tokens(*args, **kwargs))
        return chosen[-1]

    monkeypatch.setattr(elimination, "select_tokens", spy)
    checkpointing(model, reentrant=reentrant)
    assert_same_step(loss_and_gradients(model, inputs), wanted)
    first, again = chosen[:6], chosen[6:]
    recomputed = [again[i] for i in (4, 5, 2, 3, 0, 1)]  # the backward pass starts at the last layer
    assert [a.tolist() for a in first] == [a.tolist() for a in recomputed]
