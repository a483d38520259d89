"""What the page must know about a model before it downloads it: /model.json.

Everything that the CLI decides from a model's metadata is decided here too, by the same functions: which tokens end a
text, which chat template is meant, which sampling is recommended. The page only carries it out.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .. import __version__
from ..chat_template import ChatTemplate
from ..errors import ModelFileError
from ..generate import end_tokens
from ..model_file import ModelFile
from ..sampling import SamplingOptions
from ..tokenizer import Tokenizer


def model_files(model: ModelFile) -> dict[str, Path]:
    """The files of `model` by the paths they are served under, the graph first."""
    names = [model.path.name, *model.external_bytes]
    return {f"/model/{quote(name)}": model.path.parent / name for name in names}


def describe(model: ModelFile) -> dict[str, Any]:
    """JSON for the page. Raises ModelFileError for a model without a tokenizer or with unusable metadata."""
    tokenizer = Tokenizer.from_model(model)
    template = ChatTemplate.from_model(model)
    config = model.config
    recommended = asdict(SamplingOptions.from_generation_config(model.json_object("generation_config")))
    del recommended["seed"]
    sizes = [model.file_bytes, *model.external_bytes.values()]
    return {
        "name": _name(model.path),
        "version": __version__,
        "files": [
            {"url": url, "name": path.name, "bytes": size}
            for (url, path), size in zip(model_files(model).items(), sizes, strict=True)
        ],
        "shape": f"{config.num_hidden_layers} layers × {config.hidden_size}, vocabulary {config.vocab_size}",
        "vocabSize": config.vocab_size,
        "capacity": config.max_position_embeddings,
        "kvCache": model.kv_cache,
        "needsF16": _looks_up_fp16(model),
        "ends": sorted(end_tokens(model, tokenizer)),
        "tokenizer": model.json("tokenizer"),
        "bos": tokenizer.token_id(tokenizer.bos_token) if tokenizer.bos_token else None,
        "addBos": bool(tokenizer.config.get("add_bos_token")),
        "template": None if template is None else {"source": template.source, "specialTokens": template.special_tokens},
        "sampling": recommended,
    }


def _name(path: Path) -> str:
    """What a user calls it: a folder's name where the file is called model.onnx."""
    return path.resolve().parent.name if path.name == "model.onnx" else path.stem


def _looks_up_fp16(model: ModelFile) -> bool:
    """Whether the embedding is fp16, or int8 or int4 with scales of fp16: that runs on no GPU without 16-bit floats."""
    rows = model.json("inventory") or []
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ModelFileError(f"{model.path} has an unusable fbiedge.inventory; export it again")
    forms = [str(row.get("form")) for row in rows if row.get("group") == "embedding"]
    return any(form.startswith(("fp16", "int8", "int4")) for form in forms)
