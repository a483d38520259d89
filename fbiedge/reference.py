"""The slow, obvious Llama: plain numpy, one formula a function. Every other engine of the project is compared with it.

    h = E[ids]                                                  E: embedding [vocab, hidden]
    each layer:  h += Attention(RMSNorm(h));  h += Mlp(RMSNorm(h))
    logits = RMSNorm(h) · Headᵀ

A Qwen3 is a Llama whose heads of queries and keys are normalised, each by itself, before they are rotated.

Shapes: T new tokens, P tokens already in the KV cache, H heads, G KV heads, D size of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .config import ModelConfig
from .errors import UsageError
from .rope import rope_frequencies
from .weights import BinaryLinear, HasBinaryRows, Weights

Array = npt.NDArray[Any]  # floats of the dtype chosen
# Dense float32 weights that whoever runs a reference may let it keep; above it, tensors are read as they are needed.
RESIDENT_LIMIT_BYTES = 2 * 1000**3
_ROWS_AT_ONCE = 8192  # of a 1-bit head


class Reference:
    """A Llama with a KV cache. Binary linears are used as dense W_eff, so their algebra is not assumed but checked.

    `dtype` np.float32 or np.float64 is used throughout. `resident` keeps all weights in memory as dense matrices of that
    dtype; without it each call of `logits` reads every tensor anew, one in memory at a time, which suits big models, and
    of an embedding or head of 1 bit no more than some rows are dense at a time.
    """

    def __init__(
        self, weights: Weights, dtype: type[np.float32 | np.float64] = np.float32, *, resident: bool = True
    ) -> None:
        self.config: ModelConfig = weights.config
        self.dtype = dtype
        self._weights = weights
        self._kept: dict[str, Array] | None = {} if resident else None
        self._binary = weights if isinstance(weights, HasBinaryRows) and not resident else None
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        config = self.config
        empty = np.zeros((config.num_key_value_heads, 0, config.head_dim), self.dtype)  # [G, 0, D]
        self._keys: list[Array] = [empty] * config.num_hidden_layers
        self._values: list[Array] = [empty] * config.num_hidden_layers

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens. Raises UsageError where there are fewer."""
        if not 0 <= length <= self.position:
            raise UsageError(f"can't truncate the cache to {length} tokens, it holds {self.position}")
        self._keys = [rows[:, :length] for rows in self._keys]
        self._values = [rows[:, :length] for rows in self._values]

    @property
    def position(self) -> int:
        """Tokens in the KV cache."""
        return int(self._keys[0].shape[1])

    def logits(self, ids: Sequence[int]) -> Array:
        """Append `ids` to the tokens seen so far and return their logits [T, vocab].

        Raises UsageError for an id outside the vocabulary or more tokens than the context holds.
        """
        config, tokens = self.config, np.asarray(ids, dtype=np.int64)
        if tokens.ndim != 1 or tokens.size == 0:
            raise UsageError(
                f"got {tokens.size} token ids of {tokens.ndim} dimension(s); expected a list of one or more"
            )
        if tokens.min() < 0 or tokens.max() >= config.vocab_size:
            raise UsageError(
                f"token ids reach from {tokens.min()} to {tokens.max()}; the vocabulary is {config.vocab_size}"
            )
        if self.position + tokens.size > config.max_position_embeddings:
            raise UsageError(
                f"{self.position + tokens.size} tokens are longer than the context of {config.max_position_embeddings}"
            )
        with np.errstate(all="ignore"):  # weights may be anything; what overflows is in the logits for all to see
            return self._logits(tokens)

    def _logits(self, tokens: npt.NDArray[np.int64]) -> Array:
        config = self.config
        cos, sin = rope_angles(self.position, tokens.size, config, self.dtype)
        hidden = self._embed(tokens)  # [T, hidden]
        for layer in range(config.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            normed = rms_norm(hidden, self._tensor(f"{prefix}input_layernorm.weight"), config.rms_norm_eps)
            hidden = hidden + self._attention(layer, normed, cos, sin)
            normed = rms_norm(hidden, self._tensor(f"{prefix}post_attention_layernorm.weight"), config.rms_norm_eps)
            hidden = hidden + self._mlp(f"{prefix}mlp.", normed)
        hidden = rms_norm(hidden, self._tensor("model.norm.weight"), config.rms_norm_eps)
        return self._head(hidden)  # [T, vocab]

    def greedy(self, ids: Sequence[int], n: int) -> list[int]:
        """The `n` most likely tokens after `ids`, one by one, from an empty cache. An end token does not stop it."""
        self.reset()
        generated: list[int] = []
        fed = list(ids)
        for _ in range(n):
            generated.append(int(self.logits(fed)[-1].argmax()))
            fed = generated[-1:]
        return generated

    def _attention(self, layer: int, x: Array, cos: Array, sin: Array) -> Array:
        """softmax(q·kᵀ / √D + causal mask) · v; each KV head serves H/G query heads. x [T, hidden] -> [T, hidden]."""
        config, prefix = self.config, f"model.layers.{layer}.self_attn."
        query = self._heads(x, f"{prefix}q_proj", config.num_attention_heads)  # [H, T, D]
        key = self._heads(x, f"{prefix}k_proj", config.num_key_value_heads)  # [G, T, D]
        value = self._heads(x, f"{prefix}v_proj", config.num_key_value_heads)  # [G, T, D]
        if config.has_head_norms:
            query = rms_norm(query, self._tensor(f"{prefix}q_norm.weight"), config.rms_norm_eps)
            key = rms_norm(key, self._tensor(f"{prefix}k_norm.weight"), config.rms_norm_eps)
        keys = np.concatenate([self._keys[layer], rotate(key, cos, sin)], axis=1)  # [G, P + T, D]
        values = np.concatenate([self._values[layer], value], axis=1)
        self._keys[layer], self._values[layer] = keys, values

        kv_heads, total, head_dim = keys.shape
        new = x.shape[0]
        grouped = rotate(query, cos, sin).reshape(kv_heads, -1, new, head_dim)  # [G, H/G, T, D]
        scores = grouped @ keys[:, None].swapaxes(-1, -2) / self.dtype(np.sqrt(head_dim))  # [G, H/G, T, P + T]
        visible = np.arange(total) <= np.arange(total - new, total)[:, None]  # [T, P + T]
        mixed = softmax(np.where(visible, scores, self.dtype(-np.inf))) @ values[:, None]  # [G, H/G, T, D]
        merged = mixed.reshape(-1, new, head_dim).transpose(1, 0, 2).reshape(new, -1)  # [T, H·D]
        return self._project(f"{prefix}o_proj", merged)

    def _mlp(self, prefix: str, x: Array) -> Array:
        """SwiGLU: down(silu(gate(x)) · up(x)). x [T, hidden] -> [T, hidden]."""
        gate, up = self._project(f"{prefix}gate_proj", x), self._project(f"{prefix}up_proj", x)
        return self._project(f"{prefix}down_proj", silu(gate) * up)

    def _embed(self, tokens: npt.NDArray[np.int64]) -> Array:
        rows = self._binary.binary_embedding() if self._binary else None
        if rows is None:
            return self._tensor("model.embed_tokens.weight")[tokens]
        return rows.rows(tokens).dense().astype(self.dtype, copy=False)

    def _head(self, x: Array) -> Array:
        """x [T, hidden] -> logits [T, vocab]."""
        rows = self._binary.binary_head() if self._binary else None
        if rows is None:
            logits: Array = x @ self._tensor("lm_head.weight").T
            return logits
        parts = (rows.rows(slice(start, start + _ROWS_AT_ONCE)) for start in range(0, rows.n, _ROWS_AT_ONCE))
        return np.concatenate([x @ part.dense().astype(self.dtype, copy=False).T for part in parts], axis=-1)

    def _heads(self, x: Array, name: str, heads: int) -> Array:
        """Project x [T, hidden] and split it into heads [heads, T, D]."""
        by_head: Array = self._project(name, x).reshape(x.shape[0], heads, -1).transpose(1, 0, 2)
        return by_head

    def _project(self, name: str, x: Array) -> Array:
        """x [T, K] -> x · Wᵀ [T, N] of a decoder linear; what watches or rounds its inputs does it here."""
        projected: Array = x @ self._linear(name).T
        return projected

    def _tensor(self, name: str) -> Array:
        return self._once(name, lambda: self._weights.tensor(name))

    def _linear(self, name: str) -> Array:
        def dense() -> Array:
            linear = self._weights.linear(name)
            return linear.dense() if isinstance(linear, BinaryLinear) else linear

        return self._once(name, dense)

    def _once(self, name: str, read: Callable[[], Array]) -> Array:
        if self._kept is None:
            return read().astype(self.dtype, copy=False)
        if name not in self._kept:
            self._kept[name] = read().astype(self.dtype, copy=False)
        return self._kept[name]


def rms_norm(x: Array, weight: Array, epsilon: float) -> Array:
    """x / √(mean(x²) + ε) · weight over the last axis."""
    normed: Array = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + x.dtype.type(epsilon)) * weight
    return normed


def silu(x: Array) -> Array:
    """x / (1 + e⁻ˣ), written so that no exponential overflows."""
    small = np.exp(-np.abs(x))
    activated: Array = x * np.where(x >= 0, 1, small) / (1 + small)
    return activated


def softmax(x: Array) -> Array:
    """eˣ / Σ eˣ over the last axis."""
    exponentials = np.exp(x - x.max(axis=-1, keepdims=True))
    shares: Array = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return shares


def rope_angles(
    start: int, count: int, config: ModelConfig, dtype: type[np.float32 | np.float64]
) -> tuple[Array, Array]:
    """cos and sin [T, D/2] of position · frequency; computed in float64, since angles grow with the position."""
    scaling = config.rope_scaling
    frequencies = rope_frequencies(config.head_dim, config.rope_theta, scaling)
    angles = np.arange(start, start + count, dtype=np.float64)[:, None] * frequencies
    magnitude = 1.0 if scaling is None else scaling.magnitude
    return (np.cos(angles) * magnitude).astype(dtype), (np.sin(angles) * magnitude).astype(dtype)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """RoPE, half-split as in Hugging Face: input i pairs with input i + D/2. x [heads, T, D], cos and sin [T, D/2]."""
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
