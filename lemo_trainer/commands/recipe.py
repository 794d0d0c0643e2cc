"""`lemo train`: a recipe is a YAML file that names a model, a text, LoRA, LeMo and training arguments."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lemo_trainer.compat import checkpointing_argument
from lemo_trainer.config import LemoConfig, check_keys
from lemo_trainer.files import check_model, read_yaml
from lemo_trainer.patch import apply_lemo, remove_lemo
from lemo_trainer.report import LemoReport
from lemo_trainer.texts import pack, read_texts


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One fine-tuning run.

    Args:
        model: folder of a causal LM, or an id of the Hugging Face hub.
        train_file: training text: .jsonl with a "text" or chat "messages" in each line, or plain text.
        output_dir: folder into which the adapter (or the model) is written.
        eval_file: held-out text; its dense loss is measured before and after.
        seq_len: tokens of a training sample; documents are joined and cut.
        checkpointing: gradient checkpointing.
        lora: fields of `peft.LoraConfig`; None trains all weights.
        lemo: fields of `LemoConfig`; None trains dense.
        training: fields of `transformers.TrainingArguments`.
    """

    model: str
    train_file: str
    output_dir: str
    eval_file: str | None = None
    seq_len: int = 2048
    checkpointing: bool = False
    lora: Mapping[str, Any] | None = None
    lemo: Mapping[str, Any] | None = None
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.seq_len, int) or self.seq_len < 2:
            raise ValueError(f"`seq_len` must be a whole number of at least 2, got {self.seq_len!r}.")
        for name in ("lora", "lemo", "training"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Mapping):
                raise ValueError(f"`{name}` must be a mapping of options, got {value!r}.")
        self.lemo_config()

    def lemo_config(self) -> LemoConfig | None:
        """The checked `lemo` section."""
        return None if self.lemo is None else LemoConfig.from_dict(self.lemo)

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> Recipe:
        """Read a recipe; overrides that are not None replace its values, a mapping entry by entry."""
        values = read_yaml(path)
        for name, value in overrides.items():
            if isinstance(value, Mapping):
                given = {key: entry for key, entry in value.items() if entry is not None}
                if given:
                    values[name] = {**(values.get(name) or {}), **given}
            elif value is not None:
                values[name] = value
        fields = dataclasses.fields(cls)
        check_keys(values, [known.name for known in fields], str(path))
        for known in fields[:3]:
            if known.name not in values:
                raise ValueError(f"{path} must name `{known.name}`.")
        return cls(**values)


@dataclass(frozen=True)
class RunResult:
    """Mean loss of the training steps, and the dense held-out losses if the recipe has an `eval_file`."""

    train_loss: float
    report: LemoReport | None
    held_out_before: float | None
    held_out_after: float | None


def run(recipe: Recipe) -> RunResult:
    """Fine-tune by `recipe` and save the result.

    All values and files are checked before anything is written.

    Raises:
        ValueError, FileNotFoundError: a value, a file or the model cannot be used.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

    from lemo_trainer.callback import LemoCallback

    check_model(recipe.model)
    names = [known.name for known in dataclasses.fields(TrainingArguments)]
    check_keys(recipe.training, [name for name in names if name != "output_dir"], "`training`")
    options = {checkpointing_argument(): recipe.checkpointing, "report_to": "none", **recipe.training}
    args = TrainingArguments(recipe.output_dir, **options)
    lora = None if recipe.lora is None else _lora(recipe.lora)
    texts = {"train": read_texts(recipe.train_file)}
    if recipe.eval_file is not None:
        texts["held_out"] = read_texts(recipe.eval_file)
    tokenizer = AutoTokenizer.from_pretrained(recipe.model)
    data = {split: pack(documents, tokenizer, recipe.seq_len) for split, documents in texts.items()}

    model = AutoModelForCausalLM.from_pretrained(recipe.model)
    if lora is not None:
        model = lora(model)
    config, callback = recipe.lemo_config(), None
    report = None
    if config is not None:
        report = apply_lemo(model, config)
        remove_lemo(model)
        callback = LemoCallback(config)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=data["train"],
        eval_dataset=data.get("held_out"),
        processing_class=tokenizer,
        callbacks=[callback] if callback else [],
    )
    before = trainer.evaluate()["eval_loss"] if "held_out" in data else None
    train_loss = trainer.train().training_loss
    after = trainer.evaluate()["eval_loss"] if "held_out" in data else None
    trainer.save_model()
    return RunResult(train_loss, report, before, after)


def _lora(options: Mapping[str, Any]) -> Callable[[Any], Any]:
    """A function that puts LoRA with these options onto a model."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError("A `lora` section needs peft; install it with `pip install peft`.") from error
    check_keys(options, [known.name for known in dataclasses.fields(LoraConfig)], "`lora`")
    config = LoraConfig(task_type="CAUSAL_LM", **options)
    return lambda model: get_peft_model(model, config)
