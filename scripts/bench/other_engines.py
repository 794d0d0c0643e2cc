"""llama.cpp and airllm as contenders: a model from a transformers checkpoint, decoded token by token.

    pip install -e ".[peers]"     # builds llama.cpp, some minutes

Best in an environment of its own: airllm's wheel brings a package named `tests`, which hides this project's.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

_CONTEXT = 512


def _rotated_in_pairs(weight: Any, heads: int) -> Any:
    """Rows of a query or key projection in llama.cpp's order, which rotates neighbours, not halves."""
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def write_gguf(directory: Path, path: Path) -> None:
    """A float32 GGUF file, without a tokenizer, of a Llama or Arcee checkpoint in one file."""
    from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map
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
    names = get_tensor_name_map(MODEL_ARCH[config.model_type.upper()], config.num_hidden_layers)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in load_file(directory / "model.safetensors").items():
        theirs, weight = names.get_name(name, try_suffixes=(".weight",)), tensor.float().numpy()
        for part, count in heads.items():
            if f".{part}." in theirs:
                weight = _rotated_in_pairs(weight, count)
        writer.add_tensor(theirs, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp(path: Path) -> Callable[[int], int]:
    """llama.cpp on a file mapped into memory, one thread, keys and values in float32: given a token of a
    text, it returns the likeliest to follow."""
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
        logits = ctypes.cast(library.llama_get_logits_ith(model.ctx, -1), ctypes.POINTER(ctypes.c_float))
        return int(np.ctypeslib.as_array(logits, (model.n_vocab(),)).argmax())

    return decode


def airllm(directory: Path, shards: Path) -> Any:
    """airllm's model on the CPU, which loads a layer at a time from shards that it writes first."""
    from airllm import AutoModel

    return AutoModel.from_pretrained(str(directory), device="cpu", layer_shards_saving_path=str(shards))
