"""The table of docs/ripple_works_with.md: what people put around a model, tried on a streamed one.

Each test computes the same with the stock model.
"""

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from .conftest import load, relative_error, token_ids

NAMES = ["llama", "opt", "mixtral"]


@pytest.fixture(params=NAMES)
def pair(request, saved, reordered):
    """The stock model and the streamed one."""
    return AutoModelForCausalLM.from_pretrained(saved(request.param)), load(reordered(request.param))


def rows(count=6):
    return Dataset.from_list(
        [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in token_ids(10, batch=count)]
    )


def arguments(folder, **options):
    options = {"report_to": [], "use_cpu": True, "per_device_eval_batch_size": 2} | options
    return TrainingArguments(str(folder), **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_trainer_evaluates_and_predicts(workers, pair, tmp_path):
    results = []
    for model in pair:
        trainer = Trainer(model, arguments(tmp_path, dataloader_num_workers=workers), eval_dataset=rows())
        loss = trainer.evaluate()["eval_loss"]
        results.append((loss, torch.tensor(trainer.predict(rows()).predictions[0])))
    (loss, logits), (other_loss, other_logits) = results
    assert other_loss == pytest.approx(loss, rel=1e-5)
    assert relative_error(other_logits, logits) < 1e-5


def test_trainer_refuses_to_train_what_is_frozen(reordered, tmp_path):
    model = load(reordered("llama"))
    trainer = Trainer(model, arguments(tmp_path, max_steps=1), train_dataset=rows())
    with pytest.raises(RuntimeError, match="does not require grad"):
        trainer.train()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_trainer_trains_an_adapter(saved, reordered, tmp_path):
    from peft import LoraConfig, get_peft_model

    losses = []
    for base in (AutoModelForCausalLM.from_pretrained(saved("llama")), load(reordered("llama"))):
        torch.manual_seed(0)
        # Not down_proj: the copy has another order of its inputs, which the random start of lora_A follows.
        config = LoraConfig(target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(base, config)
        options = {"max_steps": 3, "learning_rate": 0.05, "logging_steps": 1, "save_steps": 3}
        trainer = Trainer(model, arguments(tmp_path / str(len(losses)), **options), train_dataset=rows())
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[0][-1] != losses[0][0]
    assert (tmp_path / "1" / "checkpoint-3" / "adapter_model.safetensors").is_file()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_sft_trainer_evaluates(saved, reordered, tmp_path):
    from tokenizers import Tokenizer, models
    from trl import SFTConfig, SFTTrainer

    vocabulary = {"<pad>": 0, "<eos>": 1, **{f"w{number}": number for number in range(2, 120)}}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<eos>",
    )
    losses = []
    for model in (AutoModelForCausalLM.from_pretrained(saved("llama")), load(reordered("llama"))):
        options = SFTConfig(
            str(tmp_path), report_to=[], use_cpu=True, per_device_eval_batch_size=2, max_length=16, bf16=False
        )
        data = rows().remove_columns("labels")
        trainer = SFTTrainer(model, options, train_dataset=data, eval_dataset=data, processing_class=fast)
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile(backend, reordered):
    model, ids = load(reordered("llama")), token_ids()
    expected = model(ids).logits
    compiled = torch.compile(model, backend=backend)
    assert relative_error(compiled(ids).logits, expected) < 1e-5
    assert relative_error(compiled(token_ids(9)).logits, model(token_ids(9)).logits) < 1e-5
    torch._dynamo.reset()


@torch.no_grad()
def test_hidden_states_attentions_and_hooks(pair):
    stock, model = pair
    ids, outputs = token_ids(batch=2), []
    for one in pair:
        outputs.append(one(ids, output_hidden_states=True))
    for got, wanted in zip(outputs[1].hidden_states, outputs[0].hidden_states, strict=True):
        assert relative_error(got, wanted) < 1e-5
    with torch.inference_mode():
        assert relative_error(model(ids).logits, stock(ids).logits) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(model(ids).logits, stock(ids).logits) < 5e-2
    assert relative_error(model(ids).logits, stock(ids).logits) < 1e-5


@torch.no_grad()
def test_a_larger_vocabulary(reordered):
    model = load(reordered("llama"))
    before = model(token_ids()).logits
    model.resize_token_embeddings(130, mean_resizing=False)
    assert relative_error(model(token_ids()).logits[..., :120], before) < 1e-6


@torch.no_grad()
def test_the_inner_model_alone(saved, reordered):
    stock = AutoModelForCausalLM.from_pretrained(saved("llama"))
    model = load(reordered("llama"))
    states = [one.model(inputs_embeds=one.get_input_embeddings()(token_ids())) for one in (stock, model)]
    assert relative_error(states[1].last_hidden_state, states[0].last_hidden_state) < 1e-5


def test_accelerate_prepares_and_unwraps(reordered):
    from accelerate import Accelerator

    model, accelerator = load(reordered("llama")), Accelerator(cpu=True)
    prepared = accelerator.prepare_model(model, evaluation_mode=True)
    assert relative_error(prepared(token_ids()).logits, model(token_ids()).logits) < 1e-6
    assert accelerator.get_state_dict(prepared).keys() == model.state_dict().keys()
