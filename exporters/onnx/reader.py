"""`open_onnx`: reads a model file of ours back as Weights, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx  # noqa: TID253
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import AttributeProto, ModelProto, TensorProto  # noqa: TID253

from fbiedge.bits import untile_bits
from fbiedge.config import BLOCK_SIZE, ModelConfig, ScalingPattern
from fbiedge.errors import ModelFileError
from fbiedge.model_file import external_place
from fbiedge.weights import BinaryLinear, Weights

from .fallback import DOMAIN, OP_TYPE
from .fallback_fused import QKV, SWIGLU
from .head import BLOCK as HEAD_BLOCK
from .head import GROUP as HEAD_GROUP
from .head import SCALE_BYTES, QuantizedRows, dequantize_stock, rows_from_stock, rows_from_tiles, tile_group_bytes
from .metadata import read_metadata
from .sources import untile_scales
from .stock import CODES, code_bits, packed_signs
from .vocabulary import EMBEDDING, HEAD

# Operator -> its nodes, named by what follows the layer -> the linears that its attributes N… are the rows of. A node
# of one linear is named like it.
_LINEARS_OF: dict[str, dict[str, dict[str, str]]] = {
    OP_TYPE: {},
    QKV: {"self_attn.qkv_proj": {f"N_{part}": f"self_attn.{part}_proj" for part in "qkv"}},
    SWIGLU: {"mlp.gate_up_proj": {"N": "mlp.gate_proj"}},
}
_DTYPES: dict[int, np.dtype[Any]] = {
    TensorProto.FLOAT: np.dtype("<f4"),
    TensorProto.FLOAT16: np.dtype("<f2"),
    TensorProto.UINT8: np.dtype("u1"),
}


def open_onnx(path: Path) -> Weights:
    """Open a model file of ours. A quantised head and fp16 scales are read as the values the model computes with.

    Raises ModelFileError: no such file, not ONNX, not ours, truncated, inconsistent, or external data missing or short.
    """
    path = Path(path)
    model = load_model(path)
    _require_text(path, model)
    config, files = read_metadata({entry.key: entry.value for entry in model.metadata_props}, path)
    _check_nodes(path, model, config)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for tensor in tensors.values():
        _check_storage(path, tensor)
    return OnnxWeights(config=config, files=files, path=path, tensors=tensors)


def load_model(path: Path) -> ModelProto:
    """The model without its external data. Raises ModelFileError where that fails."""
    try:
        model = onnx.load(str(path), load_external_data=False)
    except FileNotFoundError as error:
        raise ModelFileError(f"{path} doesn't exist; expected a model.onnx") from error
    except OSError as error:
        raise ModelFileError(f"can't read {path}: {error.strerror or error}") from error
    except (DecodeError, ValueError) as error:
        raise ModelFileError(f"{path} is not an ONNX file, or is truncated; export it again") from error
    if not model.graph.node:
        raise ModelFileError(f"{path} is not an ONNX file, or is truncated: it holds no graph; export it again")
    return model


def _require_text(path: Path, model: ModelProto) -> None:
    """Texts must be UTF-8: protobuf's parser lets others through, as bytes."""
    entries = [*model.metadata_props, *(entry for tensor in model.graph.initializer for entry in tensor.external_data)]
    texts = [text for entry in entries for text in (entry.key, entry.value)]
    texts += [tensor.name for tensor in model.graph.initializer]
    for node in model.graph.node:
        texts += [node.name, node.op_type, node.domain, *(attribute.name for attribute in node.attribute)]
    if not all(isinstance(text, str) for text in texts):
        raise ModelFileError(f"{path} is damaged: it holds text that is not UTF-8; export it again")


@dataclass(frozen=True, kw_only=True)
class OnnxWeights:
    """Weights read from a model file; make one with `open_onnx`."""

    config: ModelConfig
    files: Mapping[str, str]
    path: Path
    tensors: Mapping[str, TensorProto]

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """See Weights."""
        vocab, hidden = self.config.vocab_size, self.config.hidden_size
        if name == f"{HEAD}.weight":
            if (rows := self.binary_head()) is not None:
                return rows.dense()
            if "lm_head.tiles" in self.tensors:
                bits, tiles = self._head_tiles()
                return rows_from_tiles(tiles, bits, vocab, hidden).dequantize(hidden)
            if "lm_head.codes" in self.tensors:
                return dequantize_stock(*self._stock_head(), hidden)
            return np.ascontiguousarray(self._read(name, (hidden, vocab)).T)
        if name == f"{EMBEDDING}.weight":
            if (rows := self.binary_embedding()) is not None:
                return rows.dense()
            if f"{EMBEDDING}.codes" in self.tensors:
                return dequantize_stock(*self._packed_embedding(), hidden)
            if name not in self.tensors and self.config.tie_word_embeddings:
                return self.tensor(f"{HEAD}.weight")
            return self._read(name, (vocab, hidden)).astype(np.float32, copy=False)
        is_of_head = name.endswith(("q_norm.weight", "k_norm.weight"))
        return self._read(name, (self.config.head_dim if is_of_head else hidden,))

    def linear(self, name: str) -> BinaryLinear | npt.NDArray[np.float32]:
        """See Weights."""
        n, k = self.config.linear_shapes()[name.split(".", 3)[3]]
        pattern = self.config.scaling_pattern
        if pattern == "none":
            return np.ascontiguousarray(self._read(f"{name}.weight", (k, n)).T)
        return self._binary(name, n, k, pattern)

    def scales(self, name: str) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32] | None]:
        """See HasScales."""
        n, k = self.config.linear_shapes()[name.split(".", 3)[3]]
        return self._scales(name, n, k, self.config.scaling_pattern)

    def binary_embedding(self) -> BinaryLinear | None:
        """See HasBinaryRows. Where a model has none of its own, it looks its rows up in the head."""
        for name in (EMBEDDING, HEAD):
            if f"{EMBEDDING}.weight" not in self.tensors and f"{name}.bits" in self.tensors:
                return self._binary(name, self.config.vocab_size, self.config.hidden_size, "block")
        return None

    def binary_head(self) -> BinaryLinear | None:
        """See HasBinaryRows."""
        if f"{HEAD}.bits" not in self.tensors and f"{HEAD}.{CODES}" not in self.tensors:
            return None
        return self._binary(HEAD, self.config.vocab_size, self.config.hidden_size, "block")

    def quantized_head(self, bits: int) -> QuantizedRows | None:
        """See HasQuantizedRows: a head that goes into another file of the same precision is copied."""
        head = None
        if "lm_head.tiles" in self.tensors:
            stored, tiles = self._head_tiles()
            head = rows_from_tiles(tiles, stored, self.config.vocab_size, self.config.hidden_size)
        elif "lm_head.codes" in self.tensors:
            head = rows_from_stock(*self._stock_head())
        return head if head is not None and head.bits == bits else None

    def quantized_embedding(self, bits: int) -> QuantizedRows | None:
        """See HasQuantizedRows. Where a model has none of its own, it looks its rows up in the head."""
        if f"{EMBEDDING}.codes" in self.tensors:
            rows = rows_from_stock(*self._packed_embedding())
            return rows if rows is not None and rows.bits == bits else None
        return None if f"{EMBEDDING}.weight" in self.tensors else self.quantized_head(bits)

    def _binary(self, name: str, n: int, k: int, pattern: ScalingPattern) -> BinaryLinear:
        alpha, beta = self._scales(name, n, k, pattern)
        if f"{name}.{CODES}" in self.tensors:
            packed = packed_signs(self._codes(name, n, k), k, f"{self.path}: {name}")
            return BinaryLinear(packed=packed, n=n, k=k, pattern=pattern, alpha=alpha, beta=beta, zeros=0)
        packed = untile_bits(self._read(f"{name}.bits", (-(-n // 16), -(-k // 32), 64)), n, k)
        return BinaryLinear(packed=packed, n=n, k=k, pattern=pattern, alpha=alpha, beta=beta, zeros=0)

    def _scales(
        self, name: str, n: int, k: int, pattern: ScalingPattern
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32] | None]:
        """Alpha and, but for `block`, beta."""
        if pattern == "block" and f"{name}.{CODES}" in self.tensors:
            groups = -(-k // BLOCK_SIZE)
            return self._read(f"{name}.scales", (n * groups,)).reshape(n, groups), None
        if pattern == "block":
            return untile_scales(self._read(f"{name}.alpha", (-(-n // 16), -(-k // BLOCK_SIZE), 16)), n), None
        shape = {"column": (k,), "row": (n,), "single": (1,)}[pattern]
        return self._read(f"{name}.alpha", shape), self._read(f"{name}.beta", shape)

    def _codes(self, name: str, n: int, k: int) -> npt.NDArray[np.uint8]:
        bits = code_bits(self.tensors[f"{name}.{CODES}"].dims[-1])
        return self._read(f"{name}.{CODES}", (n, -(-k // BLOCK_SIZE), BLOCK_SIZE * bits // 8))

    def _head_tiles(self) -> tuple[int, npt.NDArray[np.uint8]]:
        """Bits and tiles."""
        vocab, hidden = self.config.vocab_size, self.config.hidden_size
        group_bytes = self.tensors["lm_head.tiles"].dims[-1]
        bits = 4 if group_bytes == tile_group_bytes(4) else 8
        shape = (-(-vocab // 16), -(-hidden // HEAD_GROUP), tile_group_bytes(bits))
        tiles = self._read("lm_head.tiles", shape)
        self._require_finite("lm_head.tiles", np.ascontiguousarray(tiles[..., :SCALE_BYTES]).view("<f2"))
        return bits, tiles

    def _stock_head(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32], int]:
        """Codes, scales and bits."""
        vocab, blocks = self.config.vocab_size, -(-self.config.hidden_size // HEAD_BLOCK)
        bits = 4 if self.tensors["lm_head.codes"].dims[-1] == HEAD_BLOCK // 2 else 8
        codes = self._read("lm_head.codes", (vocab, blocks, HEAD_BLOCK * bits // 8))
        return codes, self._read("lm_head.scales", (vocab * blocks,)), bits

    def _packed_embedding(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32], int]:
        """Codes, scales and bits."""
        vocab, blocks = self.config.vocab_size, -(-self.config.hidden_size // HEAD_BLOCK)
        bits = 4 if self.tensors[f"{EMBEDDING}.codes"].dims[-1:] == [HEAD_BLOCK // 2] else 8
        codes = self._read(f"{EMBEDDING}.codes", (vocab, blocks, HEAD_BLOCK * bits // 8))
        return codes, self._read(f"{EMBEDDING}.scales", (vocab, blocks)).astype(np.float32), bits

    @property
    def paths(self) -> set[Path]:
        """The files that are read while the weights are in use."""
        external = (tensor for tensor in self.tensors.values() if tensor.data_location == TensorProto.EXTERNAL)
        return {self.path} | {_external(self.path, tensor)[0] for tensor in external}

    def _read(self, name: str, shape: tuple[int, ...] | None = None) -> npt.NDArray[Any]:
        if name not in self.tensors:
            raise ModelFileError(f"{self.path} lacks the tensor {name}; export it again")
        tensor = self.tensors[name]
        dims = tuple(tensor.dims)
        if shape is not None and dims != shape:
            raise self._wrong(name, dims, shape)
        dtype = _DTYPES[tensor.data_type]
        if tensor.data_location != TensorProto.EXTERNAL:
            array = np.frombuffer(tensor.raw_data, dtype)
        else:
            location, offset, _ = _external(self.path, tensor)
            try:
                array = np.fromfile(location, dtype, count=prod(dims), offset=offset)
            except OSError as error:
                raise ModelFileError(f"can't read {location}: {error.strerror or error}") from error
        self._require_finite(name, array)
        return array.reshape(dims)

    def _require_finite(self, name: str, numbers: npt.NDArray[Any]) -> None:
        # min and max carry every NaN and Inf without a boolean copy of the tensor.
        if numbers.dtype.kind == "f" and not (np.isfinite(numbers.min()) and np.isfinite(numbers.max())):
            raise ModelFileError(f"{self.path}: the tensor {name} holds NaN or Inf; it is damaged, export it again")

    def _wrong(self, name: str, got: tuple[int, ...], expected: tuple[int, ...]) -> ModelFileError:
        return ModelFileError(f"{self.path}: {name} has shape {got}, expected {expected} by its config")


def _check_nodes(path: Path, model: ModelProto, config: ModelConfig) -> None:
    """Every node of binary linears must have the sizes and the form that the config gives them."""
    for node in model.graph.node:
        if node.domain != DOMAIN or node.op_type not in _LINEARS_OF:
            continue
        attributes = {attribute.name: _plain(attribute) for attribute in node.attribute}
        expected = _expected_attributes(node.op_type, node.name, config)
        if expected is None:
            raise ModelFileError(f"{path}: by its config there is no node {node.name} of type {node.op_type}")
        got = {name: attributes.get(name) for name in expected}
        if got != expected:
            raise ModelFileError(
                f"{path}: the node {node.name} has {', '.join(expected)} {_values(got)}, "
                f"expected {_values(expected)} by its config"
            )


def _expected_attributes(op_type: str, name: str, config: ModelConfig) -> dict[str, Any] | None:
    """What the config says of a node; None where it has no such node."""
    if (op_type, name) == (OP_TYPE, HEAD):
        return {"N": config.vocab_size, "K": config.hidden_size, "scale_form": config.scaling_pattern}
    name = ".".join(name.split(".")[3:])
    shapes = config.linear_shapes()
    linears = _LINEARS_OF[op_type].get(name, {"N": name} if op_type == OP_TYPE else {})
    if not linears or any(linear not in shapes for linear in linears.values()):
        return None
    sizes = {attribute: shapes[linear][0] for attribute, linear in linears.items()}
    (k,) = {shapes[linear][1] for linear in linears.values()}
    return {**sizes, "K": k, "scale_form": config.scaling_pattern}


def _plain(attribute: AttributeProto) -> int | str | None:
    """The value of an attribute of the types that these nodes have."""
    match attribute.type:
        case AttributeProto.INT:
            return int(attribute.i)
        case AttributeProto.STRING:
            return str(attribute.s.decode(errors="replace"))
    return None


def _values(attributes: Mapping[str, Any]) -> str:
    return ", ".join(repr(value) for value in attributes.values())


def _check_storage(path: Path, tensor: TensorProto) -> None:
    """The bytes of a tensor must be there, all of them."""
    if tensor.data_type == TensorProto.INT64 or tensor.name.startswith("constants."):
        return  # of the graph, never read as weights
    if tensor.data_type not in _DTYPES:
        raise ModelFileError(f"{path}: {tensor.name} has ONNX data type {tensor.data_type}, which fbiedge never writes")
    wanted = prod(tensor.dims) * _DTYPES[tensor.data_type].itemsize
    if tensor.data_location != TensorProto.EXTERNAL:
        held = len(tensor.raw_data)
    else:
        location, offset, held = _external(path, tensor)
        try:
            size = location.stat().st_size
        except OSError as error:
            raise ModelFileError(f"{path} needs {location.name} beside it: {error.strerror or error}") from error
        if size < offset + held:
            raise ModelFileError(
                f"{location} has {size} bytes, but {tensor.name} ends at {offset + held}; it is truncated: copy it again"
            )
    if held != wanted:
        raise ModelFileError(f"{path}: {tensor.name} holds {held} bytes, expected {wanted} for {tuple(tensor.dims)}")


def _external(path: Path, tensor: TensorProto) -> tuple[Path, int, int]:
    """File, offset and length of external data."""
    try:
        location, offset, length = external_place({entry.key: entry.value for entry in tensor.external_data})
    except ValueError as error:
        raise ModelFileError(f"{path}: {tensor.name} {error}; export it again") from error
    return path.with_name(location), offset, length
