"""Weights of a checkpoint, streamed: one tensor in memory at a time. Reads and writes the official FBI-LLM form.

The form: config.json, and safetensors (one file, or shards with an index) or pytorch_model*.bin, with Hugging Face's
names of a Llama or a Qwen3. Each linear below `model.layers.` has `weight` [N, K] (latent; only its signs count),
`wscale` and `wbias`:

    W_eff[n, k] = alpha · sign(W[n, k]) + beta         sign(0) = +1
    column: alpha, beta [1, K]    row: [N, 1]    single: [1]    block: alpha [N, ceil(K/128)] and no beta

A checkpoint without any `wscale` is an ordinary full-precision Llama, pattern `none`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import numpy.typing as npt

from .bits import SIGNS_OF_BYTE, pack_bits
from .config import BLOCK_SIZE, ModelConfig, ScalingPattern
from .errors import CheckpointError
from .files import atomic_directory, require_only, require_utf8
from .model_file import load_json
from .tensor_store import TensorStore, open_store, read_json

SIDECARS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
)


@dataclass(frozen=True, kw_only=True)
class BinaryLinear:
    """One binary linear [N, K]: sign bits and the scales its pattern shares."""

    packed: npt.NDArray[np.uint8]  # plain packing [N, ceil(K/8)], see fbiedge.bits
    n: int
    k: int
    pattern: ScalingPattern
    alpha: npt.NDArray[np.float32]  # column (K,), row (N,), single (1,), block (N, ceil(K/128))
    beta: npt.NDArray[np.float32] | None  # the shape of alpha; None for block
    zeros: int  # latent weights that were exactly 0, mapped to +1

    def dense(self) -> npt.NDArray[np.float32]:
        """W_eff float32 [N, K] = alpha · sign + beta."""
        signs = np.take(SIGNS_OF_BYTE, self.packed, axis=0).reshape(self.n, -1)
        signs = np.ascontiguousarray(signs[:, : self.k])
        alpha, beta = self.alpha, self.beta  # (K,) and (1,) broadcast along the rows as they are
        if self.pattern == "block":
            if self.k % BLOCK_SIZE:
                signs *= np.repeat(alpha, BLOCK_SIZE, axis=1)[:, : self.k]
            else:
                by_group = signs.reshape(self.n, -1, BLOCK_SIZE)  # a view
                by_group *= alpha[..., None]
            return signs
        if self.pattern == "row":
            alpha, beta = alpha[:, None], None if beta is None else beta[:, None]
        signs *= alpha
        if beta is not None:
            signs += beta
        return signs

    def rows(self, which: slice | npt.NDArray[np.int64]) -> BinaryLinear:
        """Some of the rows."""
        packed = self.packed[which]
        by_row = self.pattern in ("row", "block")
        alpha = self.alpha[which] if by_row else self.alpha
        beta = self.beta[which] if by_row and self.beta is not None else self.beta
        return replace(self, packed=packed, n=len(packed), alpha=alpha, beta=beta, zeros=0)


class Weights(Protocol):
    """A model's weights; every call reads one tensor."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def files(self) -> Mapping[str, str]:
        """Texts of the files in SIDECARS that are present, by file name."""
        ...

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """A full-precision tensor by its official name, e.g. `model.norm.weight` [hidden]."""
        ...

    def linear(self, name: str) -> BinaryLinear | npt.NDArray[np.float32]:
        """A decoder linear, e.g. `model.layers.0.mlp.up_proj`; dense [N, K] where the pattern is `none`."""
        ...


@runtime_checkable
class HasScales(Protocol):
    """Weights whose scales can be read without the bits beside them."""

    def scales(self, name: str) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32] | None]:
        """alpha and beta of a binary linear, as in BinaryLinear."""
        ...


@runtime_checkable
class HasBinaryRows(Protocol):
    """Weights whose embedding or head may be 1 bit too, [vocab, hidden] with pattern `block`; `tensor` gives them dense."""

    def binary_embedding(self) -> BinaryLinear | None: ...

    def binary_head(self) -> BinaryLinear | None:
        """A tied head is the embedding."""
        ...


def open_checkpoint(path: Path) -> Weights:
    """Open a checkpoint folder. All names and shapes are checked here, from the headers, before any data is read.

    Raises CheckpointError: no such folder, unreadable config.json or weights, missing, extra or wrongly shaped tensors,
    or scales that contradict config.json.
    """
    path = Path(path)
    require_utf8(path, CheckpointError)
    if not path.is_dir():
        what = "is a file" if path.exists() else "doesn't exist"
        raise CheckpointError(f"{path} {what}; expected a checkpoint folder with config.json and weights")
    raw = read_json(path / "config.json")
    config = ModelConfig.from_dict(raw)
    store = open_store(path)
    pattern = infer_scaling_pattern(store.shapes)
    stated = raw.get("scaling_pattern")
    if stated is not None and stated != pattern:
        raise CheckpointError(
            f"{path}: config.json says scaling_pattern {stated!r}, but the scales stored have the form {pattern!r}"
        )
    config = replace(config, scaling_pattern=pattern)
    _check_shapes(path, store.shapes, config)
    return Checkpoint(config=config, files=read_sidecars(path), store=store)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Weights read from a checkpoint folder; make one with `open_checkpoint`."""

    config: ModelConfig
    files: Mapping[str, str]
    store: TensorStore

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """See Weights. A tied `lm_head.weight` is the embedding. Raises CheckpointError on NaN or Inf."""
        if name == "lm_head.weight" and self.config.tie_word_embeddings:
            name = "model.embed_tokens.weight"
        return self._finite(name)

    def linear(self, name: str) -> BinaryLinear | npt.NDArray[np.float32]:
        """See Weights. Raises CheckpointError on NaN or Inf in a latent weight or a scale."""
        weight = self._finite(f"{name}.weight")
        pattern = self.config.scaling_pattern
        if pattern == "none":
            return weight
        alpha, beta = self.scales(name)
        n, k = weight.shape
        return BinaryLinear(
            packed=pack_bits(weight),
            n=n,
            k=k,
            pattern=pattern,
            alpha=alpha,
            beta=beta,
            zeros=int(weight.size - np.count_nonzero(weight)),
        )

    def scales(self, name: str) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32] | None]:
        """See HasScales."""
        alpha = self._finite(f"{name}.wscale")
        if self.config.scaling_pattern == "block":
            return alpha, None
        return alpha.reshape(-1), self._finite(f"{name}.wbias").reshape(-1)

    def _finite(self, name: str) -> npt.NDArray[np.float32]:
        tensor = self.store.read(name)
        # min and max carry every NaN and Inf without a boolean copy of the tensor.
        if not (np.isfinite(tensor.min()) and np.isfinite(tensor.max())):
            raise CheckpointError(f"the tensor {name} holds NaN or Inf; expected finite numbers")
        return tensor


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a checkpoint of this config, in the order they are written."""
    vocab, hidden = config.vocab_size, config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        shapes[f"{prefix}input_layernorm.weight"] = (hidden,)
        for linear, (n, k) in config.linear_shapes().items():
            shapes[f"{prefix}{linear}.weight"] = (n, k)
            if config.scaling_pattern != "none":
                shapes[f"{prefix}{linear}.wscale"] = config.scale_shape(n, k)
                if config.scaling_pattern != "block":
                    shapes[f"{prefix}{linear}.wbias"] = config.scale_shape(n, k)
        if config.has_head_norms:
            shapes |= {f"{prefix}self_attn.{part}_norm.weight": (config.head_dim,) for part in "qk"}
        shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def infer_scaling_pattern(shapes: Mapping[str, tuple[int, ...]]) -> ScalingPattern:
    """The pattern of the first scaled linear; `_check_shapes` then holds all others to it. Raises CheckpointError.

    Only `block` has no wbias, which tells (N, 1) of a row from (N, 1) of a block with K <= 128.
    """
    for name, shape in shapes.items():
        if not name.endswith(".wscale"):
            continue
        n, k = (*shapes.get(name.removesuffix("wscale") + "weight", ()), 0, 0)[:2]
        has_offset = name.removesuffix("wscale") + "wbias" in shapes
        forms: dict[tuple[int, ...], ScalingPattern] = {(1, k): "column", (n, 1): "row", (1,): "single"}
        if not has_offset:
            forms = {(n, -(-k // BLOCK_SIZE)): "block"}
        if shape not in forms:
            expected = ", ".join(f"{form} ({pattern})" for form, pattern in forms.items())
            with_or_without = "with" if has_offset else "without"
            raise CheckpointError(f"{name} has shape {shape}; expected, {with_or_without} a wbias: {expected}")
        return forms[shape]
    return "none"


def _check_shapes(path: Path, shapes: Mapping[str, tuple[int, ...]], config: ModelConfig) -> None:
    expected = expected_shapes(config)
    tolerated = {name for name in shapes if name.endswith("rotary_emb.inv_freq")}  # written by transformers < 4.32
    if config.tie_word_embeddings:
        tolerated.add("lm_head.weight")
    if missing := [name for name in expected if name not in shapes]:
        raise CheckpointError(f"{path} lacks {_listed(missing)}; config.json calls for {len(expected)}")
    if extra := sorted(name for name in shapes if name not in expected and name not in tolerated):
        raise CheckpointError(
            f"{path} holds {_listed(extra)} that a {config.model_type} of this config.json doesn't have"
        )
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise CheckpointError(f"{path}: tensor {name} has shape {shapes[name]}, expected {shape} by config.json")


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({shown})"


def read_sidecars(path: Path) -> dict[str, str]:
    """The files beside the weights, by name. Raises CheckpointError."""
    texts = {}
    for name in SIDECARS:
        try:
            texts[name] = (path / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"can't read {path / name}: {error}") from error
    return texts


def json_sidecar(files: Mapping[str, str], name: str) -> dict[str, Any]:
    """The JSON object in one of the files beside the weights; empty where it isn't there. Raises CheckpointError."""
    if name not in files:
        return {}
    try:
        value = load_json(files[name])
    except ValueError as error:
        raise CheckpointError(f"{name} is not JSON ({error}); mend or remove it") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} holds a JSON {type(value).__name__}, expected an object; mend or remove it")
    return value


def write_checkpoint(
    out_dir: Path,
    config: ModelConfig,
    tensors: Iterable[tuple[str, npt.NDArray[Any]]],
    files: Mapping[str, str | bytes],
    shard_bytes: int = 1 << 30,
) -> None:
    """Write the official form from a stream of (name, float32 | float16 | bfloat16 array), holding one shard in memory.

    The folder appears whole or not at all and replaces an earlier checkpoint. Raises CheckpointError where the tensors
    are not exactly those of `config`, OutputError where the disk refuses or `out_dir` holds files that are no checkpoint.
    """
    out_dir = Path(out_dir)
    if bad := [name for name in files if not name or Path(name).name != name]:
        raise ValueError(f"{bad[0]!r} is not a plain file name")
    _refuse_foreign_files(out_dir, files)
    expected = expected_shapes(config)
    with atomic_directory(out_dir) as staging:
        # 1. Shards, as they fill; their final names need their number, which is known only at the end.
        shard: dict[str, npt.NDArray[Any]] = {}
        shards: list[list[str]] = []
        total_bytes = 0

        def flush() -> None:
            _write_safetensors(staging / f"shard-{len(shards)}", shard)
            shards.append(list(shard))
            shard.clear()

        for name, array in tensors:
            if expected.pop(name, None) != array.shape:
                raise CheckpointError(
                    f"can't write {name} of shape {array.shape}: not a tensor of this config, or twice"
                )
            if shard and sum(held.nbytes for held in shard.values()) + array.nbytes > shard_bytes:
                flush()
            shard[name] = array
            total_bytes += array.nbytes
        if expected:
            raise CheckpointError(f"can't write a checkpoint without {_listed(list(expected))}")
        flush()
        # 2. Final names, and the index where there is more than one shard.
        if len(shards) == 1:
            os.replace(staging / "shard-0", staging / "model.safetensors")
        else:
            weight_map = {}
            for index, names in enumerate(shards):
                file_name = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
                os.replace(staging / f"shard-{index}", staging / file_name)
                weight_map.update(dict.fromkeys(names, file_name))
            content = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
            _write_text(staging / "model.safetensors.index.json", json.dumps(content, indent=2, sort_keys=True))
        # 3. The config and the files that travel with it.
        _write_text(staging / "config.json", json.dumps(config.to_dict(), indent=2) + "\n")
        for name, text in files.items():
            _write_text(staging / name, text)


def _write_safetensors(path: Path, tensors: Mapping[str, npt.NDArray[Any]]) -> None:
    """The safetensors format: header length (8 bytes, little-endian), JSON header, data without gaps.

    Written here rather than by the library, because that one reports a full disk as text in an error of its own.
    """
    dtypes = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # what transformers asks for
    offset = 0
    for name, array in tensors.items():
        if array.dtype.name not in dtypes:
            raise ValueError(f"{name} has dtype {array.dtype}, expected one of {', '.join(dtypes)}")
        end = offset + array.nbytes
        header[name] = {"dtype": dtypes[array.dtype.name], "shape": array.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts aligned
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for array in tensors.values():
            file.write(cast(Any, np.ascontiguousarray(array).reshape(-1).view(np.uint8)))


def _write_text(path: Path, text: str | bytes) -> None:
    path.write_bytes(text.encode() if isinstance(text, str) else text)


def _refuse_foreign_files(out_dir: Path, files: Mapping[str, str | bytes]) -> None:
    """The folder will be replaced as a whole, so it must hold nothing but an earlier checkpoint."""
    known = {"config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json", *SIDECARS, *files}

    def is_known(entry: Path) -> bool:
        weights = entry.suffix in (".safetensors", ".bin") and entry.name.startswith(("model", "pytorch_model"))
        return entry.is_file() and (entry.name in known or weights)

    require_only(out_dir, is_known, "a checkpoint")
