"""The way that `mode="auto"` chooses, and the costs by which it does."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lemo_trainer import LemoConfig, apply_lemo, remove_lemo
from lemo_trainer.exact.auto import SHARES
from lemo_trainer.exact.budget import free_bytes, state_bytes
from lemo_trainer.exact.ways import Detached, Way
from lemo_trainer.measure import ActivationBytes
from lemo_trainer.session import session_of
from lemo_trainer.sizes import parse_bytes, size_text

from .exact import relative_error
from .tiny import assert_same_step, batch, checkpointing, lora, loss_and_gradients, tiny_model

# peft 0.21 still reads transformers' old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

AUTO = {"mode": "auto", "segment_tokens": 32, "loss_segment": 16}
SEQ_LEN = 512
WIDE = {"hidden_size": 64, "intermediate_size": 160, "max_position_embeddings": 4 * SEQ_LEN, "head_dim": 16}


def tokens(seq_len=SEQ_LEN, size=1):
    ids = torch.randint(3, 97, (size, seq_len), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def choice_of(model, inputs=None, **options):
    """What auto chose for one step, and that step."""
    report = apply_lemo(model, LemoConfig(**{**AUTO, **options}))
    step = loss_and_gradients(model, inputs or tokens())
    remove_lemo(model)
    return report.choice, step


def measured(model, way):
    """Saved bytes and the peak of activations of a step that runs by `way`, with the gradients in place."""
    if way.scheme == "plain":
        selective = way.selective
        options = {"mode": "detach", "layers": "all", "keep_ratio": 1.0, "selective_checkpointing": selective}
    else:
        options = {"mode": "exact", "scheme": way.scheme, "boundaries": way.boundaries}
        options["segment_tokens"] = way.segment_tokens or SEQ_LEN
        options["selective_checkpointing"] = way.selective
    apply_lemo(model, LemoConfig(loss_segment=16, **options))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    inputs = tokens()
    with ActivationBytes() as activations:
        model(**inputs).loss.backward()
    remove_lemo(model)
    return activations.saved_bytes, activations.peak_bytes


@pytest.mark.parametrize(
    ("kind", "trained"), [("llama", "LoRA"), ("llama", "all weights"), ("gpt_neox", "LoRA")]
)
def test_costs_are_within_a_tenth_of_what_is_measured(kind, trained):
    model = tiny_model(kind, layers=5, **WIDE)
    model = lora(model) if trained == "LoRA" else model
    choice, _ = choice_of(model)
    assert {str(cost.way) for cost in choice.table} >= {"plain", "checkpointing", "exact by layers of 32"}
    for cost in choice.table:
        saved, peak = measured(model, cost.way)
        assert cost.saved == pytest.approx(saved, rel=0.1), cost.way
        assert cost.peak + choice.state == pytest.approx(peak + choice.state, rel=0.1), cost.way


def test_auto_is_the_default():
    assert LemoConfig().mode == "auto"
    assert LemoConfig(memory="1GiB", speed=1.5, segment_tokens=64, loss_segment=0).mode == "auto"
    assert LemoConfig(keep_ratio=0.5).mode == "detach"  # its options keep their meaning without a mode


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "auto", "keep_ratio": 0.5}, '`keep_ratio` must be left out with mode="auto".*got 0.5'),
        ({"mode": "exact", "memory": "1GiB"}, "`memory` must be left out .*\\(auto does\\), got '1GiB'"),
        ({"mode": "detach", "speed": 1.5}, '`speed` must be left out with mode="detach"'),
        ({"memory": "much"}, "`memory` must be like \"12GiB\".*'much'"),
        ({"memory": "0"}, "`memory` must be like \"12GiB\".*positive number of bytes, got '0'"),
        ({"memory": "-5GiB"}, "`memory` must be like \"12GiB\".*got '-5GiB'"),
        ({"memory": "inf"}, "`memory` must be like \"12GiB\".*got 'inf'"),
        ({"speed": 0.5}, "`speed` must be a number of at least 1, got 0.5"),
    ],
)
def test_options_that_auto_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        LemoConfig(**options)


def test_with_enough_memory_the_model_runs_plain():
    choice, _ = choice_of(tiny_model(**WIDE))
    assert choice.way == Way(scheme="plain")
    assert choice.memory < free_bytes(torch.device("cpu")) + 1e9


def peaks(model):
    """The peak of each way, activations and all, by way."""
    choice, _ = choice_of(model)
    return {cost.way: cost.peak + choice.state for cost in choice.table}, choice


@pytest.mark.parametrize("padding", ["plain", "left"])
def test_every_way_gives_the_dense_gradient(padding):
    """Some of the peaks in turn are the memory: another way each time, and always the dense gradients."""
    model = lora(tiny_model()).double()
    inputs = batch(padding)
    wanted = loss_and_gradients(model, inputs)
    free, _ = choice_of(model, inputs, segment_tokens=10)
    ways = set()
    for cost in sorted(free.table, key=lambda cost: cost.peak)[::4]:
        memory = str(math.ceil(cost.peak + free.state))
        choice, step = choice_of(model, inputs, segment_tokens=10, memory=memory)
        place = [each.way for each in choice.table].index(choice.way)
        assert choice.fits(choice.table[place])
        assert not any(map(choice.fits, choice.table[:place]))  # the fastest stand first
        assert relative_error(step, wanted) < 1e-6  # the loss is made in float32
        ways.add(choice.way)
    assert len(ways) >= 2


def test_the_peak_stays_within_the_memory_given():
    model = tiny_model(layers=5, **WIDE)
    by_way, free = peaks(model)
    memory = min(by_way.values()) * 1.02
    config = LemoConfig(**AUTO, memory=str(int(memory)))
    report = apply_lemo(model, config)
    model(**tokens()).loss.backward()  # it chooses here
    with ActivationBytes() as activations:
        model(**tokens()).loss.backward()
    assert activations.peak_bytes + state_bytes(model) <= 1.1 * memory
    assert report.choice.way != Way(scheme="plain")
    assert free.way == Way(scheme="plain")


def test_a_longer_batch_decides_anew_and_a_shorter_one_does_not(caplog):
    model = tiny_model(layers=4, **WIDE)
    by_way, _ = peaks(model)
    memory = str(int(by_way[Way(scheme="plain")] * 1.05))
    report = apply_lemo(model, LemoConfig(**AUTO, memory=memory))
    caplog.clear()
    lengths = []
    for seq_len in (SEQ_LEN, 64, 3 * SEQ_LEN, SEQ_LEN):
        model(**tokens(seq_len)).loss.backward()
        lengths.append((report.choice.seq_len, report.choice.way.scheme))
    assert lengths[:2] == [(SEQ_LEN, "plain")] * 2
    assert lengths[2] == lengths[3]
    assert lengths[2][0] == 3 * SEQ_LEN
    assert lengths[2][1] != "plain"
    assert [record.getMessage().startswith("LeMo chose") for record in caplog.records] == [True, True]


def test_it_says_what_the_others_would_have_cost():
    model = tiny_model(**WIDE)
    report = apply_lemo(model, LemoConfig(**AUTO))
    assert "the first batch decides" in str(report)
    model(**tokens()).loss.backward()
    text = str(report)
    assert "\n" not in text
    for words in (
        "plain for batches up to 1 x 512 tokens",
        "others: ",
        "exact by layers of 32, boundaries on disk",
    ):
        assert words in text


def test_speed_costs_as_few_tokens_as_possible():
    model = tiny_model(layers=6, **WIDE)
    choice, _ = choice_of(model, speed=1.1)
    assert isinstance(choice.way, Detached)
    assert 0.1 < choice.way.keep_ratio < 1
    more, _ = choice_of(model, speed=1.2)
    assert more.way.keep_ratio < choice.way.keep_ratio
    with pytest.raises(
        ValueError, match="`speed` must be one that keeping a tenth of the tokens reaches, got 9"
    ):
        choice_of(model, speed=9)


def test_a_sparse_choice_runs_in_the_same_session_and_is_undone():
    model = tiny_model(layers=6, **WIDE)
    own = model.forward
    wanted = loss_and_gradients(model, tokens())
    report = apply_lemo(model, LemoConfig(**AUTO, speed=1.1))
    session = session_of(model)
    model(**tokens()).loss.backward()
    assert session_of(model) is session
    assert report.config.mode == "detach"
    assert report.kept_share < 1
    assert "lose their gradient" in str(report)
    model(**tokens(2 * SEQ_LEN)).loss.backward()  # stays as it is
    remove_lemo(model)
    assert model.forward == own
    assert relative_error(loss_and_gradients(model, tokens()), wanted) == 0


def test_a_memory_that_holds_no_step_is_refused():
    model = tiny_model(layers=4, **WIDE)
    with pytest.raises(ValueError, match=r"`memory` must hold a step: 1 x 512 tokens need .* [kM]B at least"):
        choice_of(model, memory="1MB")
    remove_lemo(model)


def test_checkpointing_of_the_trainer_is_decided_by_auto_too():
    model, inputs = lora(tiny_model()), batch("left")
    wanted = loss_and_gradients(model, inputs)
    model.enable_input_require_grads()
    checkpointing(model.get_base_model(), reentrant=True)
    choice, step = choice_of(model, inputs)
    assert choice.way == Way(scheme="plain")
    assert relative_error(step, wanted) < 1e-5


def test_counting_leaves_nothing_behind():
    """Dynamic rotary embeddings note the longest sample, and hooks must not see the fake tensors."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = tiny_model(rope_parameters=rope, max_position_embeddings=16)
    inputs = batch("plain")
    seen = []
    model.model.norm.register_forward_hook(lambda module, args, output: seen.append(type(output)))
    weight = model.model.layers[0].mlp.up_proj.weight
    wanted = loss_and_gradients(model, inputs)
    _, step = choice_of(model, inputs)
    assert relative_error(step, wanted) < 1e-5
    assert set(seen) == {torch.Tensor}
    assert model.model.layers[0].mlp.up_proj.weight is weight


def test_all_ranks_choose_by_the_longest_batch_and_the_least_memory(monkeypatch):
    """The ranks of one step, in turn: the reduction gives each what another rank has more of."""
    model = tiny_model(layers=4, **WIDE)
    by_way, _ = peaks(model)
    least = by_way[Way(scheme="plain")] - 1

    def all_reduce(values, op):
        assert op == torch.distributed.ReduceOp.MAX
        other = [1, 2 * SEQ_LEN] if len(values) == 2 else [-least]
        values.copy_(torch.maximum(values, torch.tensor(other, dtype=values.dtype)))

    for name, value in (("is_initialized", True), ("get_world_size", 2), ("get_backend", "gloo")):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    choice, _ = choice_of(model)
    assert (choice.seq_len, choice.memory) == (2 * SEQ_LEN, least)
    assert choice.way != Way(scheme="plain")


def test_what_cannot_be_counted_runs_by_layers():
    model, inputs = tiny_model(), batch("left")
    wanted = loss_and_gradients(model, inputs)

    class Odd(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.silu(x) if x.detach().numpy().ndim else x

    for layer in model.model.layers:
        layer.mlp.act_fn = Odd()
    choice, step = choice_of(model, inputs, segment_tokens=8)
    assert choice.way == Way(scheme="layers", segment_tokens=8)
    assert "cannot be predicted, because" in str(choice)
    assert relative_error(step, wanted) < 1e-5


def test_a_checkpoint_around_the_whole_model_is_counted_without_its_hooks():
    model, ids = tiny_model(), batch("plain")["input_ids"]

    def step():
        model.zero_grad()
        x_BSD = model.get_input_embeddings()(ids)
        loss = checkpoint(lambda x: model(inputs_embeds=x, labels=ids).loss, x_BSD, use_reentrant=False)
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}

    wanted = step()
    report = apply_lemo(model, LemoConfig(**AUTO))
    assert_same_step(step(), wanted)
    assert report.choice.cost is not None


def test_sizes_are_read_as_text():
    assert parse_bytes("memory", "1.5 GiB") == 1.5 * 2**30
    assert parse_bytes("memory", "800MB") == 8e8
    assert SHARES[0] == 0.95


def test_sizes_are_printed_in_the_unit_that_fits():
    texts = [size_text(size) for size in (0, 999, 1234, 37.1e6, 999_996_000, 20.694e9, 1.5e12)]
    assert texts == ["0 bytes", "999 bytes", "1.234 kB", "37.10 MB", "1.000 GB", "20.69 GB", "1500 GB"]
