"""The adapter of a model of ours read back, and the folds of fold.py undone.

A model with an adapter holds W'[n, k] = d[n, g] · s[n, k] + b[n] · a[k]. By its fbiedge.scaling_pattern that was:

    row      a is 1: alpha = d and beta = b, one of each a row; `single` comes back as this, too
    column   d and b are the row factor c, which is 1 but for v and up. There it came from the scales of the linear
             behind, o and down, and goes back: alpha = beta / a = c by the inputs of o and down, and 1 everywhere else

Norms keep what was folded into them. b holds c in float32, d only in float16, so where there is a b it is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fbiedge.config import ModelConfig
from fbiedge.errors import ModelFileError
from fbiedge.gguf_file import GgufFile, metadata_value
from fbiedge.gguf_tensors import dequantize

Vector = npt.NDArray[np.float32]

BEFORE = {"self_attn.o_proj": "self_attn.v_proj", "mlp.down_proj": "mlp.up_proj"}  # whose rows have the scales of which


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """The terms b · aᵀ by the names of the model's tensors, read one at a time."""

    file: GgufFile

    @classmethod
    def of(cls, file: GgufFile, shapes: Mapping[str, tuple[int, ...]]) -> Adapter:
        """`shapes` of the model's linears. Raises ModelFileError where it isn't an adapter of rank 1 for them."""
        kind = [metadata_value(file.metadata, key, str) for key in ("general.type", "adapter.type")]
        alpha = metadata_value(file.metadata, "adapter.lora.alpha", float)
        if kind != ["adapter", "lora"] or alpha != 1.0:
            raise ModelFileError(f"{file.path} is no adapter of ours (a LoRA with alpha 1); export the model again")
        parts = {f"{name}.lora_a": (1, shape[1]) for name, shape in shapes.items()}
        parts |= {f"{name}.lora_b": (shape[0], 1) for name, shape in shapes.items()}
        for name, tensor in file.tensors.items():
            if tensor.shape != parts.get(name):
                expected = parts.get(name, "no such tensor")
                raise ModelFileError(f"{file.path}: {name} has shape {tensor.shape}, expected {expected}")
            other = name[:-1] + ("b" if name.endswith("a") else "a")
            if other not in file.tensors:
                raise ModelFileError(f"{file.path} has {name} without {other}; export the model again")
        return cls(file=file)

    def term(self, name: str) -> tuple[Vector, Vector] | None:
        """a [K] and b [N] of the model's tensor `name`, None where it has none. Raises ModelFileError."""
        if f"{name}.lora_a" not in self.file.tensors:
            return None
        a, b = (self._vector(f"{name}.lora_{part}") for part in "ab")
        return a, b

    def _vector(self, name: str) -> Vector:
        values = dequantize(self.file.tensors[name], self.file.data(name)).reshape(-1)
        if not np.isfinite(values).all():
            raise ModelFileError(f"{self.file.path}: {name} holds NaN or Inf; export the model again")
        return values


def row_scales(d: Vector, term: tuple[Vector, Vector] | None, name: str) -> tuple[Vector, Vector]:
    """d [N, K/128] and the term -> alpha and beta [N] of pattern `row`. Raises ModelFileError."""
    if term is not None and (term[0] != 1).any():
        raise _unfit(name)
    return _row_factor(d, name), np.zeros(len(d), np.float32) if term is None else term[1]


def column_rows(d: Vector, term: tuple[Vector, Vector] | None, name: str) -> Vector:
    """The row factor c [N] of a linear with scales by input. Raises ModelFileError."""
    c = _row_factor(d, name)
    if term is None:
        return c
    with np.errstate(over="ignore"):  # of a damaged adapter
        rounded = term[1].astype(np.float16).astype(np.float32)
    if (rounded != c).any():
        raise _unfit(name)
    return term[1]


def column_scales(
    c: Vector, term: tuple[Vector, Vector] | None, before: Vector | None, config: ModelConfig, name: str, k: int
) -> tuple[Vector, Vector]:
    """Of a linear with row factor c, behind rows `before`: alpha and beta [K]. Raises ModelFileError."""
    if not name.endswith(tuple(BEFORE.values())) and (c != 1).any():
        raise _unfit(name)
    alpha = np.ones(k, np.float32)
    if name.endswith("o_proj") and before is not None:  # each KV head's channels, for every query head that it serves
        group = config.num_attention_heads // config.num_key_value_heads
        alpha = np.repeat(before.reshape(config.num_key_value_heads, 1, -1), group, axis=1).reshape(-1)
    elif before is not None:
        alpha = before
    return alpha, np.zeros(k, np.float32) if term is None else alpha * term[0]


def _row_factor(d: Vector, name: str) -> Vector:
    if (d != d[:, :1]).any():
        raise _unfit(name)
    return d[:, 0]


def _unfit(name: str) -> ModelFileError:
    return ModelFileError(
        f"{name}: its scales and the adapter's offsets are of no form that this fbiedge holds (a lossy export?); "
        "start from the checkpoint that it was made of"
    )
