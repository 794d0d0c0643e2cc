"""Fine-tune a causal LM on text or chats: an ordinary Trainer script, to which LeMo is one more dataclass.

    python scripts/finetune.py --model_name_or_path .cache/assets/SmolLM2-135M-Instruct --lora_r 8 \
        --train_file .cache/assets/cpython-topics/train.jsonl --output_dir out/finetune --max_steps 10 \
        --lemo --lemo_keep_ratio 0.4
    python scripts/finetune.py configs/lemo/finetune.yaml
    accelerate launch --num_processes 2 scripts/finetune.py configs/lemo/finetune.yaml
    torchrun --nproc_per_node 2 scripts/finetune.py configs/lemo/finetune.yaml
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from lemo_trainer import LemoArguments
from lemo_trainer.texts import pack, read_texts


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "folder of a causal LM, or an id of the hub"})
    attn_implementation: str = field(default="sdpa", metadata={"help": "attention kernel"})
    lora_r: int = field(default=0, metadata={"help": "rank of LoRA; 0 trains all weights"})
    lora_alpha: int = field(default=16, metadata={"help": "LoRA's scale, times its rank"})
    use_dora: bool = field(default=False, metadata={"help": "DoRA instead of LoRA"})


@dataclass
class DataArguments:
    train_file: str = field(metadata={"help": 'text, or .jsonl with "text" or chat "messages" in each line'})
    eval_file: str | None = field(default=None, metadata={"help": "held-out data of the same kinds"})
    seq_len: int = field(default=2048, metadata={"help": "tokens of a sample; documents are joined and cut"})


def load_model(arguments: ModelArguments) -> Any:
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model_name_or_path, attn_implementation=arguments.attn_implementation
    )
    if not arguments.lora_r:
        return model
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules="all-linear",
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        use_dora=arguments.use_dora,
    )
    return get_peft_model(model, config)


def main() -> Trainer:
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments, LemoArguments))
    try:
        if len(sys.argv) == 2 and sys.argv[1].endswith((".yaml", ".yml")):
            parsed = parser.parse_yaml_file(sys.argv[1])
        else:
            parsed = parser.parse_args_into_dataclasses()
        model_args, data_args, training_args, lemo_args = parsed
        tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
        files = {"train": data_args.train_file, "eval": data_args.eval_file}
        data = {
            split: pack(read_texts(path), tokenizer, data_args.seq_len)
            for split, path in files.items()
            if path is not None
        }
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))

    set_seed(training_args.seed)  # the adapter starts from random numbers
    trainer = Trainer(
        model=load_model(model_args),
        args=training_args,
        train_dataset=data["train"],
        eval_dataset=data.get("eval"),
        processing_class=tokenizer,
        callbacks=lemo_args.callbacks(),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    if "eval" in data:
        trainer.log_metrics("eval", trainer.evaluate())
    return trainer


if __name__ == "__main__":
    main()
