"""RoPE's angles: θ^(-2i/D) a position, and the ways in which models stretch them to contexts beyond their training.

    linear    every frequency divided by `factor`
    llama3    wavelengths above original / low_freq_factor divided by `factor`, below original / high_freq_factor kept,
              blended between the two                                         (original: the context of the training)
    yarn      pairs that turn more than beta_fast times in the original context kept, fewer than beta_slow times divided
              by `factor`, blended between; cos and sin times attention_factor, 1 + ln(factor) / 10 where not given
    factors   a divisor for each frequency, as GGUF's rope_freqs.weight holds them; `longrope` in Hugging Face's spelling

Names and definitions are Hugging Face's. ggml's are the same to rounding, but llama.cpp (as in llama-cpp-python 0.3.36)
takes no details of yarn from the file of a Llama or a Qwen3: it is always 32, 1 and 1 + ln(factor) / 10, the latter times
rope.scaling.attn_factor. And it reads divisors of a Llama only. tests/reference/test_llama_cpp.py has each of these.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from .errors import CheckpointError

RopeType = Literal["linear", "llama3", "yarn", "factors"]


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How frequencies are scaled; the fields that a type doesn't name above keep their defaults."""

    rope_type: RopeType
    factor: float = 1.0
    original_max_position_embeddings: int = 0  # llama3, yarn
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # yarn: whether the blend begins and ends at whole pairs
    attention_factor: float | None = None  # yarn, factors
    factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.rope_type not in get_args(RopeType):
            raise CheckpointError(
                f"config: RoPE of type {self.rope_type!r} is not supported, expected one of default, linear, llama3, yarn"
            )
        names = ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow")
        numbers = {name: getattr(self, name) for name in names} | {
            f"factors[{i}]": factor for i, factor in enumerate(self.factors)
        }
        if self.attention_factor is not None:
            numbers["attention_factor"] = self.attention_factor
        for name, value in numbers.items():
            if not (math.isfinite(value) and value > 0):
                raise CheckpointError(f"config: RoPE's {name} is {value}, expected a positive number")
        if (self.rope_type == "factors") != bool(self.factors):
            raise CheckpointError(f"config: RoPE of type {self.rope_type!r} has {len(self.factors)} factors")
        if self.rope_type in ("llama3", "yarn") and not _is_count(self.original_max_position_embeddings):
            raise CheckpointError(
                f"config: RoPE's original_max_position_embeddings is {self.original_max_position_embeddings!r}, "
                "expected a positive integer"
            )
        if self.high_freq_factor <= self.low_freq_factor:
            raise CheckpointError(
                f"config: RoPE's high_freq_factor is {self.high_freq_factor}, expected more than its low_freq_factor "
                f"of {self.low_freq_factor}"
            )
        if self.beta_fast <= self.beta_slow:
            raise CheckpointError(
                f"config: RoPE's beta_fast is {self.beta_fast}, expected more than its beta_slow of {self.beta_slow}"
            )

    @property
    def magnitude(self) -> float:
        """What cos and sin are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        return _mscale(self.factor) if self.rope_type == "yarn" else 1.0

    def to_dict(self) -> dict[str, Any]:
        """The fields of config.json's `rope_parameters`, without the theta."""
        original = {"original_max_position_embeddings": self.original_max_position_embeddings}
        attention = {} if self.attention_factor is None else {"attention_factor": self.attention_factor}
        match self.rope_type:
            case "linear":
                return {"rope_type": "linear", "factor": self.factor}
            case "llama3":
                bounds = {"low_freq_factor": self.low_freq_factor, "high_freq_factor": self.high_freq_factor}
                return {"rope_type": "llama3", "factor": self.factor, **bounds, **original}
            case "yarn":
                betas = {"beta_fast": self.beta_fast, "beta_slow": self.beta_slow}
                rest = {} if self.truncate else {"truncate": False}
                return {"rope_type": "yarn", "factor": self.factor, **original, **betas, **attention, **rest}
        factors = [*self.factors]  # longrope, with the same divisors for short and for long texts
        return {
            "rope_type": "longrope",
            "short_factor": factors,
            "long_factor": factors,
            "factor": 1.0,
            "attention_factor": self.magnitude,
        }


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> npt.NDArray[np.float64]:
    """The angle that each pair of a head turns by a position [head_dim / 2]."""
    frequencies: npt.NDArray[np.float64] = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None:
        return frequencies
    original, factor = scaling.original_max_position_embeddings, scaling.factor
    match scaling.rope_type:
        case "linear":
            return frequencies / factor
        case "factors":
            return frequencies / np.array(scaling.factors, np.float64)
        case "llama3":
            turns, low = original * frequencies / (2 * np.pi), scaling.low_freq_factor
            kept = np.clip((turns - low) / (scaling.high_freq_factor - low), 0, 1)
        case "yarn":
            # The pair, as a real number, that turns `turns` times in the original context.
            first, last = (
                head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))
                for turns in (scaling.beta_fast, scaling.beta_slow)
            )
            if scaling.truncate:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, head_dim - 1)
            kept = 1 - np.clip((np.arange(head_dim // 2) - first) / max(last - first, 0.001), 0, 1)
    blended: npt.NDArray[np.float64] = frequencies * (kept + (1 - kept) / factor)
    return blended


def read_rope(raw: Mapping[str, Any], max_positions: int) -> tuple[float, RopeScaling | None]:
    """Theta and scaling from config.json's contents: `rope_theta` and `rope_scaling` (older) or `rope_parameters`.

    Where both spellings are there, readers would take one or the other, so they must agree. Raises CheckpointError;
    KeyError, TypeError, ValueError for what is missing or of no usable type.
    """
    spellings = [raw.get(name) or {} for name in ("rope_parameters", "rope_scaling")]
    thetas = [float(place["rope_theta"]) for place in (*spellings, raw) if place.get("rope_theta") is not None]
    if any(theta != thetas[0] for theta in thetas):
        raise CheckpointError(
            f"config: rope_theta is {thetas[0]} in one place and {thetas[-1]} in another; make them agree"
        )
    original = raw.get("original_max_position_embeddings")
    stated = [
        _read_scaling({**place, "original_max_position_embeddings": original} if original else place, max_positions)
        for place in spellings
        if any(key != "rope_theta" for key in place)
    ]
    if any(scaling != stated[0] for scaling in stated):
        raise CheckpointError("config: rope_parameters and rope_scaling differ; make them agree")
    return (thetas[0] if thetas else 10000.0), (stated[0] if stated else None)


def _read_scaling(raw: Mapping[str, Any], max_positions: int) -> RopeScaling | None:
    kind = raw.get("rope_type") or raw.get("type") or "default"
    if raw.get("partial_rotary_factor", 1.0) != 1.0 or any(isinstance(value, dict) for value in raw.values()):
        raise CheckpointError("config: RoPE of a part of each head, or that differs by layer, is not supported")
    original = raw.get("original_max_position_embeddings") or max_positions
    attention = raw.get("attention_factor")
    match kind:
        case "default":
            return None
        case "linear":
            return RopeScaling(rope_type="linear", factor=float(raw["factor"]))
        case "llama3":
            return RopeScaling(
                rope_type="llama3",
                factor=float(raw["factor"]),
                low_freq_factor=float(raw["low_freq_factor"]),
                high_freq_factor=float(raw["high_freq_factor"]),
                original_max_position_embeddings=original,
            )
        case "yarn":
            factor = float(raw["factor"] if raw.get("factor") is not None else max_positions / original)
            if attention is None and raw.get("mscale") and raw.get("mscale_all_dim"):
                attention = _mscale(factor, float(raw["mscale"])) / _mscale(factor, float(raw["mscale_all_dim"]))
            return RopeScaling(
                rope_type="yarn",
                factor=factor,
                original_max_position_embeddings=original,
                beta_fast=float(raw.get("beta_fast") or 32),
                beta_slow=float(raw.get("beta_slow") or 1),
                truncate=bool(raw.get("truncate", True)),
                attention_factor=None if attention is None else float(attention),
            )
        case "longrope" if attention is not None and raw["short_factor"] == raw["long_factor"]:
            factors = tuple(float(factor) for factor in raw["long_factor"])
            magnitude = None if attention == 1 else float(attention)
            return RopeScaling(rope_type="factors", factors=factors, attention_factor=magnitude)
    raise CheckpointError(
        f"config: RoPE of type {kind!r} is not supported, expected one of default, linear, llama3, yarn"
    )


def _mscale(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31
