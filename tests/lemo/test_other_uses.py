"""Uses of a model by modes: each cell of the table "Other uses" in docs/lemo_works_with.md."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForSequenceClassification

from lemo_trainer import apply_lemo
from lemo_trainer.exact import auto

from .tiny import EVERY_MODE, VOCAB, batch, documented, every_mode, loss_and_gradients, tiny_model

KEEPING_ALL = every_mode()
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}


def differs(got, wanted):
    if isinstance(wanted, torch.Tensor):
        return not torch.allclose(got, wanted, rtol=1e-4, atol=1e-5)
    return len(got) != len(wanted) or any(differs(got[name], wanted[name]) for name in wanted)


def outcome(mode, step, model=tiny_model, works="works", configs=KEEPING_ALL):
    """What a step of a fresh model comes to: it equals the step without LeMo, or it is refused."""
    plain, patched = model(), model()
    wanted = step(plain)
    try:
        apply_lemo(patched, configs[mode])
        got = step(patched)
    except (ValueError, RuntimeError) as error:
        sentence = str(error)
        if "needs selective_checkpointing=False" in sentence:
            return "needs `selective_checkpointing=False`"
        if "modified by an inplace operation" in sentence:
            return "refused by torch"
        return "refused" if "LeMo" in sentence or "`" in sentence or 'mode="' in sentence else sentence
    return "wrong" if differs(got, wanted) else works


def gradients_of(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def outer_loss(mode):
    ids = batch("plain")["input_ids"]

    def step(model):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        return gradients_of(model, functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:]))

    return outcome(mode, step)


def logits_read(mode):
    def read(with_gradient):
        def step(model):
            output = model(**batch("plain"), use_cache=False)
            logits = output.logits if with_gradient else output.logits.detach()
            return {"loss": logits.mean(), **gradients_of(model, output.loss + logits.square().mean())}

        return step

    return outcome(mode, read(True)) if mode != "segments" else metrics_only(read)


def metrics_only(read):
    assert outcome("segments", read(False)) == "works"
    assert outcome("segments", read(True)) == "refused"
    return "metrics only"


def other_heads(mode):
    config = AutoConfig.for_model("llama", vocab_size=VOCAB, num_labels=2, pad_token_id=0, **SIZES)

    def classifier():
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_config(config).train()

    def step(model):
        inputs = {**batch("right"), "labels": torch.tensor([0, 1])}
        return loss_and_gradients(model, inputs)[1]

    def of_decoder(model):
        return gradients_of(model, model(input_ids=batch("plain")["input_ids"])[0].square().mean())

    heads = outcome(mode, step, classifier)
    assert outcome(mode, of_decoder, lambda: tiny_model().model) == heads
    return heads


def embedding_hook(mode):
    def step(model):
        noise = torch.rand(2, 45, 32, generator=torch.Generator().manual_seed(0))
        model.get_input_embeddings().register_forward_hook(lambda _, args, output: output + noise)
        return loss_and_gradients(model, batch("plain"))[1]

    return outcome(mode, step)


def head_changed(mode):
    def step(model):
        model.lm_head.register_forward_hook(lambda _, args, output: output / 2)
        model.lm_head.register_full_backward_hook(lambda _, inputs, outputs: (inputs[0] / 2,))
        return loss_and_gradients(model, batch("plain"))[1]

    return outcome(mode, step)


def hidden_states(mode):
    def step(model):
        output = model(**batch("plain"), use_cache=False, output_hidden_states=True)
        states = {str(i): state.detach() for i, state in enumerate(output.hidden_states)}
        return {**states, **gradients_of(model, output.loss)}

    return outcome(mode, step)


def parameter_hooks(mode):
    model, calls = tiny_model(), []
    model.model.layers[1].mlp.up_proj.weight.register_hook(lambda _: calls.append(1))
    apply_lemo(model, KEEPING_ALL[mode])
    model(**batch("plain")).loss.backward()
    return "once" if len(calls) == 1 else f"{len(calls)} times"


def twice(mode):
    def step(model):
        loss = model(**batch("plain"), use_cache=False).loss
        model.zero_grad()
        loss.backward(retain_graph=True)
        return gradients_of(model, loss)

    return outcome(mode, step)


def written_out():
    """Torch's kernel of attention on the CPU has no second derivative."""
    return tiny_model(implementation="eager")


def penalty(model, loss):
    weights = [p for name, p in model.named_parameters() if "layers" in name]
    norms = torch.autograd.grad(loss, weights, create_graph=True)
    return gradients_of(model, sum(gradient.square().sum() for gradient in norms))


def gradient_penalty(mode):
    return outcome(mode, lambda model: penalty(model, model(**batch("plain")).loss), written_out)


def outer_gradient_penalty(mode):
    def step(model):
        logits = model(input_ids=batch("plain")["input_ids"], use_cache=False).logits
        return penalty(model, logits.logsumexp(-1).mean())

    if mode in ("detach", "eliminate"):  # with everything kept, these run the model's own code
        return outcome(mode, step, written_out, configs=every_mode(0.5))
    return outcome(mode, step, written_out, "works where it runs plain")


def positions_by_hand(mode):
    """With a cache, which a model makes unless it is told not to, transformers looks for no documents."""
    inputs = {name: value for name, value in batch("packed").items() if name != "use_cache"}
    return outcome(mode, lambda model: loss_and_gradients(model, inputs)[1])


def backward_hooks(mode):
    def step(model):
        seen, layer = [], model.model.layers[1]

        def scale(module, *gradients):
            seen.append(gradients[-1][0].norm())
            return (gradients[0][0] / gradients[0][0].norm(),)

        layer.register_full_backward_hook(scale)
        layer.mlp.register_full_backward_pre_hook(scale)
        everywhere = nn.modules.module.register_module_full_backward_hook(
            lambda module, *gradients: seen.append(gradients[-1][0].norm()) if module is layer.mlp else None
        )
        with everywhere:
            gradients = loss_and_gradients(model, batch("plain"))[1]
        return {**gradients, "seen": torch.stack(seen)}

    return outcome(mode, step)


def other_layers(mode):
    def step(model):
        layers = model.model.layers
        model.model.layers = nn.ModuleList([layers[2], layers[0]])
        return loss_and_gradients(model, batch("plain"))[1]

    return outcome(mode, step)


def one_layer(mode):
    def shared():
        model = tiny_model(use_cache=False)
        model.model.layers = nn.ModuleList([model.model.layers[0]] * 3)
        return model

    return outcome(mode, lambda model: loss_and_gradients(model, batch("plain"))[1], shared)


def between(change):
    """Outcome of a change between the forward and the backward pass: the gradient must be as before."""

    def tried(mode):
        def step(model):
            loss = model(**batch("plain"), use_cache=False).loss
            if "lemo" in " ".join(vars(model)):
                change(model)
            return gradients_of(model, loss)

        return outcome(mode, step)

    return tried


def to_another_mode(model):
    model.eval()
    model.set_attn_implementation("eager")


def write_a_weight(model):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(2)


def functional_call(mode):
    def step(model):
        weights = {name: (1.1 * p.detach()).requires_grad_() for name, p in model.named_parameters()}
        loss = torch.func.functional_call(model, weights, (), batch("plain")).loss
        return dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))

    return outcome(mode, step)


def other_models(mode):
    from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

    t5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    parts = {"text_config": {"model_type": "llama", **SIZES}, "vision_config": {"image_size": 28, **SIZES}}
    models = [
        AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", vocab_size=VOCAB, **SIZES)),
        AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", vocab_size=VOCAB, **t5)),
        AutoModel.from_config(AutoConfig.for_model("llava", **parts)),
    ]
    for model in models:
        with pytest.raises(ValueError, match="LeMo"):
            apply_lemo(model.train(), KEEPING_ALL[mode])
    return "refused"


def threads(models):
    """Outcome of a training pass that begins in the middle of another thread's."""

    def tried(mode):
        first, second = (tiny_model() for _ in range(2))
        second = second if models == 2 else first
        for model in {first, second}:
            apply_lemo(model, KEEPING_ALL[mode])
        wanted, got = loss_and_gradients(second, batch("left"))[1], []

        def train():
            try:
                got.append(loss_and_gradients(second, batch("left"))[1])
            except RuntimeError as error:
                got.append(str(error))

        def in_a_thread(*_):
            if not got and threading.current_thread() is threading.main_thread():
                thread = threading.Thread(target=train)
                thread.start()
                thread.join()

        first.model.rotary_emb.register_forward_hook(in_a_thread)
        first(**batch("plain"))
        if isinstance(got[0], str):
            return "refused" if "one thread at a time" in got[0] else got[0]
        return "wrong" if differs(got[0], wanted) else "works"

    return tried


USES = {
    "a loss outside the model (label smoothing, `compute_loss_func`)": outer_loss,
    "`outputs.logits` read in `compute_loss`": logits_read,
    "heads for classification and rewards, a decoder alone": other_heads,
    "NEFTune, and other hooks on the embeddings": embedding_hook,
    "hooks on the head, a head or `loss_function` that was changed after `apply_lemo`": head_changed,
    "`output_hidden_states`": hidden_states,
    "hooks on parameters": parameter_hooks,
    "`retain_graph=True`, two backward passes": twice,
    "`create_graph=True` (gradient penalties)": gradient_penalty,
    "`create_graph=True` with a loss outside the model": outer_gradient_penalty,
    "`position_ids` by hand, also of packed documents": positions_by_hand,
    "backward hooks on layers, on their parts, on all modules": backward_hooks,
    "layers cut or reordered after `apply_lemo`": other_layers,
    "one layer at several depths": one_layer,
    "`eval()`, other adapters, other hooks between forward and backward": between(to_another_mode),
    "a weight written between forward and backward": between(write_a_weight),
    "`torch.func.functional_call`": functional_call,
    "encoders, encoder-decoders, vision-language models": other_models,
    "two threads, a model each": threads(2),
    "two threads, one model at once": threads(1),
}


def test_the_table_in_the_docs_has_these_uses():
    assert set(documented("Other uses")) == set(USES)


@pytest.mark.parametrize("mode", EVERY_MODE)
@pytest.mark.parametrize("use", USES)
def test_use(use, mode):
    assert USES[use](mode) == documented("Other uses")[use][EVERY_MODE.index(mode)]


def test_auto_says_what_to_do_where_it_recomputes_and_the_graph_is_retained(monkeypatch):
    monkeypatch.setattr(auto, "fits", lambda cost, *_: str(cost.way) == "plain, selective")
    model = tiny_model()
    apply_lemo(model, KEEPING_ALL["auto"])
    loss = model(**batch("plain")).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match='mode="exact"'):
        loss.backward()
