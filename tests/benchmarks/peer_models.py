"""Models of one shape with random weights for every engine that `make bench-peers` compares, written without a checkpoint.

    ours              fbiedge's own export
    stock-2, stock-4  stock ONNX Runtime: the same graph with MatMulNBits of 2 or 4 bits in place of BinaryMatMul

The stock models hold signs and one scale per output row and 128 inputs, which is what MatMulNBits can hold with the
fewest bytes: scales per input, as FBI-LLM has them, would cost a multiplication more. Head, embedding, attention and
norms are ours, bit for bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import helper

from fbiedge.config import BLOCK_SIZE, ModelConfig
from fbiedge.exporters.onnx.fallback import DOMAIN, OP_TYPE, OPSET
from fbiedge.exporters.onnx.graph import CONTRIB, build_graph
from fbiedge.exporters.onnx.metadata import make_metadata
from fbiedge.exporters.onnx.options import ACCURACY_LEVELS, ExportOptions
from fbiedge.exporters.onnx.plan import Losses, plan_tensors
from fbiedge.exporters.onnx.sources import Source, TensorSpec, inventory
from fbiedge.exporters.onnx.writer import write_model
from fbiedge.weights import BinaryLinear, Weights


@dataclass(frozen=True)
class RandomWeights:
    """Weights of `config`, drawn when they are read; the same every time."""

    config: ModelConfig
    files: Mapping[str, str] = field(default_factory=dict)

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """Norms are 1, tables normal(0, 0.02)."""
        if name.endswith("norm.weight"):
            return np.ones(self.config.hidden_size, np.float32)
        shape = (self.config.vocab_size, self.config.hidden_size)
        return _generator(name).standard_normal(shape, np.float32) * np.float32(0.02)

    def linear(self, name: str) -> BinaryLinear:
        """Random signs; scales about as large as FBI-LLM's, so that activations neither vanish nor overflow."""
        n, k = self.config.linear_shapes()[name.split(".", 3)[3]]
        pattern, generator = self.config.scaling_pattern, _generator(name)
        shape = {"column": (k,), "row": (n,), "single": (1,), "block": (n, -(-k // BLOCK_SIZE))}[pattern]
        packed = np.frombuffer(generator.bytes(n * (-(-k // 8))), np.uint8).reshape(n, -1).copy()
        if k % 8:
            packed[:, -1] &= (1 << k % 8) - 1  # padding bits are 0
        alpha = generator.uniform(0.01, 0.03, shape).astype(np.float32)
        beta = None if pattern == "block" else generator.normal(0, 1e-4, shape).astype(np.float32)
        return BinaryLinear(packed=packed, n=n, k=k, pattern=pattern, alpha=alpha, beta=beta, zeros=0)


def write_stock_onnx(weights: Weights, out: Path, *, bits: int, options: ExportOptions | None = None) -> None:
    """Write block-scaled `weights` for ONNX Runtime without our library, `bits` (2 or 4) a weight."""
    config, options = weights.config, replace(options or ExportOptions(), operators="stock")
    if config.scaling_pattern != "block":
        raise ValueError(f"scaling_pattern is {config.scaling_pattern!r}, expected 'block'")
    graph = build_graph(config, options, fused=False)
    for node in graph.node:
        if (node.domain, node.op_type) != (DOMAIN, OP_TYPE):
            continue
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        node.op_type, node.domain = "MatMulNBits", CONTRIB
        del node.attribute[:], node.input[1:]
        node.input.extend([f"{node.name}.codes", f"{node.name}.scales"])
        settings = {
            "K": attributes["K"], "N": attributes["N"], "bits": bits, "block_size": BLOCK_SIZE,
            "accuracy_level": ACCURACY_LEVELS[options.accuracy_level],
        }  # fmt: skip
        node.attribute.extend(helper.make_attribute(name, value) for name, value in settings.items())
    sources = [_stock_source(weights, source, bits) for source in plan_tensors(weights, options, Losses())]
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    specs = [spec for source in sources for spec in source.specs]
    helper.set_model_props(model, make_metadata(config, weights.files, options, inventory(specs)))
    write_model(model, sources, out)


def _stock_source(weights: Weights, source: Source, bits: int) -> Source:
    """A binary linear as codes [N, K/128, 16 · bits] and float32 scales [N · K/128]; anything else as it is."""
    first = source.specs[0]
    if not first.name.endswith(".bits"):
        return source
    name = first.name.removesuffix(".bits")
    n, k = weights.config.linear_shapes()[name.split(".", 3)[3]]
    groups = -(-k // BLOCK_SIZE)

    def spec(suffix: str, dtype: str, shape: tuple[int, ...], parameters: int) -> TensorSpec:
        return TensorSpec(
            name=f"{name}.{suffix}", dtype=dtype, shape=shape, group=first.group, form=f"{bits}-bit block",
            parameters=parameters,
        )  # fmt: skip

    codes = spec("codes", "uint8", (n, groups, BLOCK_SIZE * bits // 8), n * k)
    scales = spec("scales", "float32", (n * groups,), 0)

    def read() -> list[npt.NDArray[Any]]:
        linear = weights.linear(name)
        assert isinstance(linear, BinaryLinear)
        return [sign_codes(linear.packed, k, bits).reshape(codes.shape), linear.alpha.reshape(-1)]

    return Source(specs=(codes, scales), read=read)


def sign_codes(packed: npt.NDArray[np.uint8], k: int, bits: int) -> npt.NDArray[np.uint8]:
    """Plain sign bits [N, ceil(K/8)] -> MatMulNBits' codes, zero point ± 1, low bits first: [N, ceil(K/128) · 16 · bits].

    Padding has the zero point, which is 0.
    """
    zero = 1 << (bits - 1)
    signs = np.unpackbits(packed, axis=1, count=k, bitorder="little")
    codes = np.full((len(packed), -(-k // BLOCK_SIZE) * BLOCK_SIZE), zero, np.uint8)
    codes[:, :k] += 2 * signs - 1  # wraps: + 255 is - 1
    per_byte = 8 // bits
    whole = codes.reshape(len(packed), -1, per_byte) << np.arange(0, 8, bits, dtype=np.uint8)
    return np.asarray(np.bitwise_or.reduce(whole, axis=2), np.uint8)


def parameters(config: ModelConfig) -> int:
    """Weights of a model, for the headline."""
    linears = config.num_hidden_layers * sum(prod(shape) for shape in config.linear_shapes().values())
    return linears + 2 * config.vocab_size * config.hidden_size


def tensor_names(config: ModelConfig) -> Iterator[str]:
    """Every linear of `config`."""
    for layer in range(config.num_hidden_layers):
        for name in config.linear_shapes():
            yield f"model.layers.{layer}.{name}"


def _generator(name: str) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64(int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")))
