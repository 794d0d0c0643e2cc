"""Trainers by modes: each cell of the table in docs/lemo_works_with.md."""

from __future__ import annotations

import functools
import math
import warnings

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from lemo_trainer import LemoCallback
from lemo_trainer.session import session_of

from .tiny import VOCAB, documented, every_mode, lora, tiny_model
from .training import losses, samples, trainer_for, training_arguments

# peft 0.21 still reads transformers' old name.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:trl.*"),
]

MODES, HALF = every_mode(segment_tokens=8), every_mode(0.5, segment_tokens=8)


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({str(i): i for i in range(VOCAB)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "0", "bos_token": "1", "eos_token": "2"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def texts(seed, count=4, words=24):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(3, VOCAB, (count, words), generator=generator)
    return [" ".join(map(str, row.tolist())) for row in rows]


def dataset(**columns):
    from datasets import Dataset

    return Dataset.from_dict(columns)


def preferences():
    return dataset(prompt=texts(0, words=8), chosen=texts(1), rejected=texts(2))


def arguments(folder, **options):
    base = training_arguments(folder, bf16=False, max_steps=1, optim="sgd", **options)
    return {**base, "learning_rate": 0.1, "lr_scheduler_type": "constant"}


def trainer(folder, callbacks):
    return trainer_for(lora(tiny_model()), folder, callbacks, **arguments(folder))


def sft(folder, callbacks):
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(**arguments(folder, max_length=48))
    rows = dataset(input_ids=[sample["input_ids"].tolist() for sample in samples()])
    return SFTTrainer(
        lora(tiny_model()), config, train_dataset=rows, processing_class=tokenizer(), callbacks=callbacks
    )


def dpo(folder, callbacks):
    from trl import DPOConfig, DPOTrainer

    return DPOTrainer(
        tiny_model(),
        ref_model=tiny_model(),
        args=DPOConfig(**arguments(folder)),
        train_dataset=preferences(),
        processing_class=tokenizer(),
        callbacks=callbacks,
    )


def dpo_lora(folder, callbacks):
    from trl import DPOConfig, DPOTrainer

    return DPOTrainer(
        lora(tiny_model()),
        args=DPOConfig(**arguments(folder)),
        train_dataset=preferences(),
        processing_class=tokenizer(),
        callbacks=callbacks,
    )


def kto(folder, callbacks):
    from trl import KTOConfig, KTOTrainer

    rows = dataset(prompt=texts(0, words=8), completion=texts(1), label=[True, False] * 2)
    return KTOTrainer(
        tiny_model(),
        ref_model=tiny_model(),
        args=KTOConfig(**arguments(folder)),
        train_dataset=rows,
        processing_class=tokenizer(),
        callbacks=callbacks,
    )


def orpo(folder, callbacks):
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    return ORPOTrainer(
        tiny_model(),
        args=ORPOConfig(**arguments(folder, max_length=64)),
        train_dataset=preferences(),
        processing_class=tokenizer(),
        callbacks=callbacks,
    )


def reward(folder, callbacks):
    from trl import RewardConfig, RewardTrainer

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = AutoConfig.for_model("llama", vocab_size=VOCAB, num_labels=1, pad_token_id=0, **sizes)
    torch.manual_seed(0)
    return RewardTrainer(
        AutoModelForSequenceClassification.from_config(config),
        args=RewardConfig(**arguments(folder)),
        train_dataset=dataset(chosen=texts(1), rejected=texts(2)),
        processing_class=tokenizer(),
        callbacks=callbacks,
    )


def online(kind, folder, callbacks):
    import trl

    def rewards(completions, **_):
        return [float(len(set(text.split()))) for text in completions]

    config = getattr(trl, f"{kind}Config")  # the reference of the KL term is the model without its adapter
    args = config(**arguments(folder), num_generations=2, max_completion_length=12, beta=0.1)
    return getattr(trl, f"{kind}Trainer")(
        lora(tiny_model()),
        reward_funcs=rewards,
        args=args,
        train_dataset=dataset(prompt=texts(0, words=16)),
        processing_class=tokenizer(),
        callbacks=callbacks,
    )


def grpo(folder, callbacks):
    return online("GRPO", folder, callbacks)


def rloo(folder, callbacks):
    return online("RLOO", folder, callbacks)


def distillation(folder, callbacks):
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    turns = [
        [{"role": "user", "content": a}, {"role": "assistant", "content": b}]
        for a, b in zip(texts(0, words=8), texts(1), strict=True)
    ]
    words = tokenizer()
    words.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    return GKDTrainer(
        tiny_model(),
        teacher_model=tiny_model(rope_parameters={"rope_type": "default", "rope_theta": 10.0}),
        args=GKDConfig(**arguments(folder, max_length=48), lmbda=0.0, max_new_tokens=8),
        train_dataset=dataset(messages=turns),
        processing_class=words,
        callbacks=callbacks,
    )


TRAINERS = {
    "Trainer": trainer,
    "SFTTrainer": sft,
    "DPOTrainer": dpo,
    "DPOTrainer, LoRA": dpo_lora,
    "KTOTrainer": kto,
    "ORPOTrainer": orpo,
    "RewardTrainer": reward,
    "GRPOTrainer": grpo,
    "RLOOTrainer": rloo,
    "GKDTrainer": distillation,
}


OUTER_LOSS = "TRL|must have `labels`"
REFUSED = {(name, "segments"): OUTER_LOSS for name in TRAINERS if name != "Trainer"}
REFUSED["RewardTrainer", "segments"] = "language-model head"


def run(make, folder, config):
    with warnings.catch_warnings():  # TRL on what it deprecates itself
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        made = make(folder, [LemoCallback(config)] if config else [])
        made.train()
    return made


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The trainers after a step without LeMo."""
    return functools.cache(lambda name: run(TRAINERS[name], tmp_path_factory.mktemp("plain"), None))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", TRAINERS)
def test_trainer(name, mode, plain, tmp_path):
    """Loss and step equal the plain ones where everything is kept, and half works; or it is refused."""
    make = TRAINERS[name]
    if sentence := REFUSED.get((name, mode)):
        with pytest.raises(ValueError, match=sentence):
            run(make, tmp_path, MODES[mode])
        return
    wanted, got = plain(name), run(make, tmp_path, MODES[mode])
    assert losses(got) == pytest.approx(losses(wanted), rel=1e-5, abs=1e-6)
    torch.testing.assert_close(got.model.state_dict(), wanted.model.state_dict(), rtol=1e-5, atol=1e-5)
    half = run(make, tmp_path, HALF[mode])
    (entry,) = [entry for entry in half.state.log_history if "loss" in entry]
    assert math.isfinite(entry["loss"])
    online = name.startswith(("GRPO", "RLOO"))
    if mode in ("auto", "detach", "exact") and not online:  # their forward is exact
        assert entry["loss"] == pytest.approx(losses(wanted)[0], rel=1e-4, abs=1e-6)
    assert mode in ("auto", "exact") or 0.3 < entry["lemo_kept_share"] < 0.75
    assert entry["lemo_tokens"] > 8
    assert session_of(half.model) is None


@pytest.mark.parametrize("mode", ["auto", "detach", "eliminate", "exact"])
def test_the_first_loss_of_dpo_is_that_of_equal_models(mode, tmp_path):
    """The reference passes are dense, and so is the policy's forward pass but under eliminate."""
    for make in (dpo, dpo_lora):
        loss = losses(run(make, tmp_path, HALF[mode]))[0]
        equal = loss == pytest.approx(math.log(2), abs=1e-4)
        assert equal == (mode != "eliminate")


@pytest.mark.parametrize("mode", MODES)
def test_seq2seq_trainer_is_refused(mode, tmp_path):
    from transformers import AutoModelForSeq2SeqLM, Seq2SeqTrainer, Seq2SeqTrainingArguments

    config = AutoConfig.for_model(
        "t5", vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0
    )
    made = Seq2SeqTrainer(
        AutoModelForSeq2SeqLM.from_config(config),
        Seq2SeqTrainingArguments(**training_arguments(tmp_path)),
        train_dataset=samples(),
        callbacks=[LemoCallback(MODES[mode])],
    )
    with pytest.raises(ValueError, match="an encoder-decoder: train it without LeMo"):
        made.train()


def test_the_table_in_the_docs_is_this_one():
    wanted = {
        name: ["refused" if (name, mode) in REFUSED else "equal" for mode in MODES] for name in TRAINERS
    }
    assert documented("Trainers") == {**wanted, "Seq2SeqTrainer": ["refused"] * 5}
