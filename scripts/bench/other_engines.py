"""llama.cpp and airllm as contenders: a model from a transformers checkpoint, decoded token by token.

    pip install -e ".[peers]"     # builds llama.cpp, some minutes

Best in an environment of its own: airllm's wheel brings a package named `tests`, which hides this project's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

Decoder = Callable[[int], int]
"""Takes the next token of a text and returns the likeliest to follow it."""

_CONTEXT = 512
_TENSORS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _rotated_in_pairs(weight: Any, heads: int) -> Any:
    """Rows of a query or key projection in llama.cpp's order, which rotates neighbours, not halves."""
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def write_gguf(directory: Path, path: Path) -> None:
    """A float32 GGUF file, without a tokenizer, of a Llama or Arcee checkpoint in one file."""
    from gguf import GGUFWriter
    from safetensors.torch import load_file
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(directory)
    writer = GGUFWriter(path, config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in load_file(directory / "model.safetensors").items():
        name, weight = name.removesuffix(".weight"), tensor.float().numpy()
        if name.startswith("model.layers."):
            _, _, layer, part = name.split(".", 3)
            part = _TENSORS[part]
            if part in heads:
                weight = _rotated_in_pairs(weight, heads[part])
            name = f"blk.{layer}.{part}"
        else:
            name = _TENSORS[name]
        writer.add_tensor(f"{name}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp(path: Path) -> Decoder:
    """llama.cpp on a file mapped into memory, one thread, keys and values in float32."""
    import llama_cpp as library

    model = library.Llama(
        str(path),
        n_ctx=_CONTEXT,
        n_batch=1,
        n_threads=1,
        type_k=library.GGML_TYPE_F32,
        type_v=library.GGML_TYPE_F32,
        use_mmap=True,
        verbose=False,
    )

    def decode(token: int) -> int:
        model.eval([token])
        logits = library.llama_get_logits_ith(model.ctx, -1)
        return int(
            np.ctypeslib.as_array(
                ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (model.n_vocab(),)
            ).argmax()
        )

    return decode


def airllm(directory: Path, shards: Path) -> Decoder:
    """airllm on the CPU, which loads a layer at a time from shards that it writes first."""
    from airllm import AutoModel

    return transformers_decoder(
        AutoModel.from_pretrained(str(directory), device="cpu", layer_shards_saving_path=str(shards))
    )


def transformers_decoder(model: Any) -> Decoder:
    """Any model that is called as transformers' are."""
    cache: Any = None

    def decode(token: int) -> int:
        nonlocal cache
        output = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        return int(output.logits[0, -1].argmax())

    return decode
