from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lemo_trainer.informativeness import scores
from lemo_trainer.informativeness.scores import (
    attention_map,
    map_scores,
    mlp_scores,
    query_positions,
    score_positions,
)
from lemo_trainer.model.architectures import ARCHITECTURES
from lemo_trainer.model.capture import AttentionInputs, attention_inputs, mlp_intermediate

from .tiny import tiny_model

B, H, G, D = 2, 4, 2, 8


def naive_scores(q, k, scaling, allowed, block):
    """The equation of the docstring, with the whole map and one loop per block pair."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    pair_map = (q @ k.transpose(2, 3) * scaling).clamp(min=0).mean(1)
    pair_map = torch.where(allowed, pair_map, 0.0)
    blocks = q.shape[2] // block
    scores = torch.zeros(len(q), blocks)
    for n in range(blocks):
        columns = pair_map[:, :, n * block : (n + 1) * block]
        for m in range(0, q.shape[2], block):
            scores[:, n] += columns[:, m : m + block].amax((1, 2))
    return scores


def inputs(q, k):
    return AttentionInputs(query=q, key=k, value=k, scaling=0.3, options={})


@pytest.mark.parametrize("seq_len", [8, 40, 45, 61])
@pytest.mark.parametrize("mask_kind", ["causal", "bool", "additive"])
@pytest.mark.parametrize("causal_scores", [False, True])
@pytest.mark.parametrize("rows", [1, 16, 256])
def test_attention_scores_equal_the_full_map(monkeypatch, seq_len, mask_kind, rows, causal_scores):
    monkeypatch.setattr(scores, "QUERY_ROWS", rows)
    torch.manual_seed(0)
    q, k = torch.randn(B, H, seq_len, D), torch.randn(B, G, seq_len, D)
    allowed = torch.ones(seq_len, seq_len).tril().bool().repeat(B, 1, 1)
    mask = None
    if mask_kind != "causal":
        allowed[0, :, :3] = False
        allowed[1, seq_len // 2 :, : seq_len // 2] = False  # two documents
        mask = allowed[:, None]
        if mask_kind == "additive":
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    got = map_scores(attention_map(inputs(q, k), mask, 8, 8), causal_scores=causal_scores)
    if causal_scores:
        block = torch.arange(seq_len) // 8
        allowed = allowed & (block[:, None] == block)
    torch.testing.assert_close(got, naive_scores(q, k, 0.3, allowed, 8))


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("seq_len", [32, 45])
def test_some_queries_of_a_block_estimate_the_map_from_below(count, seq_len):
    torch.manual_seed(0)
    q, k = torch.randn(B, H, seq_len, D), torch.randn(B, G, seq_len, D)
    positions = query_positions(seq_len, 8, count, q.device)
    allowed = torch.ones(seq_len, seq_len).tril().bool().repeat(B, 1, 1)
    chosen = torch.zeros(seq_len, 1, dtype=torch.bool)
    chosen[positions] = True
    got = map_scores(attention_map(inputs(q, k), None, 8, count))
    torch.testing.assert_close(got, naive_scores(q, k, 0.3, allowed & chosen, 8))


def test_query_positions_are_the_last_of_each_stretch():
    assert query_positions(16, 8, 2, torch.device("cpu")).tolist() == [3, 7, 11, 15]
    assert query_positions(11, 4, 2, torch.device("cpu")).tolist() == [1, 3, 5, 7, 9, 10]
    assert query_positions(6, 4, 9, torch.device("cpu")).tolist() == [0, 1, 2, 3, 4, 5, 5, 5]


def test_queries_and_keys_are_rotated_and_grouped():
    model = tiny_model("llama")
    attention = model.model.layers[0].self_attn
    x = torch.randn(B, 20, 32)
    cos, sin = model.model.rotary_emb(x, position_ids=torch.arange(20)[None])
    config = attention.config
    inputs = attention_inputs(attention, x, position_embeddings=(cos, sin), attention_mask=None)
    wanted_q = attention.q_proj(x).view(B, 20, H, D).transpose(1, 2)
    wanted_k = attention.k_proj(x).view(B, 20, G, D).transpose(1, 2)
    wanted_q, wanted_k = apply_rotary_pos_emb(wanted_q, wanted_k, cos, sin)
    torch.testing.assert_close((inputs.query, inputs.key), (wanted_q.detach(), wanted_k.detach()))
    wanted_v = attention.v_proj(x).view(B, 20, G, D).transpose(1, 2).detach()
    torch.testing.assert_close(inputs.value, wanted_v)
    assert inputs.scaling == D**-0.5
    assert not inputs.query.requires_grad
    assert attention.config is config
    assert config._attn_implementation == "sdpa"


def test_dropout_does_not_reach_the_scores_and_comes_back():
    model = tiny_model("llama")
    layer = model.model.layers[0]
    layer.mlp.gate_proj = nn.Sequential(nn.Dropout(0.5), layer.mlp.gate_proj)
    llama = ARCHITECTURES["llama"]
    frozen = layer.mlp.up_proj.eval()
    x = torch.randn(B, 20, 32)
    torch.testing.assert_close(mlp_intermediate(llama, layer, x), mlp_intermediate(llama, layer, x))
    assert layer.mlp.gate_proj[0].training
    assert not frozen.training
    assert not layer.mlp.down_proj._forward_pre_hooks


def test_mlp_intermediate_is_the_input_of_the_last_projection():
    layer = tiny_model("llama").model.layers[0]
    x = torch.randn(B, 20, 32)
    normed = layer.post_attention_layernorm(x)
    wanted = layer.mlp.act_fn(layer.mlp.gate_proj(normed)) * layer.mlp.up_proj(normed)
    torch.testing.assert_close(mlp_intermediate(ARCHITECTURES["llama"], layer, x), wanted.detach())


def test_mlp_scores_are_block_means_without_padding():
    torch.manual_seed(0)
    intermediate = torch.randn(B, 24, 5)
    valid = torch.ones(B, 24, dtype=torch.bool)
    valid[0, :11] = False
    got = mlp_scores(intermediate, valid, 3)
    for b in range(B):
        for n in range(3):
            rows = [i for i in range(8 * n, 8 * n + 8) if valid[b, i]]
            wanted = intermediate[b, rows].abs().mean() if rows else torch.tensor(0.0)
            torch.testing.assert_close(got[b, n], wanted)
    torch.testing.assert_close(mlp_scores(intermediate, None, 3)[1], got[1])


@pytest.mark.parametrize(
    ("count", "wanted"), [(1, [0, 6, 12]), (2, [0, 3, 6, 9, 12, 15]), (9, list(range(18)))]
)
def test_score_positions_spread_over_each_block(count, wanted):
    assert score_positions(3, 6, count, torch.device("cpu")).tolist() == wanted
