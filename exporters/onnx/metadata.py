"""What travels in the file beside the weights: `metadata_props`, all text, all keys beginning with `fbiedge.`.

fbiedge.format_version      "1"; a reader refuses others
fbiedge.producer            e.g. "fbiedge 0.1.0"
fbiedge.config              config.json
fbiedge.tokenizer           tokenizer.json                                    (absent where the checkpoint had none)
fbiedge.tokenizer_config    tokenizer_config.json                             (may be absent)
fbiedge.generation_config   generation_config.json                            (may be absent)
fbiedge.special_tokens_map  special_tokens_map.json                           (may be absent)
fbiedge.chat_template       Jinja text, from chat_template.jinja or tokenizer_config.json    (may be absent)
fbiedge.accuracy_level      "int8" | "fp32"
fbiedge.head                "int8" | "int4" | "fp32" | "1bit"
fbiedge.head_operator       "fbiedge" | "stock", whose operator computes it               (absent in old files: stock)
fbiedge.operators           "stock": none of ours is in the file              (absent in others)
fbiedge.kv_cache            "int8" | "fp32"                                   (absent in older files: fp32)
fbiedge.inventory           JSON, see plan.inventory
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import fbiedge
from fbiedge.config import ModelConfig
from fbiedge.errors import CheckpointError, ModelFileError
from fbiedge.model_file import FORMAT_VERSION, load_json

from .options import ExportOptions
from .sidecars import chat_template, check_sidecars

_FILE_KEYS = {
    "tokenizer.json": "fbiedge.tokenizer",
    "tokenizer_config.json": "fbiedge.tokenizer_config",
    "generation_config.json": "fbiedge.generation_config",
    "special_tokens_map.json": "fbiedge.special_tokens_map",
    "chat_template.jinja": "fbiedge.chat_template",
}


def make_metadata(
    config: ModelConfig, files: Mapping[str, str], options: ExportOptions, inventory: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    """The properties of a new file. Raises CheckpointError for `files` that the runtime couldn't use."""
    check_sidecars(files)
    metadata = {
        "fbiedge.format_version": FORMAT_VERSION,
        "fbiedge.producer": f"fbiedge {fbiedge.__version__}",
        "fbiedge.config": json.dumps(config.to_dict(), indent=2),
        "fbiedge.accuracy_level": options.accuracy_level,
        "fbiedge.head": options.head,
        "fbiedge.kv_cache": options.cache(config),
        "fbiedge.head_operator": "fbiedge" if options.head != "fp32" and options.ours(config) else "stock",
        "fbiedge.inventory": json.dumps(list(inventory)),
    }
    if options.operators == "stock":
        metadata["fbiedge.operators"] = "stock"
    metadata |= {key: files[name] for name, key in _FILE_KEYS.items() if name in files}
    if template := chat_template(files):
        metadata["fbiedge.chat_template"] = template
    return metadata


def read_metadata(metadata: Mapping[str, str], what: object) -> tuple[ModelConfig, dict[str, str]]:
    """Config and sidecar files by name, from a file's properties. Raises ModelFileError where they aren't ours."""
    version = metadata.get("fbiedge.format_version")
    if version is None:
        raise ModelFileError(f"{what} is ONNX but was not written by fbiedge; make one with `fbiedge export`")
    if version != FORMAT_VERSION:
        raise ModelFileError(
            f"{what} has format version {version}, this fbiedge reads {FORMAT_VERSION}; update fbiedge or export again"
        )
    try:
        config = ModelConfig.from_dict(load_json(metadata["fbiedge.config"]))
    except (KeyError, ValueError, AttributeError, CheckpointError) as error:
        raise ModelFileError(f"{what} has unusable metadata fbiedge.config ({error}); export it again") from error
    return config, {name: metadata[key] for name, key in _FILE_KEYS.items() if key in metadata}
