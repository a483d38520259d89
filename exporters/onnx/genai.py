"""`export_genai`: weights -> a folder that onnxruntime-genai runs as it is (`fbiedge export M --genai -o FOLDER`).

    model.onnx               as `export_onnx` writes it, with a KV cache of fp32, and model.onnx.data for large models
    genai_config.json        shape, end tokens, and what generation_config.json says of sampling
    tokenizer.json, …        the files beside the weights

The model's names are genai's already, and its operators have bodies of stock ones. So the folder names no library: one
is loaded from it where an app says so, by Config.overlay (README.md beside this file).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fbiedge.config import ModelConfig
from fbiedge.errors import UsageError
from fbiedge.files import atomic_directory, require_only
from fbiedge.generate import end_tokens
from fbiedge.model_file import ModelFile
from fbiedge.tokenizer import Tokenizer
from fbiedge.weights import SIDECARS, Weights

from .export import ExportReport, export_onnx
from .sidecars import chat_template
from .writer import data_path

MODEL = "model.onnx"
CONFIG = "genai_config.json"
_WRITTEN = {MODEL, data_path(Path(MODEL)).name, CONFIG, *SIDECARS}
# Of generation_config.json, what genai calls the same, and the values that it takes.
_SEARCH = {
    "temperature": (1e-6, 1e6), "top_p": (1e-6, 1.0), "top_k": (0, 1e9), "repetition_penalty": (0.01, 100.0),
}  # fmt: skip


def export_genai(weights: Weights, folder: Path, **options: Any) -> ExportReport:
    """Write `folder`; the options are those of `export_onnx`. It appears whole or not at all.

    Raises what `export_onnx` raises, UsageError for weights without a tokenizer, and OutputError where `folder` holds
    anything that such an export wouldn't write: it is replaced as a whole.
    """
    folder = Path(folder)
    if "tokenizer.json" not in weights.files:
        raise UsageError("there is no tokenizer.json, which onnxruntime-genai needs; give one with --tokenizer FILE")
    if options.get("kv_cache") == "int8":
        raise UsageError("a KV cache of int8 is nothing for onnxruntime-genai; leave --kv-cache out")
    if any(folder.resolve() in path.resolve().parents for path in getattr(weights, "paths", ())):
        raise UsageError(f"{folder} holds the model that is exported; choose another folder for the output")
    require_only(folder, lambda entry: entry.is_file() and entry.name in _WRITTEN, "an export for onnxruntime-genai")
    with atomic_directory(folder) as staging:
        report = export_onnx(weights, staging / MODEL, **{**options, "kv_cache": "fp32"})
        texts = _sidecars(weights)
        model = ModelFile.open(staging / MODEL)
        ends = end_tokens(model, Tokenizer.from_model(model))
        generation = json.loads(texts.get("generation_config.json", "{}"))
        texts[CONFIG] = json.dumps(genai_config(weights.config, ends, generation), indent=2) + "\n"
        for name, text in texts.items():
            (staging / name).write_text(text, encoding="utf-8")
    return replace(
        report,
        model=folder / MODEL,
        data=folder / report.data.name if report.data else None,
        others=tuple(folder / name for name in texts),
    )


def genai_config(config: ModelConfig, ends: Iterable[int], generation: dict[str, Any]) -> dict[str, Any]:
    """genai_config.json's contents. `generation`: those of generation_config.json; greedy where it doesn't sample."""
    search: dict[str, Any] = {
        "do_sample": generation.get("do_sample") is True and generation.get("temperature") != 0,
        "max_length": config.max_position_embeddings,
        "past_present_share_buffer": True,  # the cache stays in place, as in our own sessions
    }
    for name, (low, high) in _SEARCH.items():
        value = generation.get(name)
        kind = int if name == "top_k" else (int, float)
        if isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high:
            search[name] = value
    # The config's own first, as what pads; genai takes any of the list for an end.
    listed = list(dict.fromkeys([config.eos_token_id, *sorted(ends)]))
    return {
        "model": {
            "type": config.model_type,
            "bos_token_id": config.bos_token_id,
            "eos_token_id": listed,
            "pad_token_id": listed[0],
            "context_length": config.max_position_embeddings,
            "vocab_size": config.vocab_size,
            "decoder": {
                "filename": MODEL,
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "hidden_size": config.hidden_size,
                "head_size": config.head_dim,
                "num_attention_heads": config.num_attention_heads,
                "num_key_value_heads": config.num_key_value_heads,
                "num_hidden_layers": config.num_hidden_layers,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": search,
    }


def _sidecars(weights: Weights) -> dict[str, str]:
    """The files beside the weights; genai looks for a tokenizer_config.json, and in it for the chat template."""
    texts = {name: weights.files[name] for name in SIDECARS if name in weights.files}
    config = json.loads(texts.get("tokenizer_config.json", "{}"))
    if template := chat_template(weights.files):
        config["chat_template"] = template
    config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    texts["tokenizer_config.json"] = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    return texts
