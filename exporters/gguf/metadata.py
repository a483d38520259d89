"""The pairs of model.gguf: what llama.cpp asks for, and what it doesn't know, under fbiedge.

general.*, llama.* (or qwen3.*), tokenizer.*   as llama.cpp's own converters write them
general.sampling.*            generation_config.json's recommendations
fbiedge.format_version        "1"
fbiedge.producer              e.g. "fbiedge 0.1.0"
fbiedge.scaling_pattern       of the source: column, row, single, block
fbiedge.exact                 bool: the linears lost nothing but by rounding scales to fp16
fbiedge.feed_forward_length   the FFN's size without padding
fbiedge.weights_sha256        of all tensor data in this file, hexadecimal; an adapter names it as fbiedge.beta_of
fbiedge.recipe                how the model was trained, where the exporter was told
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import isclose
from typing import Any

import gguf  # noqa: TID253

import fbiedge
from fbiedge.config import ModelConfig
from fbiedge.errors import CheckpointError
from fbiedge.model_file import load_json
from fbiedge.sampling import SamplingOptions

from ..onnx.sidecars import chat_template
from .plan import padded_ffn
from .provenance import Provenance
from .storage import GgufOptions
from .vocabulary import Vocabulary

FORMAT_VERSION = "1"
HASH_KEY = "fbiedge.weights_sha256"
HASH_PLACEHOLDER = "0" * 64
# What llama.cpp computes with whatever a file of these architectures says (found in 0.3.36 of llama-cpp-python).
_YARN_RAMP = (32.0, 1.0)

_FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q1_0": gguf.LlamaFileType.MOSTLY_Q1_0,
}


def add_metadata(
    writer: gguf.GGUFWriter,
    config: ModelConfig,
    files: Mapping[str, str],
    vocabulary: Vocabulary,
    options: GgufOptions,
    provenance: Provenance,
    *,
    exact: bool,
) -> None:
    """All pairs, of a config that check_rope lets pass; the hash is a placeholder of its length."""
    binary = config.scaling_pattern != "none"
    # 1. What it is.
    writer.add_type("model")
    writer.add_name(provenance.name)
    if provenance.license:
        writer.add_license(provenance.license)
    if provenance.base_model:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, provenance.base_model)
    writer.add_file_type(_FILE_TYPES["q1_0" if binary else options.head])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    # 2. Its shape.
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(padded_ffn(config))
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    _add_rope_scaling(writer, config)
    # 3. Its tokenizer, template and sampling.
    _add_vocabulary(writer, vocabulary)
    if template := chat_template(files):
        writer.add_chat_template(template)
    _add_sampling(writer, files)
    # 4. What only we know.
    writer.add_string("fbiedge.format_version", FORMAT_VERSION)
    writer.add_string("fbiedge.producer", f"fbiedge {fbiedge.__version__}")
    if binary:
        writer.add_string("fbiedge.scaling_pattern", config.scaling_pattern)
        writer.add_bool("fbiedge.exact", exact)
    writer.add_uint32("fbiedge.feed_forward_length", config.intermediate_size)
    writer.add_string("fbiedge.recipe", provenance.recipe)
    writer.add_string(HASH_KEY, HASH_PLACEHOLDER)


def check_rope(config: ModelConfig) -> None:
    """Raises CheckpointError for RoPE that llama.cpp doesn't have, whatever a file says (see fbiedge.rope)."""
    scaling = config.rope_scaling
    if scaling is None:
        return
    if config.model_type != "llama" and scaling.rope_type in ("llama3", "factors"):
        raise CheckpointError(
            f"config: llama.cpp has RoPE of type {scaling.rope_type!r} for models of type 'llama' only, and this one is "
            f"{config.model_type!r}; export it to ONNX"
        )
    ramp = (scaling.beta_fast, scaling.beta_slow) if scaling.rope_type == "yarn" else _YARN_RAMP
    computed = replace(scaling, attention_factor=None).magnitude
    if not isclose(scaling.magnitude, computed, rel_tol=1e-6) or not scaling.truncate or ramp != _YARN_RAMP:
        raise CheckpointError(
            f"config: llama.cpp has no RoPE of type {scaling.rope_type!r} with an attention_factor other than "
            f"{computed:.6g}, other betas than {_YARN_RAMP[0]:g} and {_YARN_RAMP[1]:g}, or without truncate; export it to "
            "ONNX"
        )


def _add_rope_scaling(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    """llama3 and factors travel as the tensor rope_freqs.weight."""
    scaling = config.rope_scaling
    if scaling is None:
        return
    if scaling.rope_type == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling.factor)
    elif scaling.rope_type == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling.factor)
        writer.add_rope_scaling_orig_ctx_len(scaling.original_max_position_embeddings)
        writer.add_rope_scaling_yarn_beta_fast(scaling.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(scaling.beta_slow)


def _add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges is not None:
        # Written also where there are none, which add_token_merges would leave out.
        kinds = gguf.GGUFValueType
        writer.add_key_value("tokenizer.ggml.merges", vocabulary.merges, kinds.ARRAY, sub_type=kinds.STRING)
    for name, token_id in vocabulary.special.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token_id)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    if vocabulary.add_space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.add_space_prefix)


def _add_sampling(writer: gguf.GGUFWriter, files: Mapping[str, str]) -> None:
    raw: dict[str, Any] = load_json(files.get("generation_config.json", "{}"))
    if raw.get("do_sample") is False:
        return
    stated = SamplingOptions.from_generation_config(raw)
    for key, name, add in (
        ("temperature", "temperature", writer.add_sampling_temp),
        ("top_k", "top_k", writer.add_sampling_top_k),
        ("top_p", "top_p", writer.add_sampling_top_p),
        ("min_p", "min_p", writer.add_sampling_min_p),
        ("repetition_penalty", "repetition_penalty", writer.add_sampling_penalty_repeat),
    ):
        if raw.get(key) is not None:
            add(getattr(stated, name))
