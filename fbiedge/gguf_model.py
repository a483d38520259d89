"""A GGUF file as a model: its config, and what travels in it, under the names that a model.onnx of ours uses.

Only what llama.cpp calls `llama` and `qwen3`, and of these only what this project computes: what llama.cpp would compute
beyond (experts, another size of RoPE's cos and sin, layers of different shapes) is refused by its key, and never left out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .config import ModelConfig, ModelType, ScalingPattern
from .errors import CheckpointError, ModelFileError
from .gguf_file import GgufFile, metadata_value
from .gguf_tensors import dequantize
from .gguf_tokenizer import bos_and_eos, sidecars_from_gguf
from .model_file import FORMAT_VERSION, ModelFile
from .rope import RopeScaling

ARCHITECTURES: tuple[ModelType, ...] = ("llama", "qwen3")
ROPE_FACTORS = "rope_freqs.weight"
TRUE_FEED_FORWARD = "fbiedge.feed_forward_length"  # where the file's is padded to whole blocks

_GLOBAL_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Keys below the architecture's that change what llama.cpp computes, with the value that changes nothing. A GGUF means
# what llama.cpp computes, else chat and the import of one file were two models: so what it ignores in these architectures
# (0.3.36 of llama-cpp-python: attention.scale, rope.scaling.alpha, rope.scaling.yarn_*) is ignored here too.
_NEUTRAL = {
    "expert_count": 0,
    "attention.causal": True,
    "rope.scaling.attn_factor": 1.0,
}
_WITH_ADAPTER = ("column", "row", "single")  # values of fbiedge.scaling_pattern
_METADATA_KEYS = {
    "tokenizer.json": "tokenizer",
    "tokenizer_config.json": "tokenizer_config",
    "generation_config.json": "generation_config",
    "chat_template.jinja": "chat_template",
}


def gguf_name(name: str) -> str:
    """GGUF's name of a tensor, e.g. of `model.layers.3.mlp.up_proj.weight`: `blk.3.ffn_up.weight`."""
    stem, _, kind = name.rpartition(".")
    if stem in _GLOBAL_NAMES:
        return f"{_GLOBAL_NAMES[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{_LAYER_NAMES[part]}.{kind}"


def adapter_path(model: Path) -> Path:
    """Where the adapter of a model lies: model.gguf -> model.beta.gguf, in upper case too, and model.bin -> model.bin.beta.gguf."""
    stem = model.stem if model.suffix.lower() == ".gguf" else model.name
    return model.with_name(f"{stem}.beta.gguf")


def find_adapter(file: GgufFile) -> Path | None:
    """The adapter of the model `file`: beside the name that it was opened by, else beside what that is a link to.

    None where none is. Raises ModelFileError for one of another model.
    """
    places = adapter_path(file.path), adapter_path(file.path.resolve())
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        return None
    wanted = metadata_value(file.metadata, "fbiedge.weights_sha256", str)
    stated = metadata_value(GgufFile.open(path).metadata, "fbiedge.beta_of", str)
    if wanted is None or stated != wanted:
        raise ModelFileError(
            f"{path} lies beside {file.path.name} but was not made for it; move it away, or export the model again"
        )
    return path


def missing_adapter(file: GgufFile, adapter: Path | None) -> str | None:
    """In words, that our exporter wrote an adapter with the model `file`, but there is no `adapter`."""
    stated = metadata_value(file.metadata, "fbiedge.scaling_pattern", str)
    if adapter is not None or stated not in _WITH_ADAPTER:
        return None
    return f"its offsets ({adapter_path(file.path).name} beside it) are missing"


def open_gguf_model(source: Path | GgufFile) -> ModelFile:
    """What a GGUF file says about itself, for whatever runs a model. Raises ModelFileError."""
    file = source if isinstance(source, GgufFile) else GgufFile.open(source)
    config, adapter = config_from_gguf(file), find_adapter(file)
    files = files_from_gguf(file)
    producer = metadata_value(file.metadata, "general.quantized_by", str, "unknown") or "unknown"
    return ModelFile(
        path=file.path,
        config=config,
        metadata={
            "format_version": FORMAT_VERSION,
            "producer": producer,
            "config": json.dumps(config.to_dict(), indent=2),
            **{key: files[name] for name, key in _METADATA_KEYS.items() if name in files},
        },
        file_bytes=file.file_bytes,
        external_bytes={} if adapter is None else {adapter.name: adapter.stat().st_size},
    )


def files_from_gguf(file: GgufFile) -> dict[str, str]:
    """The files beside the weights, see gguf_tokenizer.sidecars_from_gguf. Raises ModelFileError."""
    try:
        return sidecars_from_gguf(file.metadata)
    except ModelFileError as error:
        raise ModelFileError(f"{file.path}: {error}") from error


def config_from_gguf(file: GgufFile) -> ModelConfig:
    """The shape of the model in `file`: pattern `block` where linears are Q1_0, else `none`. Raises ModelFileError."""
    try:
        return _Hyperparameters.of(file).config()
    except (CheckpointError, ModelFileError) as error:
        text = str(error).removeprefix("config: ")
        raise ModelFileError(f"{file.path}: {text}") from error


@dataclass(frozen=True, kw_only=True)
class _Hyperparameters:
    """The keys of one architecture."""

    file: GgufFile
    architecture: ModelType

    @classmethod
    def of(cls, file: GgufFile) -> _Hyperparameters:
        stated = metadata_value(file.metadata, "general.architecture", str)
        for architecture in ARCHITECTURES:
            if architecture == stated:
                return cls(file=file, architecture=architecture)
        got = "no architecture (general.architecture)" if stated is None else f"the architecture {stated!r}"
        raise ModelFileError(f"the file has {got}, expected one of {', '.join(ARCHITECTURES)}")

    def config(self) -> ModelConfig:
        for key, neutral in _NEUTRAL.items():
            value = self.file.metadata.get(f"{self.architecture}.{key}", neutral)
            if isinstance(value, (np.ndarray, list)) or value != neutral:
                got = repr(value) if isinstance(value, (bool, int, float)) else "no such number"
                raise ModelFileError(
                    f"{self.architecture}.{key} is {got}, expected {neutral}; this fbiedge knows no other"
                )
        tensors = self.file.tensors
        if "token_embd.weight" not in tensors or len(tensors["token_embd.weight"].shape) != 2:
            raise ModelFileError("the file has no token_embd.weight [vocabulary, hidden]; expected a whole model")
        bos, eos = bos_and_eos(self.file.metadata)
        heads, hidden = self.count("attention.head_count"), self.count("embedding_length")
        head_dim = self.count("attention.key_length", hidden // heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if self.count(key, head_dim) != head_dim:
                raise ModelFileError(
                    f"{self.architecture}.{key} is {self.count(key)}, expected the {head_dim} of attention.key_length"
                )
        feed_forward = self.count("feed_forward_length")
        true_feed_forward = metadata_value(self.file.metadata, TRUE_FEED_FORWARD, int, feed_forward)
        epsilon = metadata_value(self.file.metadata, self.key("attention.layer_norm_rms_epsilon"), float)
        if epsilon is None:
            raise self.missing("attention.layer_norm_rms_epsilon")
        return ModelConfig(
            vocab_size=tensors["token_embd.weight"].shape[0],
            hidden_size=hidden,
            intermediate_size=feed_forward if true_feed_forward is None else true_feed_forward,
            num_hidden_layers=self.count("block_count"),
            num_attention_heads=heads,
            num_key_value_heads=self.count("attention.head_count_kv", heads),
            head_dim=head_dim,
            max_position_embeddings=self.count("context_length"),
            rms_norm_eps=epsilon,
            rope_theta=self.number("rope.freq_base", 10000.0),
            bos_token_id=bos,
            eos_token_id=eos,
            tie_word_embeddings="output.weight" not in tensors,
            scaling_pattern=self.pattern(),
            model_type=self.architecture,
            rope_scaling=self.rope_scaling(head_dim),
        )

    def pattern(self) -> ScalingPattern:
        linears = tuple(f".{_LAYER_NAMES[name]}.weight" for name in _LAYER_NAMES if name.endswith("_proj"))
        types = {tensor.ggml_type for name, tensor in self.file.tensors.items() if name.endswith(linears)}
        return "block" if "Q1_0" in types else "none"

    def rope_scaling(self, head_dim: int) -> RopeScaling | None:
        """llama.cpp's rules: the type is linear unless stated, and a factor of 0 is none."""
        kind = metadata_value(self.file.metadata, self.key("rope.scaling.type"), str, "linear")
        factor = self.number("rope.scaling.factor", self.number("rope.scale_linear", 0.0)) or 1.0
        if kind == "none":
            factor = 1.0
        elif kind not in ("linear", "yarn"):
            raise ModelFileError(f"{self.key('rope.scaling.type')} is {kind!r}, expected none, linear or yarn")
        divisors = self.rope_factors(head_dim)
        if kind == "yarn":
            if divisors:
                raise ModelFileError(f"the file has YaRN and {ROPE_FACTORS}, expected one of the two")
            return RopeScaling(
                rope_type="yarn",
                factor=factor,
                original_max_position_embeddings=self.count(
                    "rope.scaling.original_context_length", self.count("context_length")
                ),
                beta_fast=32.0,  # whatever the file says, see _NEUTRAL
                beta_slow=1.0,
            )
        if divisors:
            return RopeScaling(rope_type="factors", factors=tuple(factor * divisor for divisor in divisors))
        return None if factor == 1.0 else RopeScaling(rope_type="linear", factor=factor)

    def rope_factors(self, head_dim: int) -> list[float]:
        """A divisor for each frequency; Llama 3's converter writes them."""
        for name in ("rope_factors_long.weight", "rope_factors_short.weight"):
            if name in self.file.tensors:
                raise ModelFileError(f"the file has {name}, which this fbiedge can't compute")
        tensor = self.file.tensors.get(ROPE_FACTORS)
        if tensor is None:
            return []
        if self.architecture != "llama":
            raise ModelFileError(
                f"the file has {ROPE_FACTORS}, which llama.cpp takes in a llama alone; convert it again"
            )
        if tensor.shape != (head_dim // 2,):
            raise ModelFileError(f"{ROPE_FACTORS} has shape {tensor.shape}, expected {(head_dim // 2,)}")
        divisors: list[float] = dequantize(tensor, self.file.data(ROPE_FACTORS)).tolist()
        return divisors

    def count(self, key: str, default: int | None = None) -> int:
        """A positive number, which may be an array of the same for each layer. Raises ModelFileError."""
        value: Any = self.file.metadata.get(self.key(key))
        if value is None:
            if default is None:
                raise self.missing(key)
            return default
        if isinstance(value, np.ndarray):
            if not len(value) or (value != value[0]).any():
                raise ModelFileError(f"{self.key(key)} differs between layers, expected the same for all")
            value = value[0].item()
        if type(value) is not int or value <= 0:
            raise ModelFileError(f"{self.key(key)} is {value!r}, expected a positive integer")
        return value

    def number(self, key: str, default: float) -> float:
        value = metadata_value(self.file.metadata, self.key(key), float, default)
        return default if value is None else value

    def key(self, key: str) -> str:
        return f"{self.architecture}.{key}"

    def missing(self, key: str) -> ModelFileError:
        return ModelFileError(f"the file lacks the key {self.key(key)}; convert the model again")
