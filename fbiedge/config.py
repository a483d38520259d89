"""ModelConfig: the shape of a Llama or a Qwen3, with Hugging Face's field names, read from and written to config.json."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast, get_args

from .errors import CheckpointError, UsageError
from .rope import RopeScaling, read_rope

ModelType = Literal["llama", "qwen3"]
_ARCHITECTURES: dict[ModelType, str] = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}

# How the scales of a binary linear [N, K] are shared. `none`: an ordinary full-precision Llama (teachers, stories260K).
ScalingPattern = Literal["column", "row", "single", "block", "none"]
BLOCK_SIZE = 128  # inputs that share one scale of an output row in `block`, as in ggml's Q1_0

# Far above any model, and low enough that nothing takes forever before the tensors are found not to be there.
_MOST_LAYERS = 10_000
_LARGEST = 2**31 - 1  # ONNX Runtime's attention counts in 32 bits, and so does the op for its K and N


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a Llama, an FBI-LLM or a Qwen3, which is a Llama with an RMS norm over each head of queries and keys."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    bos_token_id: int = 1
    eos_token_id: int = 2
    tie_word_embeddings: bool = False
    scaling_pattern: ScalingPattern = "column"
    model_type: ModelType = "llama"
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "head_dim", "max_position_embeddings"):  # fmt: skip
            value, most = getattr(self, name), _MOST_LAYERS if name == "num_hidden_layers" else _LARGEST
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                raise CheckpointError(f"config: {name} is {value!r}, expected a positive integer")
            if value > most:
                raise CheckpointError(f"config: {name} is {value}, expected at most {most}")
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise CheckpointError(f"config: {name} is {value!r}, expected a token id")
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise CheckpointError(f"config: {name} is {value}, expected a positive number")
        if self.num_attention_heads % self.num_key_value_heads:
            raise CheckpointError(
                f"config: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise CheckpointError(f"config: head_dim is {self.head_dim}, expected an even number (RoPE rotates pairs)")
        for name, allowed in (("scaling_pattern", get_args(ScalingPattern)), ("model_type", get_args(ModelType))):
            if getattr(self, name) not in allowed:
                raise CheckpointError(
                    f"config: {name} is {getattr(self, name)!r}, expected one of {', '.join(allowed)}"
                )
        factors = self.rope_scaling.factors if self.rope_scaling is not None else ()
        if factors and len(factors) != self.head_dim // 2:
            raise CheckpointError(
                f"config: RoPE has {len(factors)} factors, expected {self.head_dim // 2}, one for each pair of a head of "
                f"{self.head_dim}"
            )

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> ModelConfig:
        """From config.json's contents, in the older spelling of RoPE or the newer (see rope.py). Raises CheckpointError."""
        try:
            model_type = raw.get("model_type", "llama")
            if raw.get("hidden_act", "silu") != "silu" or raw.get("attention_bias") or raw.get("mlp_bias"):
                raise CheckpointError(
                    "config: only Llama and Qwen3 with SwiGLU (hidden_act 'silu') and no biases is supported"
                )
            if raw.get("use_sliding_window") or set(raw.get("layer_types") or ()) - {"full_attention"}:
                raise CheckpointError("config: attention in a sliding window is not supported")
            heads, hidden = raw["num_attention_heads"], raw["hidden_size"]
            eos = 2 if raw.get("eos_token_id") is None else raw["eos_token_id"]
            positions = raw.get("max_position_embeddings", 2048)
            rope_theta, rope_scaling = read_rope(raw, positions)
            return cls(
                vocab_size=raw["vocab_size"],
                hidden_size=hidden,
                intermediate_size=raw["intermediate_size"],
                num_hidden_layers=raw["num_hidden_layers"],
                num_attention_heads=heads,
                num_key_value_heads=raw.get("num_key_value_heads") or heads,
                head_dim=raw.get("head_dim") or (128 if model_type == "qwen3" else hidden // heads),
                max_position_embeddings=positions,
                rms_norm_eps=float(raw.get("rms_norm_eps", 1e-5)),
                rope_theta=rope_theta,
                bos_token_id=1 if raw.get("bos_token_id") is None else raw["bos_token_id"],
                eos_token_id=eos[0] if isinstance(eos, list) else eos,
                tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
                scaling_pattern=cast(ScalingPattern, raw.get("scaling_pattern", "column")),
                model_type=model_type,
                rope_scaling=rope_scaling,
            )
        except KeyError as error:
            raise CheckpointError(f"config: the field {error.args[0]!r} is missing") from error
        except (TypeError, ValueError, ArithmeticError, AttributeError, IndexError) as error:
            raise CheckpointError(f"config: unusable value ({error})") from error

    def to_dict(self) -> dict[str, Any]:
        """config.json's contents, with RoPE in both spellings so that older and newer readers agree."""
        fields = asdict(self)
        del fields["rope_scaling"]
        scaling = {}
        if self.rope_scaling is not None:
            scaling = self.rope_scaling.to_dict()
            if scaling["rope_type"] == "longrope":
                scaling["original_max_position_embeddings"] = self.max_position_embeddings
            fields["rope_scaling"] = scaling
        return {
            "architectures": [_ARCHITECTURES[self.model_type]],
            "model_type": self.model_type,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta, **scaling},
            **fields,
        }

    def check_trainable(self, whose: str) -> None:
        """Raises UsageError for a model that training would compute as another one; `whose` it is begins the message."""
        if self.model_type != "llama" or self.rope_scaling is not None:
            what = f"a {self.model_type}" if self.rope_scaling is None else "a Llama with scaled RoPE"
            raise UsageError(f"{whose} is {what}; training knows a Llama with unscaled RoPE only")

    @property
    def has_head_norms(self) -> bool:
        """Whether each head of queries and keys is normalised, with weights q_norm and k_norm [head_dim]."""
        return self.model_type == "qwen3"

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Shape [N, K] of each linear of one decoder layer, by its name below `model.layers.{i}.`."""
        q_size, kv_size = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        hidden, ffn = self.hidden_size, self.intermediate_size
        return {
            "self_attn.q_proj": (q_size, hidden),
            "self_attn.k_proj": (kv_size, hidden),
            "self_attn.v_proj": (kv_size, hidden),
            "self_attn.o_proj": (hidden, q_size),
            "mlp.gate_proj": (ffn, hidden),
            "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn),
        }

    def scale_shape(self, n: int, k: int) -> tuple[int, ...]:
        """Shape of `wscale` (and of `wbias`, which `block` has none of) for a binary linear [n, k]."""
        match self.scaling_pattern:
            case "column":
                return (1, k)
            case "row":
                return (n, 1)
            case "single":
                return (1,)
            case "block":
                return (n, -(-k // BLOCK_SIZE))
        raise ValueError("a full-precision model has no scales")


# The published sizes (FBI-LLM, arXiv 2407.07093, table of architectures), that of the bundled model (small), and one small
# enough for any test.
PRESETS: dict[str, ModelConfig] = {
    name: ModelConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        max_position_embeddings=context,
    )
    for name, vocab, layers, hidden, ffn, heads, kv_heads, context in (
        ("tiny", 512, 2, 128, 352, 4, 4, 256),
        ("small", 2048, 6, 256, 704, 4, 4, 512),
        ("130m", 32000, 12, 768, 2048, 12, 12, 2048),
        ("1.3b", 32000, 24, 2048, 5632, 32, 32, 2048),
        ("7b", 32000, 32, 4096, 11008, 32, 32, 2048),
        ("13b", 32000, 40, 5120, 13824, 40, 40, 2048),
    )
}


def preset(name: str) -> ModelConfig:
    """The preset called `name`. Raises UsageError with the known names."""
    if name not in PRESETS:
        raise UsageError(f"unknown preset {name!r}; expected one of {', '.join(PRESETS)}")
    return PRESETS[name]
