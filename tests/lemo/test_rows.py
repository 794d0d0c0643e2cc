from __future__ import annotations

import torch

from lemo_trainer.model.rows import other_positions, take_arguments, take_heads, take_mask, take_queries


def test_masks_keep_the_chosen_rows_and_columns():
    mask = torch.rand(2, 1, 7, 7)
    index = torch.tensor([[0, 2, 3], [1, 4, 6]])
    got = take_mask(mask, index)
    for b in range(2):
        torch.testing.assert_close(got[b, 0], mask[b, 0][index[b]][:, index[b]])
    assert take_mask(None, index) is None
    causal = torch.ones(7, 7, dtype=torch.bool).tril()
    torch.testing.assert_close(take_queries(None, index, 7)[1, 0], causal[index[1]])


def test_heads_and_the_other_positions():
    index = torch.tensor([[0, 2, 3], [1, 4, 6]])
    assert other_positions(index, 7).tolist() == [[1, 4, 5, 6], [0, 2, 3, 5]]
    values = torch.randn(2, 3, 7, 2)
    torch.testing.assert_close(take_heads(values, index)[1], values[1][:, index[1]])


def test_arguments_per_token_are_taken_wherever_they_stand():
    index = torch.tensor([[0, 2], [1, 4]])
    shared, own = torch.rand(1, 5, 3), torch.rand(2, 5)
    got = take_arguments({"position_ids": own, "position_embeddings": (shared, None)}, index)
    torch.testing.assert_close(got["position_ids"], own.gather(1, index))
    torch.testing.assert_close(got["position_embeddings"][0], shared[0][index])
    assert got["position_embeddings"][1] is None
