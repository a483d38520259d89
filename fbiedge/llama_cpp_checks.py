"""What llama.cpp doesn't refuse but ends the process over, found by giving it some 300 files that are wrong in one place.

GgufFile.open and config_from_gguf have seen to the container, the shape of the model and the tokenizer before; missing
tensors and wrong shapes llama.cpp refuses itself, with a reason.
"""

from __future__ import annotations

from .errors import ModelFileError
from .gguf_file import GgufFile, metadata_value

_MOST_LAYERS = 512
# Below the architecture's name; only files with experts or layers of another kind have them.
_FOREIGN_KEYS = ("expert_used_count", "expert_group_count", "expert_group_used_count", "nextn_predict_layers")
_NO_WEIGHTS = ("I8", "I16", "I32", "I64", "F64", "Q8_K")  # no product with these is defined


def check_for_llama_cpp(file: GgufFile) -> None:
    """Raises ModelFileError for a file that must not be handed to llama.cpp."""
    metadata = file.metadata
    architecture = metadata.get("general.architecture")
    kind = metadata_value(metadata, "general.type", str, "model")
    if kind != "model":
        raise ModelFileError(f"{file.path} is no model but of type {kind!r}; give the model's file")
    layers = metadata.get(f"{architecture}.block_count")
    if isinstance(layers, int) and layers > _MOST_LAYERS:
        raise ModelFileError(f"{file.path} has {layers} layers, llama.cpp takes at most {_MOST_LAYERS}")
    for key in _FOREIGN_KEYS:
        if metadata_value(metadata, f"{architecture}.{key}", int, 0) != 0:
            raise ModelFileError(f"{file.path} has {architecture}.{key}, expected a model without experts")
    for tensor in file.tensors.values():
        vector = len(tensor.shape) == 1
        if tensor.ggml_type != "F32" if vector else tensor.ggml_type in _NO_WEIGHTS:
            raise ModelFileError(
                f"{file.path}: {tensor.name} is of type {tensor.ggml_type}, which llama.cpp can't compute with; "
                "convert the model again"
            )


def check_adapter(file: GgufFile) -> None:
    """Raises ModelFileError for an adapter that is not of the form that our exporter writes (exporters/gguf/adapter.py)."""
    for key, kind in (("general.type", str), ("adapter.type", str), ("adapter.lora.alpha", float)):
        if not isinstance(file.metadata.get(key), kind):
            raise ModelFileError(f"{file.path} has {file.metadata.get(key)!r} as {key}; export the model again")
    for tensor in file.tensors.values():
        if tensor.ggml_type != "F32" or len(tensor.shape) != 2:
            raise ModelFileError(
                f"{file.path}: {tensor.name} is {tensor.ggml_type} of shape {tensor.shape}, expected an F32 matrix; "
                "export the model again"
            )
