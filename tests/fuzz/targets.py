"""What is damaged, and what is then done with it: small sound files of every kind that fbiedge reads."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import onnx
from fuzz.mutations import damage_bytes, damage_cache, damage_json, damage_model
from support.checkpoints import small_config
from support.gguf_checkpoints import gguf_checkpoint, gguf_config
from support.gguf_models import write_model
from support.random_weights import random_weights
from support.tiny_model import CHAT_TEMPLATE, tiny_checkpoint
from support.vocabularies import byte_level_metadata, sentence_piece_metadata

from fbiedge.exporters.gguf import export_gguf
from fbiedge.exporters.onnx import export_onnx
from fbiedge.gguf_file import GgufFile
from fbiedge.weights import open_checkpoint

RUN = ("generate", "IN", "-p", "he said", "--max-tokens", "3", "--temperature", "0", "--threads", "1")
CHAT = ("chat", "IN", "--max-tokens", "2", "--temperature", "0", "--threads", "1")
INSPECT = ("inspect", "IN")
EVAL = ("eval", "IN", "--text", "IN/config.json", "--max-tokens", "8")
TO_ONNX = ("export", "IN", "-o", "OUT/out.onnx")
CACHED = (*RUN, "--prompt-cache", "IN.cache")
TO_GGUF = ("export", "IN", "--allow-lossy", "-o", "OUT/out.gguf")

_SIZES = {"hidden_size": 128, "intermediate_size": 172}


@dataclass(frozen=True)
class Target:
    """`files` by their path below one folder; IN of a command is `opened` there."""

    name: str
    files: Mapping[str, bytes]
    opened: str
    damaged: tuple[str, ...]  # of the files
    commands: tuple[tuple[str, ...], ...]
    places: Mapping[str, list[tuple[int, int]]] = field(default_factory=dict)  # in them, what isn't weights


def targets(folder: Path) -> list[Target]:
    """All of them, made in `folder`."""
    models = [*_onnx(folder), *_gguf(folder), *_checkpoints(folder)]
    return [*models, *(_cache(folder, name) for name in ("onnx", "onnx-fp32-cache", "gguf-qwen3"))]


def damage(target: Target, found: list[Target], random: Random) -> tuple[dict[str, bytes], str]:
    """The target's files with one of them damaged, and what was done to it."""
    name = random.choice(target.damaged)
    content = target.files[name]
    if name.endswith(".json") and random.random() < 0.7:
        damaged = damage_json(content.decode(), random).encode(errors="surrogatepass")
        return {**target.files, name: damaged}, f"JSON of {name}"
    if name.endswith(".onnx") and random.random() < 0.7:
        return {**target.files, name: damage_model(content, random)}, f"fields of {name}"
    if name.endswith(".cache") and random.random() < 0.7:
        other = random.choice(list(random.choice(found).files.values()))
        return {**target.files, name: damage_cache(content, random, other)}, f"parts of {name}"
    others = [other.files[file] for other in found for file in other.files if file.endswith(Path(name).suffix)]
    damaged = damage_bytes(content, random, target.places.get(name, []), random.choice(others))
    return {**target.files, name: damaged}, f"bytes of {name}"


def _onnx(folder: Path) -> list[Target]:
    source = tiny_checkpoint(
        folder / "source", chat_template=CHAT_TEMPLATE, generation_config={"eos_token_id": [2]}, **_SIZES
    )
    weights = open_checkpoint(source)
    qwen3 = small_config(
        "block", vocab_size=259, head_dim=16, hidden_size=128, num_hidden_layers=1, model_type="qwen3",
        tie_word_embeddings=True,
    )  # fmt: skip
    tied = random_weights(qwen3, binary_head=True)
    tied = type(tied)(config=tied.config, binary_rows=True, files=weights.files)
    found = []
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "onnx": (weights, {}),
        "onnx-fp32-cache": (weights, {"kv_cache": "fp32", "head": "fp32", "accuracy_level": "fp32"}),
        "onnx-external": (weights, {"embed_limit_bytes": 0}),
        "onnx-stock": (weights, {"operators": "stock"}),
        "onnx-unfolded": (weights, {"operators": "stock", "stock_bits": 1}),
        "onnx-qwen3": (tied, {}),
    }
    for name, (of, options) in kinds.items():
        path = folder / name / "model.onnx"
        path.parent.mkdir(parents=True)
        export_onnx(of, path, **options)
        commands = (RUN, CHAT, INSPECT, TO_ONNX, TO_GGUF) if name == "onnx" else (RUN, TO_ONNX)
        damaged = tuple(file.name for file in sorted(path.parent.iterdir()))
        found.append(
            Target(name, _read(path.parent), "model.onnx", damaged, commands, {"model.onnx": _structure(path)})
        )
    return found


def _gguf(folder: Path) -> list[Target]:
    found = []
    sizes = {"head_dim": 16, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8}
    for name, vocabulary, changes in (
        ("gguf-qwen3", byte_level_metadata("qwen2"), {"model_type": "qwen3"}),
        ("gguf-llama", sentence_piece_metadata({"tokenizer.chat_template": CHAT_TEMPLATE}), {}),
    ):
        path = folder / name / "model.gguf"
        path.parent.mkdir(parents=True)
        size = len(vocabulary["tokenizer.ggml.tokens"])
        write_model(path, small_config("block", vocab_size=size, num_hidden_layers=1, **sizes, **changes), vocabulary)
        places = {"model.gguf": [(0, min(tensor.offset for tensor in GgufFile.open(path).tensors.values()))]}
        found.append(
            Target(name, _read(path.parent), "model.gguf", ("model.gguf",), (RUN, CHAT, INSPECT, TO_ONNX), places)
        )
    path = folder / "gguf-adapter" / "model.gguf"
    weights = gguf_checkpoint(folder / "source-of-gguf", gguf_config("column", num_hidden_layers=1))
    path.parent.mkdir(parents=True)
    export_gguf(weights, path, verify_ids=None)
    adapter = "model.beta.gguf"
    places = {adapter: [(0, min(tensor.offset for tensor in GgufFile.open(path.with_name(adapter)).tensors.values()))]}
    found.append(Target("gguf-adapter", _read(path.parent), "model.gguf", (adapter,), (RUN, INSPECT, TO_ONNX), places))
    return found


def _checkpoints(folder: Path) -> list[Target]:
    found = []
    for name, changes in (("column", {}), ("qwen3", {"model_type": "qwen3", "scaling_pattern": "block"})):
        place = tiny_checkpoint(
            folder / f"checkpoint-{name}", chat_template=CHAT_TEMPLATE, num_hidden_layers=1, **_SIZES,
            generation_config={"eos_token_id": [2], "temperature": 0.7}, **changes,
        )  # fmt: skip
        content = (place / "model.safetensors").read_bytes()
        places = {"model.safetensors": [(0, 8 + int.from_bytes(content[:8], "little"))]}
        files = _read(place)
        damaged = tuple(sorted(files)) + ("model.safetensors",) * 3
        commands = (INSPECT, TO_ONNX, TO_GGUF, EVAL)
        found.append(Target(f"checkpoint-{name}", files, ".", damaged, commands, places))
    return found


def _cache(folder: Path, name: str) -> Target:
    """A prompt cache beside its model. Written by a process of its own: the threads of a session don't survive forks."""
    place = shutil.copytree(folder / name, folder / f"cache-{name}")
    (model,) = place.iterdir()
    command = [word.replace("IN", str(model)) for word in CACHED]
    subprocess.run([sys.executable, "-m", "fbiedge.cli", *command], check=True, capture_output=True)
    return Target(f"cache-{name}", _read(place), model.name, (f"{model.name}.cache",), (CACHED,))


def _read(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _structure(path: Path) -> list[tuple[int, int]]:
    """Where the file holds something else than weights and texts."""
    content = path.read_bytes()
    model = onnx.load(path, load_external_data=False)
    held = [tensor.raw_data for tensor in model.graph.initializer] + [
        entry.value.encode() for entry in model.metadata_props
    ]
    taken = []
    for data in held:
        if len(data) > 200:
            start = content.index(data)
            taken.append((start, start + len(data)))
    edges = [0, *(edge for span in sorted(taken) for edge in span), len(content)]
    return [(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if end > start]
