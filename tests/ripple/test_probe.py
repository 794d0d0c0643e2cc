"""Architectures without an entry in the table: found by structure and by numbers, or refused."""

import collections

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from ripple_loader import reorder
from ripple_loader.model.architectures import ARCHITECTURES, Projection
from ripple_loader.model.probe import architecture_of, probe
from tests.ripple.conftest import CALIBRATION, MODELS, SMALL, load, make_model, relative_error
from tests.ripple.families import TYPES, logits, tiny_model


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 20), nn.Linear(8, 20), nn.Linear(20, 8)
        self.dropout, self.activation = nn.Dropout(), nn.SiLU()


class BGates(Gated):
    """The second linear is the gate, the first is up."""

    def forward(self, x):
        return self.dropout(self.c(self.activation(self.b(x)) * self.a(x)))


class NormBetween(Gated):
    def forward(self, x):
        y = self.activation(self.a(x)) * self.b(x)
        return self.c(y / y.norm(dim=-1, keepdim=True))


class Scaled(Gated):
    def forward(self, x):
        return 0.5 * self.c(self.activation(self.a(x)) * self.b(x))


class Clamped(Gated):
    def forward(self, x):
        return self.c(self.activation(self.a(x).clamp(max=50)) * self.b(x))


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.narrow, self.act = nn.Linear(8, 40, bias=False), nn.Linear(20, 8), nn.GELU()

    def forward(self, x):
        up, gate = self.wide(x).chunk(2, -1)
        return self.narrow(up * self.act(gate))


class Interleaved(Fused):
    def forward(self, x):
        y = self.wide(x)
        return self.narrow(self.act(y[..., ::2]) * y[..., 1::2])


class Plain(nn.Module):
    def __init__(self, linear=nn.Linear):
        super().__init__()
        sizes = ((8, 20), (20, 8)) if linear is nn.Linear else ((20, 8), (8, 20))
        self.first, self.second, self.act = linear(*sizes[0]), linear(*sizes[1]), nn.ReLU()

    def forward(self, x):
        return self.second(self.act(self.first(x)))


def model_of(*mlps: nn.Module) -> nn.Module:
    class Layer(nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.attention, self.ffn = nn.Linear(8, 8), mlp

    model = nn.Module()
    model.blocks = nn.ModuleList(map(Layer, mlps))
    model.config = PreTrainedConfig()
    model.config.model_type = "toy"
    return model


@pytest.mark.parametrize(
    ("mlp", "selector", "up", "down"),
    [
        (BGates, Projection("b", 0), Projection("a", 0), Projection("c", 1)),
        (Fused, Projection("wide", 0, half=1), Projection("wide", 0, half=0), Projection("narrow", 1)),
        (Plain, Projection("first", 0), None, Projection("second", 1)),
        (lambda: Plain(Conv1D), Projection("first", 1), None, Projection("second", 0)),
    ],
)
def test_an_mlp_is_found_by_what_it_computes(mlp, selector, up, down):
    found = probe(model_of(mlp(), mlp()))
    assert (found.layers, found.mlp) == ("blocks", "ffn")
    assert (found.selector, found.up, found.down) == (selector, up, down)


@pytest.mark.parametrize("mlp", [NormBetween, Scaled, Clamped, Interleaved])
def test_a_module_that_computes_something_else_is_refused(mlp):
    with pytest.raises(ValueError, match=r"must find a module in each layer that computes down\(act\(gate"):
        probe(model_of(mlp(), mlp()))


def test_layers_must_be_alike():
    with pytest.raises(
        ValueError, match=r"layer 1 of a toy has ffn \(first, second\) and layer 0 has ffn \(b"
    ):
        probe(model_of(BGates(), Plain()))


def test_experts_beside_an_mlp_are_refused():
    mlp = Plain()
    mlp.experts = nn.Module()
    mlp.experts.weights = nn.Parameter(torch.zeros(4, 20, 8))
    with pytest.raises(ValueError, match="no experts beside it"):
        probe(model_of(mlp))


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("gemma3_multimodal", "opt")])
def test_the_probe_finds_what_the_table_says(name):
    model = make_model(name)
    if (entry := ARCHITECTURES[model.config.model_type]).expert is None:
        assert probe(model) == entry


def test_a_model_that_is_no_causal_lm_is_refused():
    from transformers import ViTConfig

    with pytest.raises(ValueError, match=r"must be given a causal language model, .* has none for a vit"):
        architecture_of(ViTConfig())


def outcome(model_type, folder) -> str:
    model = tiny_model(model_type)
    if model is None:
        return "not built"
    model.save_pretrained(folder / "model")
    try:
        plain = AutoModelForCausalLM.from_pretrained(folder / "model")
    except ValueError:  # transformers cannot load the text model of emu3 and mllama by this class
        return "not built"
    try:
        reorder(folder / "model", folder / "reordered", CALIBRATION[:2], SMALL)
    except ValueError:
        return "refused"
    error = relative_error(logits(load(folder / "reordered")), logits(plain.eval()))
    return "equal" if error < 1e-5 else f"off by {error:.1e}"


@pytest.mark.parametrize("model_type", ["cohere", "glm4", "gptj", "jais2", "olmo3", "seed_oss"])
def test_a_family_without_an_entry_streams(model_type, tmp_path):
    assert model_type not in ARCHITECTURES
    assert outcome(model_type, tmp_path) == "equal"


@pytest.mark.parametrize("model_type", ["biogpt", "xglm", "trocr"])
def test_a_decoder_whose_layers_hold_the_linears_streams(model_type, tmp_path):
    assert outcome(model_type, tmp_path) == "equal"


@pytest.mark.parametrize("model_type", ["apertus", "bitnet"])
def test_an_mlp_of_another_form_is_refused(model_type, tmp_path):
    assert outcome(model_type, tmp_path) == "refused"


@pytest.mark.slow
def test_no_causal_lm_of_transformers_is_wrong(tmp_path):
    outcomes = collections.defaultdict(list)
    for model_type in TYPES:
        outcomes[outcome(model_type, tmp_path / model_type)].append(model_type)
    for result, types in outcomes.items():
        print(f"{result}: {len(types)}: {', '.join(types)}")
    assert set(outcomes) == {"equal", "refused", "not built"}
    assert len(outcomes["equal"]) >= 86


def test_the_probe_reads_no_weights():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2))
    assert probe(model) == ARCHITECTURES["llama"]
