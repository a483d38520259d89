"""Where a model comes from, as far as the files beside its weights say."""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import dataclass, fields
from pathlib import Path

from fbiedge.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Texts for people; empty where nothing is known. Raises UsageError for what is no line of text."""

    name: str = "model"
    base_model: str = ""
    license: str = ""
    recipe: str = ""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not _is_line(value):
                raise UsageError(
                    f"{field.name} is {value!r}, expected one line of valid UTF-8 without control characters"
                )


def read_provenance(checkpoint: Path) -> Provenance:
    """From the model card README.md in a checkpoint folder, and run.json, which `fbiedge train` writes above it."""
    card = _front_matter(_text(checkpoint / "README.md"))
    return Provenance(
        base_model=card.get("base_model", ""),
        license=card.get("license", ""),
        recipe=_recipe(_text(checkpoint / "run.json") or _text(checkpoint.parent / "run.json")),
    )


def _is_line(text: str) -> bool:
    """Without control characters, separators of lines, and the surrogates that stand for undecodable bytes."""
    return not any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in text)


def _front_matter(text: str) -> dict[str, str]:
    """The pairs of one line each at the beginning of a model card, between lines of `---`; lists give their first entry."""
    found = re.match(r"---\s*\n(.*?\n)---\s*\n", text, re.DOTALL)
    pairs = re.findall(r"^(\w+):[ \t]*(?:\n-[ \t]*)?(\S[^\n]*)$", found[1] if found else "", re.MULTILINE)
    return {key: value.strip("\"' []") for key, value in pairs if _is_line(value.strip())}


def _recipe(text: str) -> str:
    """The settings of a training, without the paths of the machine it ran on."""
    try:
        settings = json.loads(text)["training"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return json.dumps(settings)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
