"""What a user chooses about an export: how activations, the head, the embedding and block scales are held."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from fbiedge.config import ModelConfig
from fbiedge.errors import UsageError

AccuracyLevel = Literal["int8", "fp32"]
Embedding = Literal["fp32", "fp16", "int8", "int4", "1bit"]
Head = Literal["int8", "int4", "fp32", "1bit"]
KVCache = Literal["int8", "fp32"]
Operators = Literal["fbiedge", "stock"]
Storage = Literal["fp32", "fp16"]
StockBits = Literal[1, 2, 4]

# The rotation of ONNX Runtime's GroupQueryAttention takes no other head sizes, and ours none above.
_FUSED_ROPE_MULTIPLE = 16
_LARGEST_HEAD_DIM = 256

# ORT's MatMulNBits and our BinaryMatMul number their levels alike.
ACCURACY_LEVELS: dict[AccuracyLevel, int] = {"fp32": 1, "int8": 4}
CODE_BITS = {"int8": 8, "int4": 4}  # of a head or an embedding that is quantised here


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Raises UsageError for a value that isn't one of those listed. 1 bit is for weights that are (see vocabulary.py)."""

    accuracy_level: AccuracyLevel = "int8"  # of the activations in binary linears and in a quantised head
    head: Head = "int8"
    embedding: Embedding = "fp32"
    block_scales: Storage = "fp16"  # scales of pattern `block`; Q1_0 holds fp16 too
    kv_cache: KVCache | None = None  # None: int8 where the graph is of our operators and the heads allow it
    operators: Operators = "fbiedge"  # stock: ONNX Runtime's own throughout (stock.py)
    stock_bits: StockBits = 4  # that a sign takes there in the file

    def __post_init__(self) -> None:
        for name, allowed in (
            ("accuracy_level", AccuracyLevel),
            ("head", Head),
            ("embedding", Embedding),
            ("block_scales", Storage),
            ("operators", Operators),
            ("stock_bits", StockBits),
            *([("kv_cache", KVCache)] if self.kv_cache is not None else []),
        ):
            value = getattr(self, name)
            if value not in get_args(allowed):
                raise UsageError(f"{name} is {value!r}, expected one of {', '.join(map(str, get_args(allowed)))}")
        if self.unfolded and self.accuracy_level != "fp32":
            raise UsageError("matrices that unfold to fp32 (1 bit in stock operators) take fp32 activations only")
        if self.operators == "stock" and self.kv_cache == "int8":
            raise UsageError("a KV cache of int8 is an operator of ours; with --ops stock it is fp32")

    def cache(self, config: ModelConfig) -> KVCache:
        """How the graph holds keys and values. Raises UsageError where int8 was asked for and can't be."""
        fits = fused_rope(config) and config.head_dim <= _LARGEST_HEAD_DIM
        if self.kv_cache == "int8" and not fits:
            raise UsageError(
                f"head_dim is {config.head_dim}, but a KV cache of int8 takes multiples of {_FUSED_ROPE_MULTIPLE} up to "
                f"{_LARGEST_HEAD_DIM} only; export with --kv-cache fp32"
            )
        return self.kv_cache or ("int8" if fits and self.ours(config) else "fp32")

    @property
    def unfolded(self) -> bool:
        """Whether matrices become fp32 when the model is opened."""
        return self.operators == "stock" and self.stock_bits == 1

    def ours(self, config: ModelConfig) -> bool:
        """Whether the graph is made of our operators where we have one; an ordinary Llama is made of stock ones."""
        return self.operators == "fbiedge" and config.scaling_pattern != "none"


def fused_rope(config: ModelConfig) -> bool:
    """Whether attention can rotate queries and keys itself."""
    return config.head_dim % _FUSED_ROPE_MULTIPLE == 0
