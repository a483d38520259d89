"""The files beside the weights, tried out by the runtime's own code before anything is written.

So what an export brings along is what chat and generate can use, or the export says what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Mapping

from fbiedge.chat_template import ChatTemplate
from fbiedge.errors import CheckpointError, FbiEdgeError
from fbiedge.generate import listed_ids
from fbiedge.sampling import SamplingOptions
from fbiedge.tokenizer import Tokenizer
from fbiedge.weights import json_sidecar


def check_sidecars(files: Mapping[str, str]) -> None:
    """Raises CheckpointError, which names the file, where the runtime couldn't use one of `files`."""
    tokenizer_config = json_sidecar(files, "tokenizer_config.json")
    json_sidecar(files, "special_tokens_map.json")
    generation_config = json_sidecar(files, "generation_config.json")
    try:
        name = "generation_config.json"
        SamplingOptions.from_generation_config(generation_config)
        listed_ids(generation_config, "eos_token_id")
        if "tokenizer.json" in files:
            name = "tokenizer.json"
            Tokenizer(files[name], tokenizer_config)
        if template := chat_template(files):
            name = "chat_template.jinja" if "chat_template.jinja" in files else "tokenizer_config.json"
            ChatTemplate(template)
    except FbiEdgeError as error:
        raise CheckpointError(f"{name} can't be used: {error}") from error


def chat_template(files: Mapping[str, str]) -> str | None:
    """The template's text, from a file of its own or from tokenizer_config.json. Raises CheckpointError."""
    template = files.get("chat_template.jinja") or json_sidecar(files, "tokenizer_config.json").get("chat_template")
    return template if isinstance(template, str) else None
