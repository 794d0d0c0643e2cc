from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lemo_trainer import LemoConfig
from lemo_trainer.informativeness.selection import BlockPlan, select_tokens

UNPROTECTED = LemoConfig(mode="detach", sink_blocks=0, recent_blocks=0)


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
    index = select_tokens(scores, None, plan, UNPROTECTED)
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
    index = select_tokens(scores, valid, plan, LemoConfig())
    assert (index[:, ::2] // 2).tolist() == [[2, 4, 5], [0, 2, 3]]


def test_blocks_with_labels_go_before_those_without():
    labelled = torch.zeros(2, 9, dtype=torch.bool)
    labelled[0, 3] = labelled[0, 6] = labelled[1, 0] = True
    plan = BlockPlan(4, 2, 1, 2, labelled=labelled)
    index = select_tokens(torch.tensor([[9.0, 1, 8, 2], [0, 5, 7, 9]]), None, plan, UNPROTECTED)
    assert (index[:, :4:2] // 2).tolist() == [[1, 3], [0, 3]]


def test_a_threshold_keeps_what_the_sample_with_the_most_needs():
    scores = torch.tensor([[4.0, 4, 0, 0], [1, 2, 9, 0]])
    seen = []
    plan = BlockPlan(4, 0, 0, 2, threshold=1.0, on_chosen=seen.append)
    index = select_tokens(scores, None, plan, UNPROTECTED)
    assert (index[:, ::2] // 2).tolist() == [[0, 1], [1, 2]]
    assert torch.equal(seen[0], index)
    everything = select_tokens(scores, None, BlockPlan(4, 0, 0, 2, threshold=0.0), UNPROTECTED)
    assert everything.shape == (2, 8)


def test_nan_scores_are_an_error():
    with pytest.raises(ValueError, match="NaN"):
        select_tokens(torch.tensor([[0.0, torch.nan]]), None, BlockPlan(2, 1, 0, 4), UNPROTECTED)
