"""llama.cpp's side of `make bench-peers`, run by the interpreter of .venv-peers (llama-cpp-python and gguf from PyPI).

    llama_cpp_peer.py write '{config.json as text}' OUT.gguf q1_0 q8_0    random weights: type of linears, of the head
    llama_cpp_peer.py serve '{"model": …, "threads": …, "depth": …, "tokens": …, "context": …}'

`serve` answers as fbiedge.bench_worker does. Q1_0 holds 128 weights of a row in 18 bytes: an fp16 scale, then 128 sign
bits, lowest first; TQ2_0 (ternary, two bits a weight) 256 in 66: 64 bytes of 2-bit codes, then the scale. The embedding
has the head's type. llama.cpp computes the logits of a prompt's last token alone, as its users get them.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

# Type of the linears -> weights a block, bytes of its codes, whether the fp16 scale comes first.
BLOCKS = {"q1_0": (128, 16, True), "tq2_0": (256, 64, False)}


def write(config: dict[str, Any], out: Path, linears: str, head: str) -> None:
    """A Llama of the shape that `config` says; K of every linear must be a multiple of the block's weights."""
    import gguf

    kind = gguf.GGMLQuantizationType[linears.upper()]
    weights, code_bytes, scale_first = BLOCKS[linears]

    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(out, "llama")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    hidden, ffn, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(int(gguf.LlamaFileType[f"MOSTLY_{linears.upper()}"]))

    def linear(name: str, n: int, k: int) -> None:
        if k % weights:
            raise SystemExit(f"{name} has {k} inputs, {linears} takes multiples of {weights}")
        scales = generator.uniform(0.01, 0.03, (n, k // weights, 1)).astype(np.float16).view(np.uint8)
        codes = generator.integers(0, 256, (n, k // weights, code_bytes), np.uint8)
        if linears == "tq2_0":  # 2 bits, 0 to 2 for -1 to 1; ours are -1 and 1
            codes = (codes & 0b01010101) << 1
        blocks = np.concatenate([scales, codes] if scale_first else [codes, scales], axis=2)
        writer.add_tensor(name, blocks.reshape(n, -1), raw_dtype=kind)

    def table(name: str) -> None:
        values = generator.standard_normal((config["vocab_size"], hidden), np.float32) * np.float32(0.02)
        table_kind = gguf.GGMLQuantizationType[head.upper()]
        writer.add_tensor(name, gguf.quants.quantize(values, table_kind), raw_dtype=table_kind)

    table("token_embd.weight")
    table("output.weight")
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for layer in range(config["num_hidden_layers"]):
        block = f"blk.{layer}"
        writer.add_tensor(f"{block}.attn_norm.weight", np.ones(hidden, np.float32))
        writer.add_tensor(f"{block}.ffn_norm.weight", np.ones(hidden, np.float32))
        linear(f"{block}.attn_q.weight", heads * head_dim, hidden)
        linear(f"{block}.attn_k.weight", kv_heads * head_dim, hidden)
        linear(f"{block}.attn_v.weight", kv_heads * head_dim, hidden)
        linear(f"{block}.attn_output.weight", hidden, heads * head_dim)
        linear(f"{block}.ffn_gate.weight", ffn, hidden)
        linear(f"{block}.ffn_up.weight", ffn, hidden)
        linear(f"{block}.ffn_down.weight", hidden, ffn)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def serve(settings: dict[str, Any]) -> None:
    """Load, fill the cache, then answer the commands on stdin."""
    import llama_cpp

    log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
    llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
    started = perf_counter()
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(settings["model"].encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp can't load {settings['model']}")
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = settings["context"]
    parameters.n_threads = parameters.n_threads_batch = settings["threads"]
    context = llama_cpp.llama_init_from_model(model, parameters)
    if not context:
        raise SystemExit("llama.cpp can't make a context")
    loaded = perf_counter()
    depth, length = settings["depth"], settings["tokens"]
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    ids = np.random.default_rng(0).integers(0, vocabulary, depth + length).astype(np.int32)
    memory = llama_cpp.llama_get_memory(context)

    def forward(first: int, last: int) -> None:
        for at in range(first, last, parameters.n_batch):
            count = min(parameters.n_batch, last - at)
            tokens = (ctypes.c_int32 * count)(*ids[at : at + count])  # the batch only points to it
            if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, count)) != 0:
                raise SystemExit("llama_decode failed")
        llama_cpp.llama_get_logits_ith(context, -1)  # waits for the result

    def truncate(length: int) -> None:
        llama_cpp.llama_memory_seq_rm(memory, 0, length, -1)

    forward(0, 1)
    first = perf_counter()
    truncate(0)
    if depth:
        forward(0, depth)
    answer({"load_seconds": loaded - started, "first_token_seconds": first - loaded, "version": llama_cpp.__version__})
    for command in map(str.strip, sys.stdin):
        if command == "memory":
            answer({"peak_rss_bytes": peak_rss_bytes()})
            continue
        truncate(depth)
        forward(depth, depth + 1)
        truncate(depth)
        started = perf_counter()
        if command == "prefill":
            forward(depth, depth + length)
        else:
            for at in range(depth, depth + length):
                forward(at, at + 1)
        answer({"seconds": perf_counter() - started})


def peak_rss_bytes() -> int:
    """As fbiedge.machine does; this interpreter has no fbiedge."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def answer(document: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(json.loads(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], sys.argv[5])
    else:
        serve(json.loads(sys.argv[2]))
