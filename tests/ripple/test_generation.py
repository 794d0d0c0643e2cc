"""Everything around `generate` works on a streamed model as on the stock one."""

import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, StoppingCriteria, pipeline

from .conftest import load, relative_error, token_ids

NAMES = ["llama", "opt", "gpt2", "mixtral"]


@pytest.fixture(params=NAMES)
def pair(request, saved, reordered):
    """The stock model and the streamed one."""
    return AutoModelForCausalLM.from_pretrained(saved(request.param)), load(reordered(request.param))


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2, "length_penalty": 0.5},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=lambda options: next(iter(options)),
)
def test_deterministic_ways_to_generate(options, pair):
    stock, model = pair
    options = {"max_new_tokens": 10, "do_sample": False, **options}
    ids = token_ids(12)
    assert torch.equal(model.generate(ids, **options), stock.generate(ids, **options))


def test_sampling_with_a_seed(pair):
    samples = []
    for model in pair:
        torch.manual_seed(0)
        samples.append(model.generate(token_ids(12, batch=2), max_new_tokens=10, do_sample=True, top_k=20))
    assert torch.equal(*samples)


def test_a_batch_with_left_padding(pair):
    stock, model = pair
    ids, mask = token_ids(12, batch=3), torch.ones(3, 12, dtype=torch.long)
    for row, padding in enumerate((0, 4, 7)):
        ids[row, :padding], mask[row, :padding] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), stock.generate(ids, **options))


def test_assisted_generation_both_ways(pair, reordered):
    stock, model = pair
    ids, options = token_ids(12), {"max_new_tokens": 10, "do_sample": False}
    wanted = stock.generate(ids, **options)
    assert torch.equal(model.generate(ids, assistant_model=stock, **options), wanted)
    assert torch.equal(stock.generate(ids, assistant_model=model, **options), wanted)


def test_pipeline(pair):
    words = {f"w{number}": number for number in range(120)}
    words["<pad>"] = words.pop("w0")
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", padding_side="left")
    texts = ["w5 w6 w7", "w8 w9 w10 w11 w12"]
    results = [
        pipeline("text-generation", model=model, tokenizer=fast, batch_size=2)(
            texts, max_new_tokens=6, do_sample=False
        )
        for model in pair
    ]
    assert results[0] == results[1]


@torch.no_grad()
def log_likelihoods(model, requests):
    """What lm-evaluation-harness asks of a causal model: one batch, padded on the right, without a mask.

    Returns:
        For each request (context, continuation) the log-likelihood and whether it is the greedy text.
    """
    longest = max(len(context) + len(continuation) for context, continuation in requests) - 1
    rows = [torch.tensor([*context, *continuation][:-1]) for context, continuation in requests]
    logits = model(torch.stack([pad(row, (0, longest - len(row))) for row in rows])).logits.log_softmax(-1)
    found = []
    for row, ids, (_, continuation) in zip(logits, rows, requests, strict=True):
        wanted = torch.tensor(continuation)
        part = row[len(ids) - len(wanted) : len(ids)]
        greedy = torch.equal(part.argmax(-1), wanted)
        found.append((part.gather(1, wanted[:, None]).sum().item(), greedy))
    return found


def test_log_likelihoods_as_an_evaluation_asks_for_them(pair):
    stock, model = pair
    context = token_ids(9)[0].tolist()
    greedy = stock.generate(torch.tensor([context]), max_new_tokens=4, do_sample=False)[0, 9:].tolist()
    requests = [(context, greedy), (context[:3], [7, 9]), ([1], context), (context, [5])]
    got, wanted = (log_likelihoods(each, requests) for each in (model, stock))
    assert wanted[0][1]
    for (value, is_greedy), (other, other_is_greedy) in zip(got, wanted, strict=True):
        assert value == pytest.approx(other, rel=1e-4)
        assert is_greedy == other_is_greedy


class StopAt(StoppingCriteria):
    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **_):
        return input_ids[:, -1] == self.token


def test_stopping_criteria(pair):
    ids, options = token_ids(12), {"max_new_tokens": 10, "do_sample": False}
    stop = int(pair[0].generate(ids, **options)[0, 15])
    outputs = [each.generate(ids, stopping_criteria=[StopAt(stop)], **options) for each in pair]
    assert outputs[0].shape[1] <= 16
    assert torch.equal(*outputs)


TWO_PROCESSES = """
import sys, torch
from transformers import AutoModelForCausalLM
from ripple_loader import RippleConfig
config = RippleConfig(dram_budget="50KiB")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config)
with torch.no_grad():
    for _ in range(20):
        logits = model(torch.arange(3, 27)[None]).logits
torch.save(logits, sys.argv[2])
"""


def test_two_processes_read_one_directory(saved, reordered, tmp_path):
    outputs = [tmp_path / "first", tmp_path / "second"]
    command = [sys.executable, "-c", TWO_PROCESSES, str(reordered("llama"))]
    processes = [subprocess.Popen([*command, str(output)]) for output in outputs]
    assert [process.wait(timeout=600) for process in processes] == [0, 0]
    reference = AutoModelForCausalLM.from_pretrained(saved("llama"))(torch.arange(3, 27)[None]).logits
    for output in outputs:
        assert relative_error(torch.load(output), reference) < 1e-5
