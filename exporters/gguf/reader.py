"""`open_gguf`: the model in a GGUF file as Weights, tensor by tensor from the mapped file.

Linears of type Q1_0 are binary with pattern `block`: their bits are copied out of the blocks, never unpacked. With the
adapter that our exporter wrote beside a model of ours they come back as what they were exported from (beta.py). In a
file without Q1_0 every linear is dense, pattern `none`. What our exporter padded is cut off, and llama.cpp's order of
the rows of q and k is undone:

    a head of D rows in a `llama` file      0, D/2, 1, D/2 + 1, …      llama.cpp rotates neighbours,
    here and in a `qwen3` file              0, 1, …, D - 1             we row i with row i + D/2
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fbiedge.config import BLOCK_SIZE, ModelConfig, ScalingPattern
from fbiedge.errors import ModelFileError
from fbiedge.gguf_file import GgufFile, metadata_value
from fbiedge.gguf_model import (
    ROPE_FACTORS,
    config_from_gguf,
    files_from_gguf,
    find_adapter,
    gguf_name,
    missing_adapter,
)
from fbiedge.gguf_tensors import dequantize, q1_0_bits, q1_0_scales, require_readable
from fbiedge.weights import BinaryLinear, expected_shapes

from .beta import BEFORE, Adapter, column_rows, column_scales, row_scales

Vector = npt.NDArray[np.float32]

# What a model with an adapter comes back as, by its fbiedge.scaling_pattern.
_WITH_ADAPTER: dict[str, ScalingPattern] = {"column": "column", "row": "row", "single": "row"}


def open_gguf(path: Path) -> GgufWeights:
    """Open a model.gguf, and the model.beta.gguf beside it. Names, shapes and types are checked before data is read.

    Raises ModelFileError: not a whole GGUF file, another architecture, tensors that are missing, that a model of its
    shape doesn't have or whose type isn't read, layers of which only a part is binary, an adapter of another model.
    """
    file = GgufFile.open(path)
    config = config_from_gguf(file)
    files = files_from_gguf(file)
    stored = _stored_shapes(file, config)
    _check_tensors(file, config, stored)
    tokens = len(file.metadata["tokenizer.ggml.tokens"]) if "tokenizer.json" in files else 0
    if tokens > config.vocab_size:
        raise ModelFileError(
            f"{file.path} has {tokens} tokens, but token_embd.weight has {config.vocab_size} rows; expected as many"
        )
    adapter = None
    if (path_beside := find_adapter(file)) is not None:
        beside = GgufFile.open(path_beside)
        adapter = Adapter.of(beside, {gguf_name(name): shape for name, shape in stored.items() if "_proj." in name})
        config = replace(config, scaling_pattern=_pattern_with_adapter(file, beside))
    elif missing := missing_adapter(file, path_beside):
        raise ModelFileError(f"{file.path}: {missing}; copy them along")
    return GgufWeights(config=config, files=files, file=file, adapter=adapter)


@dataclass(frozen=True, kw_only=True)
class GgufWeights:
    """Weights in a GGUF file; make them with `open_gguf`."""

    config: ModelConfig
    files: Mapping[str, str]
    file: GgufFile
    adapter: Adapter | None

    def tensor(self, name: str) -> Vector:
        """See Weights. A tied `lm_head.weight` is the embedding. Raises ModelFileError on NaN or Inf."""
        return self._dense(self._present(name))

    def linear(self, name: str) -> BinaryLinear | Vector:
        """See Weights. Raises ModelFileError on NaN or Inf, and for an adapter that fits no pattern."""
        n, k = self._true_shape(name)
        if self.config.scaling_pattern == "none":
            return np.ascontiguousarray(self._dense(f"{name}.weight")[self._rows(name)][:n, :k])
        alpha, beta = self.scales(name)
        stored = self.file.tensors[gguf_name(f"{name}.weight")]
        packed = q1_0_bits(stored, self.file.data(stored.name))[self._rows(name)][:n, : -(-k // 8)]
        if k % 8:
            packed[:, -1] &= (1 << k % 8) - 1  # padding bits are 0
        pattern = self.config.scaling_pattern
        packed = np.ascontiguousarray(packed)
        return BinaryLinear(packed=packed, n=n, k=k, pattern=pattern, alpha=alpha, beta=beta, zeros=0)

    def scales(self, name: str) -> tuple[Vector, Vector | None]:
        """See HasScales."""
        d, (_, k) = self._scales(name), self._true_shape(name)
        if self.adapter is None:
            return d, None
        term = self._term(name)
        if self.config.scaling_pattern == "row":
            return row_scales(d, term, name)
        layer, _, linear = name.removeprefix("model.layers.").partition(".")
        before = None
        if linear in BEFORE:
            other = f"model.layers.{layer}.{BEFORE[linear]}"
            before = column_rows(self._scales(other), self._term(other), other)
        return column_scales(column_rows(d, term, name), term, before, self.config, name, k)

    def binary_embedding(self) -> BinaryLinear | None:
        """The embedding [vocabulary, hidden] where the file holds it as Q1_0."""
        return self._binary_table("model.embed_tokens.weight")

    def binary_head(self) -> BinaryLinear | None:
        """The head [vocabulary, hidden], which may be the embedding, where the file holds it as Q1_0."""
        return self._binary_table(self._present("lm_head.weight"))

    @property
    def paths(self) -> set[Path]:
        """The files that are read while the weights are in use."""
        return {self.file.path} if self.adapter is None else {self.file.path, self.adapter.file.path}

    def _present(self, name: str) -> str:
        tied = name == "lm_head.weight" and self.config.tie_word_embeddings
        return "model.embed_tokens.weight" if tied else name

    def _true_shape(self, name: str) -> tuple[int, int]:
        return self.config.linear_shapes()[name.split(".", 3)[3]]

    def _dense(self, name: str) -> Vector:
        tensor = self.file.tensors[gguf_name(name)]
        values = dequantize(tensor, self.file.data(tensor.name))
        self._require_finite(values, tensor.name)
        return values

    def _binary_table(self, name: str) -> BinaryLinear | None:
        tensor = self.file.tensors[gguf_name(name)]
        if tensor.ggml_type != "Q1_0":
            return None
        raw = self.file.data(tensor.name)
        d = q1_0_scales(tensor, raw)
        self._require_finite(d, tensor.name)
        n, k = tensor.shape
        return BinaryLinear(packed=q1_0_bits(tensor, raw), n=n, k=k, pattern="block", alpha=d, beta=None, zeros=0)

    def _scales(self, name: str) -> Vector:
        """d of a binary linear [N, ceil(K/128)], in our order and without what was padded."""
        n, k = self._true_shape(name)
        tensor = self.file.tensors[gguf_name(f"{name}.weight")]
        d = q1_0_scales(tensor, self.file.data(tensor.name))[self._rows(name)]
        self._require_finite(d, tensor.name)
        if d[n:].any():
            raise ModelFileError(f"{self.file.path}: {tensor.name} isn't 0 beyond the {n} rows that are no padding")
        return np.ascontiguousarray(d[:n, : -(-k // BLOCK_SIZE)])

    def _term(self, name: str) -> tuple[Vector, Vector] | None:
        """The adapter's a [K] and b [N] of a linear, in our order and without what was padded."""
        term = None if self.adapter is None else self.adapter.term(gguf_name(f"{name}.weight"))
        if term is None:
            return None
        n, k = self._true_shape(name)
        return term[0][:k], term[1][self._rows(name)][:n]

    def _rows(self, name: str) -> slice | npt.NDArray[np.intp]:
        """Which of the file's rows are ours, in order."""
        heads = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}
        count = heads.get(name.rpartition(".")[2])
        if self.config.model_type != "llama" or count is None:
            return slice(None)
        pairs = np.arange(count * self.config.head_dim).reshape(count, -1, 2)  # [head, pair, half]
        order: npt.NDArray[np.intp] = pairs.transpose(0, 2, 1).reshape(-1)
        return order

    def _require_finite(self, values: Vector, name: str) -> None:
        # min and max carry every NaN and Inf without a boolean copy of the tensor.
        if not (np.isfinite(values.min()) and np.isfinite(values.max())):
            raise ModelFileError(f"{self.file.path}: the tensor {name} holds NaN or Inf; expected finite numbers")


def _pattern_with_adapter(file: GgufFile, adapter: GgufFile) -> ScalingPattern:
    """What the weights were before the export. Raises ModelFileError where that is lost."""
    stated = metadata_value(file.metadata, "fbiedge.scaling_pattern", str)
    if file.metadata.get("fbiedge.exact") is not True:
        raise ModelFileError(
            f"{file.path} and {adapter.path.name} are a lossy export, which has no scales of one pattern; "
            "start from the checkpoint that they were made of"
        )
    if stated not in _WITH_ADAPTER:
        raise ModelFileError(
            f"{file.path} has an adapter and the pattern {stated!r}, expected {', '.join(_WITH_ADAPTER)}"
        )
    return _WITH_ADAPTER[stated]


def _stored_shapes(file: GgufFile, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor by its official name, padded as in the file. Raises ModelFileError."""
    padded = file.metadata[f"{config.model_type}.feed_forward_length"]
    padded = padded if isinstance(padded, int) else int(padded[0])
    if not 0 <= padded - config.intermediate_size < BLOCK_SIZE:
        raise ModelFileError(
            f"{file.path}: fbiedge.feed_forward_length is {config.intermediate_size} in a file of {padded}; "
            f"expected at most {BLOCK_SIZE - 1} less"
        )
    return expected_shapes(replace(config, scaling_pattern="none", intermediate_size=padded))


def _check_tensors(file: GgufFile, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Every tensor of the model must be there, no other, all of types that are read. Raises ModelFileError."""
    parts = file.metadata.get("split.count", 0)
    if isinstance(parts, int) and parts > 1:
        raise ModelFileError(
            f"{file.path} is one of {parts} parts of a model; join them first (llama-gguf-split --merge)"
        )
    unknown = dict.fromkeys(file.tensors)
    unknown.pop(ROPE_FACTORS, None)
    for official, shape in shapes.items():
        name = gguf_name(official)
        tensor = file.tensors.get(name)
        if tensor is None:
            raise ModelFileError(f"{file.path} lacks the tensor {name}; get it again or convert the model again")
        if tensor.shape != shape:
            raise ModelFileError(f"{file.path}: {name} has shape {tensor.shape}, expected {shape} by its metadata")
        if config.scaling_pattern == "block" and "_proj." in official and tensor.ggml_type != "Q1_0":
            raise ModelFileError(
                f"{file.path}: {name} has type {tensor.ggml_type}, expected Q1_0 as in other layers of this file"
            )
        try:
            require_readable(tensor)
        except ModelFileError as error:
            raise ModelFileError(f"{file.path}: {error}") from error
        del unknown[name]
    if unknown:
        raise ModelFileError(
            f"{file.path} holds {next(iter(unknown))}, which a {config.model_type} of its shape doesn't have"
        )
