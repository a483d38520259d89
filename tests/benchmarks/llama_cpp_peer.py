"""llama.cpp's side of `make bench-peers`, run by the interpreter of .venv-peers (llama-cpp-python and gguf from PyPI).

    llama_cpp_peer.py write '{config.json as text}' OUT.gguf q1_0 q8_0    random weights: type of linears, of the head
    llama_cpp_peer.py serve-ik …                               the same through ik_llama.cpp (ik-llama-cpp-python)
    llama_cpp_peer.py serve '{"model": …, "threads": …, "depth": …, "tokens": …, "context": …}'

`serve` answers as fbiedge.bench_worker does. Q1_0 holds 128 weights of a row in 18 bytes: an fp16 scale, then 128 sign
bits, lowest first; TQ2_0 (ternary, two bits a weight) 256 in 66: 64 bytes of 2-bit codes, then the scale. The embedding
has the head's type. llama.cpp computes the logits of a prompt's last token alone, as its users get them.
"""

from __future__ import annotations

import ctypes
import importlib
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


class LlamaCpp:
    """A model in llama.cpp, with what a measurement needs of it."""

    package = "llama_cpp"

    def __init__(self, settings: dict[str, Any]) -> None:
        import llama_cpp

        self.api = self.load_api(llama_cpp.llama_log_set, llama_cpp)
        self.version = llama_cpp.__version__
        self.open(settings)
        self.memory = self.api.llama_get_memory(self.context)

    def load_api(self, set_log: Any, api: Any) -> Any:
        """Silence the log."""
        self.log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
        set_log(self.log, ctypes.c_void_p(0))
        return api

    def open(self, settings: dict[str, Any]) -> None:
        api = self.api
        api.llama_backend_init()
        self.model = api.llama_model_load_from_file(settings["model"].encode(), api.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"llama.cpp can't load {settings['model']}")
        parameters = api.llama_context_default_params()
        parameters.n_ctx = settings["context"]
        parameters.n_threads = parameters.n_threads_batch = settings["threads"]
        self.context = api.llama_init_from_model(self.model, parameters)
        if not self.context:
            raise SystemExit("llama.cpp can't make a context")
        self.batch_tokens = parameters.n_batch
        self.vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))

    def forward(self, ids: list[int], first: int) -> None:
        """Append `ids`, of which the first is at position `first`, and wait for the last one's logits."""
        for at in range(0, len(ids), self.batch_tokens):
            part = ids[at : at + self.batch_tokens]
            tokens = (ctypes.c_int32 * len(part))(*part)  # the batch only points to it
            if self.api.llama_decode(self.context, self.batch(tokens, len(part), first + at)) != 0:
                raise SystemExit("llama_decode failed")
        self.api.llama_get_logits_ith(self.context, -1)

    def batch(self, tokens: Any, count: int, _first: int) -> Any:
        return self.api.llama_batch_get_one(tokens, count)

    def truncate(self, length: int) -> None:
        self.api.llama_memory_seq_rm(self.memory, 0, length, -1)


class IkLlamaCpp(LlamaCpp):
    """ik_llama.cpp, which kept an older interface and whose package declares only a part of it."""

    package = "ik_llama_cpp"

    def __init__(self, settings: dict[str, Any]) -> None:
        import ik_llama_cpp
        from ik_llama_cpp import _ctypes_api as api

        library = api._lib
        self.api = self.load_api(library.llama_log_set, api)
        self.version = ik_llama_cpp.__version__
        self.remove = library.llama_kv_cache_seq_rm
        self.remove.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32]
        self.open(settings)

    def batch(self, tokens: Any, count: int, first: int) -> Any:
        return self.api.llama_batch(n_tokens=count, token=tokens, all_pos_0=first, all_pos_1=1, all_seq_id=0)

    def truncate(self, length: int) -> None:
        self.remove(self.context, 0, length, -1)


def serve(settings: dict[str, Any], engine: type[LlamaCpp]) -> None:
    """Load, fill the cache, then answer the commands on stdin."""
    importlib.import_module(engine.package)
    started = perf_counter()
    llama = engine(settings)
    loaded = perf_counter()
    depth, length = settings["depth"], settings["tokens"]
    ids = [int(token) for token in np.random.default_rng(0).integers(0, llama.vocabulary, depth + length)]
    llama.forward(ids[:1], 0)
    first = perf_counter()
    llama.truncate(0)
    if depth:
        llama.forward(ids[:depth], 0)
    answer({"load_seconds": loaded - started, "first_token_seconds": first - loaded, "version": llama.version})
    for command in map(str.strip, sys.stdin):
        if command == "memory":
            answer({"peak_rss_bytes": peak_rss_bytes()})
            continue
        llama.truncate(depth)
        llama.forward(ids[depth : depth + 1], depth)
        llama.truncate(depth)
        started = perf_counter()
        if command == "prefill":
            llama.forward(ids[depth:], depth)
        else:
            for at in range(depth, depth + length):
                llama.forward(ids[at : at + 1], at)
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
        serve(json.loads(sys.argv[2]), IkLlamaCpp if sys.argv[1] == "serve-ik" else LlamaCpp)
