"""What is inside a model.onnx, a model.gguf or a checkpoint: architecture, scale form, bits a weight by group of tensors, sizes.

From metadata and shapes alone: no weight is read, so a 7B model takes no longer than a tiny one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import BLOCK_SIZE, ModelConfig
from .engines import is_checkpoint, is_gguf
from .errors import ModelFileError, printable
from .model_file import ModelFile

if TYPE_CHECKING:
    from .gguf_file import GgufTensor


@dataclass(frozen=True, kw_only=True)
class Group:
    """Tensors of one kind. `bytes` as stored, scales included."""

    group: str
    tensors: int
    parameters: int
    bytes: int
    form: str

    @property
    def bits_per_weight(self) -> float:
        """Stored bits by parameter, scales included."""
        return 8 * self.bytes / self.parameters if self.parameters else 0.0


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """One model or checkpoint."""

    path: Path
    kind: str  # "onnx", "gguf" or "checkpoint"
    config: ModelConfig
    groups: tuple[Group, ...]
    files: dict[str, int]  # bytes by file name
    properties: dict[str, str]  # what else there is to say, by name

    @property
    def parameters(self) -> int:
        """Parameters of all groups."""
        return sum(group.parameters for group in self.groups)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "config": asdict(self.config),
            "parameters": self.parameters,
            "groups": [{**asdict(group), "bits_per_weight": group.bits_per_weight} for group in self.groups],
            "files": self.files,
            "properties": self.properties,
        }


def inspect(path: Path) -> Inspection:
    """Inspect a model.onnx, a model.gguf or a checkpoint folder. Raises ModelFileError, CheckpointError."""
    path = Path(path)
    if is_checkpoint(path):
        found = _inspect_checkpoint(path)
    elif is_gguf(path):
        found = _inspect_gguf(path)
    else:
        found = _inspect_onnx(ModelFile.open(path))
    return replace(found, properties={name: printable(text) for name, text in found.properties.items()})


def _inspect_onnx(model: ModelFile) -> Inspection:
    inventory = model.json("inventory") or []
    try:
        groups = tuple(
            Group(**{name: entry[name] for name in ("group", "tensors", "parameters", "bytes", "form")})
            for entry in inventory
        )
        if not all(isinstance(number, int) for g in groups for number in (g.tensors, g.parameters, g.bytes)):
            raise TypeError
    except (KeyError, TypeError) as error:
        raise ModelFileError(f"{model.path} has an unusable fbiedge.inventory; export it again") from error
    sizes = {
        key: f"{len(text.encode()):,} bytes"
        for key, text in model.metadata.items()
        if key in ("config", "tokenizer", "tokenizer_config", "chat_template", "generation_config")
    }
    return Inspection(
        path=model.path,
        kind="onnx",
        config=model.config,
        groups=groups,
        files={model.path.name: model.file_bytes, **model.external_bytes},
        properties={
            "scale form": model.config.scaling_pattern,
            "accuracy level": model.accuracy_level,
            "head": model.metadata.get("head", "unknown"),
            "kv cache": model.kv_cache,
            **({"operators": model.metadata["operators"]} if "operators" in model.metadata else {}),
            "format version": model.metadata["format_version"],
            "producer": model.metadata.get("producer", "unknown"),
            **{f"metadata {key}": size for key, size in sizes.items()},
        },
    )


def _inspect_gguf(path: Path) -> Inspection:
    """From the header; an adapter beside the model counts among the files alone.

    Parameters are those of the model: what an FFN was padded by is none, and as everywhere RoPE's factors are none.
    """
    from .gguf_file import GgufFile
    from .gguf_model import find_adapter, gguf_name, missing_adapter, open_gguf_model

    file = GgufFile.open(path)
    model = open_gguf_model(file)
    tensors: dict[str, list[GgufTensor]] = {}
    for tensor in file.tensors.values():
        tensors.setdefault(_gguf_group(tensor.name), []).append(tensor)
    adapter = find_adapter(file)
    missing = missing_adapter(file, adapter)
    true_shapes = {
        gguf_name(f"model.layers.0.{name}.weight").removeprefix("blk.0."): shape
        for name, shape in model.config.linear_shapes().items()
    }

    def parameters(tensor: GgufTensor) -> int:
        return prod(true_shapes.get(tensor.name.split(".", 2)[-1], tensor.shape))

    return Inspection(
        path=path,
        kind="gguf",
        config=model.config,
        groups=tuple(
            Group(
                group=group,
                tensors=len(members),
                parameters=0 if group == "rope" else sum(map(parameters, members)),
                bytes=sum(tensor.nbytes for tensor in members),
                form=" and ".join(sorted({tensor.ggml_type for tensor in members})),
            )
            for group, members in tensors.items()
        ),
        files={entry.name: entry.stat().st_size for entry in (path, adapter) if entry},
        properties={
            "scale form": str(file.metadata.get("fbiedge.scaling_pattern", model.config.scaling_pattern)),
            "GGUF architecture": model.config.model_type,
            "name": str(file.metadata.get("general.name", "unknown")),
            "producer": str(file.metadata.get("fbiedge.producer", model.metadata["producer"])),
            "tokenizer": str(file.metadata.get("tokenizer.ggml.model")),
            "chat template": "yes" if "chat_template" in model.metadata else "no",
            **({"warning": missing} if missing else {}),
        },
    )


def _gguf_group(name: str) -> str:
    """The group of a tensor, as in an inventory of ours."""
    if "norm" in name:
        return "norms"
    stems = {
        "token_embd": "embedding",
        "output.": "head",
        "rope_": "rope",
        "blk": "mlp" if ".ffn_" in name else "attention",
    }
    return next((group for stem, group in stems.items() if name.startswith(stem)), "other")


def _inspect_checkpoint(path: Path) -> Inspection:
    """From the shapes that config.json implies; opening the checkpoint checks that its tensors have them."""
    from .weights import open_checkpoint

    weights = open_checkpoint(path)
    config = weights.config
    layers = config.num_hidden_layers
    vocab_parameters = config.vocab_size * config.hidden_size
    of_heads = 2 * layers if config.has_head_norms else 0
    norms = (2 * layers + 1) * config.hidden_size + of_heads * config.head_dim
    groups = [Group(group="embedding", tensors=1, parameters=vocab_parameters, bytes=4 * vocab_parameters, form="full")]
    for kind in ("self_attn", "mlp"):
        shapes = [shape for name, shape in config.linear_shapes().items() if name.startswith(kind)]
        parameters = layers * sum(n * k for n, k in shapes)
        groups.append(
            Group(
                group="attention" if kind == "self_attn" else kind,
                tensors=layers * len(shapes),
                parameters=parameters,
                bytes=layers * sum(_packed_bytes(config, n, k) for n, k in shapes),
                form=config.scaling_pattern,
            )
        )
    tensors = 2 * layers + 1 + of_heads
    groups.append(Group(group="norms", tensors=tensors, parameters=norms, bytes=4 * norms, form="full"))
    if not config.tie_word_embeddings:
        groups.append(
            Group(group="head", tensors=1, parameters=vocab_parameters, bytes=4 * vocab_parameters, form="full")
        )
    return Inspection(
        path=path,
        kind="checkpoint",
        config=config,
        groups=tuple(groups),
        files={file.name: file.stat().st_size for file in sorted(path.iterdir()) if file.is_file()},
        properties={
            "scale form": config.scaling_pattern,
            "sizes": "packed bits and fp32 scales, as an export holds them",
        },
    )


def _packed_bytes(config: ModelConfig, n: int, k: int) -> int:
    match config.scaling_pattern:
        case "none":
            return 4 * n * k
        case "block":
            return -(-k // 8) * n + 2 * n * -(-k // BLOCK_SIZE)
        case "column":
            scales = 2 * k
        case "row":
            scales = 2 * n
        case "single":
            scales = 2
    return -(-k // 8) * n + 4 * scales
