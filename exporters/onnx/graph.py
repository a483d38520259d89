"""The graph of a Llama, binary or not, built node by node; its weights are only named here (see plan.py).

Inputs and outputs have onnxruntime-genai's names. Keys and values stay in place when one buffer of maximal length is
bound as past and present of a layer. `logits_to_keep` (an input with a default, named as in transformers) says for how
many of the last positions logits are computed; 0, the default, is all. A prompt needs one row, perplexity needs all.
With an int8 cache there are also past_key_values.{i}.key_scale and .value_scale, present.{i}.key_scale and .value_scale:
a scale for each row.

    x = embedding[input_ids]
    per layer:  x += o_proj(attention(rope(q_proj(norm(x))), rope(k_proj(norm(x))), v_proj(norm(x))))
                                                   in a Qwen3 with q_norm and k_norm over each head before rope
                x += down_proj(silu(gate_proj(norm(x))) · up_proj(norm(x)))
    logits = lm_head(norm(x)[-logits_to_keep:])

A binary layer is five nodes: norm and q, k, v (BinaryQKV); attention; o_proj and the sum (BinaryMatMul); norm, gate, up
and their product (BinarySwiGLU); down_proj and the sum (BinaryMatMul). Without `fused`, in stock operators (stock.py) and
in a model that isn't binary, each step is a node of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import GraphProto, TensorProto, ValueInfoProto, helper  # noqa: TID253

from fbiedge.config import BLOCK_SIZE, ModelConfig
from fbiedge.errors import UsageError

from .embedding import binary_rows, quantized_rows, tiled_rows
from .fallback import DOMAIN, OP_TYPE
from .fallback_attention import OP_TYPE as ATTENTION
from .fallback_fused import QKV, SWIGLU
from .head import BLOCK as HEAD_BLOCK
from .nodes import Nodes
from .options import ACCURACY_LEVELS, CODE_BITS, ExportOptions, fused_rope
from .stock import CONTRIB, stock_linear
from .unfolded import unfolded_head, unfolded_matrix
from .vocabulary import EMBEDDING, HEAD, rows_are_shared

KEEP = "logits_to_keep"

# GroupQueryAttention rejects other head sizes when it runs (ONNX Runtime 1.18 to 1.31).
_HEAD_DIM_MULTIPLE = 8


def build_graph(config: ModelConfig, options: ExportOptions, *, fused: bool = True) -> GraphProto:
    """The graph without its weights: the writer adds those as initializers. Only one of our operators can be fused.

    Raises UsageError for a head_dim that ONNX Runtime's attention can't take.
    """
    if config.head_dim % _HEAD_DIM_MULTIPLE:
        raise UsageError(
            f"head_dim is {config.head_dim}, but ONNX Runtime's GroupQueryAttention takes multiples of "
            f"{_HEAD_DIM_MULTIPLE} only; this model can't be exported to ONNX"
        )
    builder = _Builder(config, options)
    builder.prologue()
    builder.embedding()
    add_layer = builder.fused_layer if fused and builder.ours else builder.layer
    for layer in range(config.num_hidden_layers):
        add_layer(layer)
    builder.head()
    inputs, outputs = _inputs(config, builder.int8_cache), _outputs(config, builder.int8_cache)
    return helper.make_graph(builder.nodes, "fbiedge", inputs, outputs, initializer=builder.constants)


def _inputs(config: ModelConfig, int8: bool) -> list[ValueInfoProto]:
    infos = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence_length"]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total_sequence_length"]),
    ]
    infos += _cache_infos(config, int8, "past_key_values", "past_sequence_length")
    return [*infos, helper.make_tensor_value_info(KEEP, TensorProto.INT64, [1])]


def _outputs(config: ModelConfig, int8: bool) -> list[ValueInfoProto]:
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "logits_length", config.vocab_size])
    return [logits, *_cache_infos(config, int8, "present", "present_sequence_length")]


def _cache_infos(config: ModelConfig, int8: bool, prefix: str, length: str) -> list[ValueInfoProto]:
    rows: list[str | int | None] = ["batch", config.num_key_value_heads, length]
    numbers = (TensorProto.INT8 if int8 else TensorProto.FLOAT, [*rows, config.head_dim])
    parts = {"key": numbers, "value": numbers}
    if int8:
        parts |= {"key_scale": (TensorProto.FLOAT, rows), "value_scale": (TensorProto.FLOAT, rows)}
    return [
        helper.make_tensor_value_info(f"{prefix}.{layer}.{part}", dtype, shape)
        for layer in range(config.num_hidden_layers)
        for part, (dtype, shape) in parts.items()
    ]


class _Builder(Nodes):
    """Appends the nodes of a model, part by part."""

    def __init__(self, config: ModelConfig, options: ExportOptions) -> None:
        super().__init__()
        self.config = config
        self.options = options
        self.fused_rope = fused_rope(config)
        self.ours = options.ours(config)
        self.int8_cache = options.cache(config) == "int8"
        self.residual = ""  # sum of all blocks so far
        self.pending = ""  # output of the last block, to be added to the residual by the next norm

    def prologue(self) -> None:
        """Lengths that every attention needs: past + new tokens - 1 by row of the batch, and the mask's width."""
        last_axis, one = self.constant("constants.last_axis", [-1]), self.constant("constants.one", [1])
        lengths = self.node("ReduceSum", "lengths.sum", ["attention_mask", last_axis], keepdims=0)
        last = self.node("Sub", "lengths.last", [lengths, one])
        self.node("Cast", "lengths.last_int32", [last], to=TensorProto.INT32)
        total = self.node("Shape", "lengths.total", ["attention_mask"], start=1, end=2)
        self.node("Cast", "lengths.total_int32", [total], to=TensorProto.INT32)
        if not self.fused_rope:
            self.positions(last_axis, one)

    def positions(self, last_axis: str, one: str) -> None:
        """Position of each new token: how many tokens the mask shows before it; its columns end with the new ones."""
        zero = self.constant("constants.zero", [0])
        axis = self.constant("constants.axis_one", [1])
        far = self.constant("constants.end", [np.iinfo(np.int64).max])
        counts = self.node("CumSum", "positions.counts", ["attention_mask", axis])
        shifted = self.node("Sub", "positions.shifted", [counts, one])
        clipped = self.node("Max", "positions.all", [shifted, zero])
        length = self.node("Shape", "positions.new_length", ["input_ids"], start=1, end=2)
        start = self.node("Neg", "positions.start", [length])
        self.node("Slice", "positions", [clipped, start, far, last_axis])

    def embedding(self) -> None:
        name, form = EMBEDDING, self.options.embedding
        shared = rows_are_shared(self.config, self.options)
        matrix = HEAD if shared else name
        if form == "1bit":
            self.residual = binary_rows(self, name, "input_ids", matrix)
            return
        if form in CODE_BITS:
            bits, k = CODE_BITS[form], self.config.hidden_size
            if shared and self.ours:
                self.residual = tiled_rows(self, name, "input_ids", f"{HEAD}.tiles", bits=bits, k=k)
            else:
                self.residual = quantized_rows(self, name, "input_ids", matrix, bits=bits, k=k, flat=shared)
            return
        fp16 = form == "fp16"
        rows = self.node("Gather", f"{name}.rows" if fp16 else name, [f"{name}.weight", "input_ids"])
        self.residual = self.node("Cast", name, [rows], to=TensorProto.FLOAT) if fp16 else rows

    def norm(self, name: str) -> str:
        """RMS norm of residual + pending block; the sum becomes the new residual."""
        epsilon, weight = self.config.rms_norm_eps, f"{name}.weight"
        if not self.pending:
            return self.rms_norm(name, self.residual, weight)
        total = f"{name}.residual"
        outputs = [name, "", "", total]
        inputs = [self.residual, self.pending, weight]
        self.node("SkipSimplifiedLayerNormalization", name, inputs, outputs, CONTRIB, epsilon=epsilon)
        self.residual, self.pending = total, ""
        return name

    def rms_norm(self, name: str, x: str, weight: str) -> str:
        """Over the last axis."""
        epsilon = self.config.rms_norm_eps
        return self.node("SimplifiedLayerNormalization", name, [x, weight], axis=-1, epsilon=epsilon, stash_type=1)

    def linear(self, name: str, x: str, residual: str = "") -> str:
        """x · Wᵀ, plus `residual` where given (binary linears only)."""
        if self.config.scaling_pattern == "none":
            return self.node("MatMul", name, [x, f"{name}.weight"])
        n, k = self.shape(name)
        if not self.ours:
            return self.stock(name, x, n, k)
        return self.binary(OP_TYPE, name, [x, *self.matrix(name), residual], K=k, N=n)

    def shape(self, name: str) -> tuple[int, int]:
        return self.config.linear_shapes()[name.split(".", 3)[3]]

    def matrix(self, name: str) -> list[str]:
        """The inputs B, scales and offsets of a binary linear; block form has no offsets."""
        offsets = "" if self.config.scaling_pattern == "block" else f"{name}.beta"
        return [f"{name}.bits", f"{name}.alpha", offsets]

    def stock(self, name: str, x: str, n: int, k: int, output: str = "") -> str:
        form, bits = self.config.scaling_pattern, self.options.stock_bits
        if self.options.unfolded:
            return self.node("MatMul", name, [x, unfolded_matrix(self, name, form=form, n=n, k=k)], [output or name])
        level = ACCURACY_LEVELS[self.options.accuracy_level]
        return stock_linear(self, name, x, form=form, n=n, k=k, bits=bits, accuracy_level=level, output=output or name)

    def binary(self, op_type: str, name: str, inputs: list[str], outputs: Sequence[str] = (), **attributes: Any) -> str:
        """A node of ours; absent inputs at the end are left out."""
        while not inputs[-1]:
            inputs.pop()
        form = self.config.scaling_pattern
        return self.node(
            op_type,
            name,
            inputs,
            outputs,
            DOMAIN,
            **attributes,
            scale_form=form,
            block_size=BLOCK_SIZE if form == "block" else 0,
            accuracy_level=ACCURACY_LEVELS[self.options.accuracy_level],
        )

    def fused_layer(self, index: int) -> None:
        prefix, epsilon = f"model.layers.{index}", self.config.rms_norm_eps
        x, name = self.residual, f"{prefix}.self_attn"
        projections = [f"{name}.{part}_proj" for part in "qkv"]
        inputs = [x, f"{prefix}.input_layernorm.weight", *(part for p in projections for part in self.matrix(p))]
        (n_q, k), (n_k, _), (n_v, _) = map(self.shape, projections)
        qkv = self.binary(QKV, f"{name}.qkv_proj", inputs, K=k, N_q=n_q, N_k=n_k, N_v=n_v, epsilon=epsilon)
        if self.fused_rope and (self.int8_cache or not self.config.has_head_norms):
            attended = self.attention(name, index, qkv)
        else:
            sizes = self.constant(f"{name}.qkv_sizes", [n_q, n_k, n_v])
            parts = [f"{name}.{part}" for part in "qkv"]
            self.node("Split", f"{name}.split", [qkv, sizes], parts, axis=-1)
            attended = self.attention(name, index, *parts)
        x = self.linear(f"{name}.o_proj", attended, x)
        name = f"{prefix}.mlp"
        gate, up = f"{name}.gate_proj", f"{name}.up_proj"
        n, k = self.shape(gate)
        inputs = [x, f"{prefix}.post_attention_layernorm.weight", *self.matrix(gate), *self.matrix(up)]
        h = self.binary(SWIGLU, f"{name}.gate_up_proj", inputs, K=k, N=n, epsilon=epsilon)
        self.residual = self.linear(f"{name}.down_proj", h, x)

    def layer(self, index: int) -> None:
        prefix = f"model.layers.{index}"
        x = self.norm(f"{prefix}.input_layernorm")
        name = f"{prefix}.self_attn"
        attended = self.attention(name, index, *(self.linear(f"{name}.{part}_proj", x) for part in "qkv"))
        self.pending = self.linear(f"{name}.o_proj", attended)
        x = self.norm(f"{prefix}.post_attention_layernorm")
        gate = self.linear(f"{prefix}.mlp.gate_proj", x)
        up = self.linear(f"{prefix}.mlp.up_proj", x)
        sigmoid = self.node("Sigmoid", f"{prefix}.mlp.sigmoid", [gate])
        silu = self.node("Mul", f"{prefix}.mlp.silu", [gate, sigmoid])
        product = self.node("Mul", f"{prefix}.mlp.product", [silu, up])
        self.pending = self.linear(f"{prefix}.mlp.down_proj", product)

    def attention(self, name: str, index: int, q: str, k: str = "", v: str = "") -> str:
        """`q` alone is q, k and v side by side, which needs a fused rope and an int8 cache or no norms of heads."""
        if self.int8_cache:
            packed = self.node("Concat", f"{name}.qkv", [q, k, v], axis=-1) if k else q
            return self.int8_attention(name, index, packed)
        if self.config.has_head_norms:
            q, k = self.head_norm(f"{name}.q_norm", q), self.head_norm(f"{name}.k_norm", k)
        inputs = ["lengths.last_int32", "lengths.total_int32"]
        if self.fused_rope:
            inputs += ["rope.cos", "rope.sin"]
        else:
            q, k = self.rope(f"{name}.q_rope", q), self.rope(f"{name}.k_rope", k)
        past = [f"past_key_values.{index}.key", f"past_key_values.{index}.value"]
        return self.node(
            "GroupQueryAttention",
            f"{name}.attention",
            [q, k, v, *past, *inputs],
            [f"{name}.attention", f"present.{index}.key", f"present.{index}.value"],
            CONTRIB,
            num_heads=self.config.num_attention_heads,
            kv_num_heads=self.config.num_key_value_heads,
            do_rotary=int(self.fused_rope),
            rotary_interleaved=0,
            scale=self.config.head_dim**-0.5,
        )

    def int8_attention(self, name: str, index: int, qkv: str) -> str:
        parts = ("key", "value", "key_scale", "value_scale")
        past = [f"past_key_values.{index}.{part}" for part in parts]
        norms: list[str] = []
        attributes: dict[str, Any] = {}
        if self.config.has_head_norms:
            norms = [f"{name}.q_norm.weight", f"{name}.k_norm.weight"]
            attributes = {"epsilon": self.config.rms_norm_eps}
        return self.node(
            ATTENTION,
            f"{name}.attention",
            [qkv, *past, "lengths.last_int32", "lengths.total_int32", "rope.cos", "rope.sin", *norms],
            [f"{name}.attention", *(f"present.{index}.{part}" for part in parts)],
            DOMAIN,
            num_heads=self.config.num_attention_heads,
            kv_num_heads=self.config.num_key_value_heads,
            scale=self.config.head_dim**-0.5,
            **attributes,
        )

    def head_norm(self, name: str, x: str) -> str:
        """RMS norm over each head of x [batch, tokens, heads · head_dim]."""
        heads = self.constant("constants.by_head", [0, 0, -1, self.config.head_dim])
        flat = self.constant("constants.by_row", [0, 0, -1])
        by_head = self.node("Reshape", f"{name}.heads", [x, heads])
        normed = self.rms_norm(f"{name}.normed", by_head, f"{name}.weight")
        return self.node("Reshape", name, [normed, flat])

    def rope(self, name: str, x: str) -> str:
        inputs = [x, "positions", "rope.cos", "rope.sin"]
        return self.node("RotaryEmbedding", name, inputs, domain=CONTRIB, interleaved=0)

    def head(self) -> None:
        # -0 is 0, where a slice of all rows begins. As the input has an initializer, sessions needn't give it.
        self.constant(KEEP, [0])
        far = self.constant("constants.far", [np.iinfo(np.int64).max])
        axis = self.constant("constants.sequence_axis", [1])
        first = self.node("Neg", "lm_head.first_row", [KEEP])
        x = self.node("Slice", "lm_head.rows", [self.norm("model.norm"), first, far, axis])
        if self.options.head == "fp32":
            self.node("MatMul", "lm_head", [x, "lm_head.weight"], ["logits"])
            return
        if self.options.head == "1bit":
            n, k = self.config.vocab_size, self.config.hidden_size
            if not self.ours:
                self.stock(HEAD, x, n, k, "logits")
                return
            inputs = [x, *self.matrix(HEAD), f"{HEAD}.bias"]
            self.binary(OP_TYPE, HEAD, inputs, ["logits"], K=k, N=n)
            return
        if self.options.unfolded:
            n, k = self.config.vocab_size, self.config.hidden_size
            matrix = unfolded_head(self, HEAD, n=n, k=k, bits=CODE_BITS[self.options.head])
            self.node("MatMul", HEAD, [x, matrix], ["logits"])
            return
        self.node(
            "MatMulNBits",
            "lm_head",
            [x, "lm_head.tiles"] if self.ours else [x, "lm_head.codes", "lm_head.scales"],
            ["logits"],
            DOMAIN if self.ours else CONTRIB,
            K=self.config.hidden_size,
            N=self.config.vocab_size,
            bits=CODE_BITS[self.options.head],
            block_size=HEAD_BLOCK,
            accuracy_level=ACCURACY_LEVELS[self.options.accuracy_level],
        )
