"""What model.gguf stores: each tensor's name, type, shape and place are known before any weight is read.

    token_embd.weight, output.weight       F16, Q8_0, Q1_0 or F32 [vocab, hidden]; no output where the head is tied
    blk.0.attn_norm.weight, …ffn_norm…     F32 [hidden], with what is folded in
    blk.0.attn_q.weight … ffn_down.weight  Q1_0 [N, K], of an ordinary Llama as the head is
    blk.0.attn_q_norm.weight, …k_norm…     F32 [head_dim], Qwen3
    rope_freqs.weight                      F32 [head_dim / 2], divisors of RoPE's frequencies, where it is scaled so
    output_norm.weight                     F32 [hidden]

llama.cpp rotates neighbours (2i, 2i + 1) in Llamas, Hugging Face the halves (i, i + D/2): rows of q and k are reordered
head by head. It does not in Qwen3. An FFN that is no multiple of 128 is padded with gate and up rows of d = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import gguf  # noqa: TID253
import numpy as np
import numpy.typing as npt

from fbiedge.config import BLOCK_SIZE, ModelConfig
from fbiedge.errors import CheckpointError, UsageError
from fbiedge.gguf_model import ROPE_FACTORS, gguf_name
from fbiedge.rope import rope_frequencies
from fbiedge.weights import BinaryLinear, Weights

from ..onnx.sources import TensorSpec
from .adapter import Adapter
from .folded import FoldedModel
from .q1_0 import q1_0_blocks, row_bytes
from .storage import TYPES, GgufOptions, Storage, stored_form, stored_row


@dataclass(frozen=True, kw_only=True)
class PlannedTensor:
    """A tensor of the file. `spec` has its bytes; blocks are rows of uint8."""

    spec: TensorSpec
    kind: gguf.GGMLQuantizationType
    read: Callable[[], npt.NDArray[Any]]


@dataclass
class Losses:
    """Complete once every tensor was read."""

    zeros: int = 0  # latent weights that were exactly 0, stored as +1


def padded_ffn(config: ModelConfig) -> int:
    """The FFN's size in the file."""
    ffn = config.intermediate_size
    return ffn if config.scaling_pattern == "none" else -(-ffn // BLOCK_SIZE) * BLOCK_SIZE


def check_shapes(config: ModelConfig, options: GgufOptions) -> None:
    """Blocks must fill a row. Raises CheckpointError or, for a form that was chosen, UsageError; both name the tensor."""
    binary = config.scaling_pattern != "none"
    inputs = {f"model.layers.0.{name}": k for name, (_, k) in config.linear_shapes().items()}
    for name, k in inputs.items() if binary else ():
        if k % BLOCK_SIZE and not name.endswith("mlp.down_proj"):  # which is padded
            raise CheckpointError(
                f"{name} has {k} inputs, but GGUF holds it in blocks of {BLOCK_SIZE}: a model needs a multiple of "
                f"{BLOCK_SIZE} there (only the FFN is padded)"
            )
    _check_form("embedding", options.embedding, {"model.embed_tokens.weight": config.hidden_size})
    _check_form("head", options.head, ({} if binary else inputs) | {"lm_head.weight": config.hidden_size})


def _check_form(option: str, chosen: Storage, inputs: Mapping[str, int]) -> None:
    fitting = [form for form in TYPES if not any(k % _block(form) for k in inputs.values())]
    for name, k in inputs.items():
        if k % _block(chosen):
            raise UsageError(
                f"{option} can't be {chosen}: {name} has {k} inputs, which don't fill blocks of {_block(chosen)}; "
                f"{' or '.join(fitting)} fits"
            )


def plan_tensors(
    weights: Weights, model: FoldedModel, options: GgufOptions, adapter: Adapter, losses: Losses
) -> Iterator[PlannedTensor]:
    """All tensors in the order of use. Reading a binary linear adds its beta to `adapter`."""
    config = weights.config
    yield _table(weights, "model.embed_tokens.weight", "embedding", options.embedding)
    divisors = _rope_divisors(config)
    if divisors is not None:
        yield _vector(ROPE_FACTORS, len(divisors), "rope", lambda: divisors, parameters=0)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        yield _norm(model, f"{prefix}input_layernorm.weight", config.hidden_size)
        for name in config.linear_shapes():
            if name == "mlp.gate_proj":
                yield _norm(model, f"{prefix}post_attention_layernorm.weight", config.hidden_size)
            if config.scaling_pattern == "none":
                yield _dense_linear(weights, prefix, name, options.head)
            else:
                yield _binary_linear(model, prefix, name, adapter, losses)
            if config.model_type == "qwen3" and name in ("self_attn.q_proj", "self_attn.k_proj"):
                yield _norm(model, f"{prefix}{name.removesuffix('_proj')}_norm.weight", config.head_dim)
    yield _norm(model, "model.norm.weight", config.hidden_size)
    if not config.tie_word_embeddings:
        yield _table(weights, "lm_head.weight", "head", options.head)


def _binary_linear(model: FoldedModel, prefix: str, name: str, adapter: Adapter, losses: Losses) -> PlannedTensor:
    config = model.weights.config
    n, k = config.linear_shapes()[name]
    rows = padded_ffn(config) if name in ("mlp.gate_proj", "mlp.up_proj") else n
    inputs = padded_ffn(config) if name == "mlp.down_proj" else k
    stored = gguf_name(f"{prefix}{name}.weight")

    def read() -> npt.NDArray[np.uint8]:
        linear = model.linear(f"{prefix}{name}")
        if (len(linear.packed), linear.k) != (n, k):
            shape = (len(linear.packed), linear.k)
            raise CheckpointError(f"{prefix}{name} has shape {shape}, expected {(n, k)} by the config")
        losses.zeros += linear.zeros
        groups = inputs // BLOCK_SIZE
        packed = _padded(linear.packed, (rows, inputs // 8))
        d = _padded(np.broadcast_to(linear.d, (n, groups)), (rows, groups))
        order = _row_order(config, name)
        if linear.a is not None and linear.b is not None:
            b = _padded(linear.b, (rows,))
            adapter.add(stored, b if order is None else b[order], _padded(linear.a, (inputs,)))
        return q1_0_blocks(packed, d, stored) if order is None else q1_0_blocks(packed[order], d[order], stored)

    group = "attention" if name.startswith("self_attn") else "mlp"
    spec = TensorSpec(
        name=stored, dtype="uint8", shape=(rows, row_bytes(inputs)), group=group, form="Q1_0", parameters=n * k
    )
    return PlannedTensor(spec=spec, kind=TYPES["q1_0"], read=read)


def _dense_linear(weights: Weights, prefix: str, name: str, storage: Storage) -> PlannedTensor:
    config = weights.config

    def values() -> npt.NDArray[np.float32]:
        weight = weights.linear(f"{prefix}{name}")
        if isinstance(weight, BinaryLinear):
            raise CheckpointError(f"{prefix}{name} is binary, but the config's scaling_pattern is 'none'")
        order = _row_order(config, name)
        return weight if order is None else weight[order]

    group = "attention" if name.startswith("self_attn") else "mlp"
    return _matrix(gguf_name(f"{prefix}{name}.weight"), config.linear_shapes()[name], group, storage, values)


def _table(weights: Weights, name: str, group: str, storage: Storage) -> PlannedTensor:
    shape = (weights.config.vocab_size, weights.config.hidden_size)
    return _matrix(gguf_name(name), shape, group, storage, lambda: weights.tensor(name))


def _matrix(
    name: str, shape: tuple[int, int], group: str, storage: Storage, values: Callable[[], npt.NDArray[np.float32]]
) -> PlannedTensor:
    def read() -> npt.NDArray[Any]:
        weight = values()
        if weight.shape != shape:
            raise CheckpointError(f"{name} would have shape {weight.shape}, expected {shape} by the config")
        return stored_form(weight, storage, name)

    dtype, columns = stored_row(storage, shape[1])
    spec = TensorSpec(
        name=name, dtype=dtype, shape=(shape[0], columns), group=group, form=storage.upper(), parameters=prod(shape)
    )
    return PlannedTensor(spec=spec, kind=TYPES[storage], read=read)


def _norm(model: FoldedModel, name: str, size: int) -> PlannedTensor:
    return _vector(gguf_name(name), size, "norms", lambda: model.norm(name), parameters=size)


def _vector(
    name: str, size: int, group: str, values: Callable[[], npt.NDArray[np.float32]], *, parameters: int
) -> PlannedTensor:
    spec = TensorSpec(name=name, dtype="float32", shape=(size,), group=group, form="F32", parameters=parameters)
    return PlannedTensor(spec=spec, kind=TYPES["f32"], read=values)


def _row_order(config: ModelConfig, name: str) -> npt.NDArray[np.intp] | None:
    """Rows of q or k from halves (i, i + D/2) to neighbours (2i, 2i + 1), head by head."""
    if config.model_type != "llama" or name not in ("self_attn.q_proj", "self_attn.k_proj"):
        return None
    n, half_dim = config.linear_shapes()[name][0], config.head_dim // 2
    order: npt.NDArray[np.intp] = np.arange(n).reshape(-1, 2, half_dim).swapaxes(1, 2).reshape(-1)
    return order


def _rope_divisors(config: ModelConfig) -> npt.NDArray[np.float32] | None:
    scaling = config.rope_scaling
    if scaling is None or scaling.rope_type not in ("llama3", "factors"):
        return None
    plain = rope_frequencies(config.head_dim, config.rope_theta, None)
    return (plain / rope_frequencies(config.head_dim, config.rope_theta, scaling)).astype(np.float32)


def _padded(array: npt.NDArray[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """With zeros behind the ends."""
    if array.shape == shape:
        return array
    padded = np.zeros(shape, array.dtype)
    padded[tuple(slice(size) for size in array.shape)] = array
    return padded


def _block(storage: Storage) -> int:
    return gguf.GGML_QUANT_SIZES[TYPES[storage]][0]
