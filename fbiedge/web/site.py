"""All that `fbiedge web` serves, by its path: the page, its libraries, the model and what is said about it."""

from __future__ import annotations

import json
from pathlib import Path

from ..model_file import ModelFile
from .description import describe, model_files
from .server import Resource

PAGE = Path(__file__).parent / "page"


def make_site(model: ModelFile, libraries: dict[str, Path]) -> dict[str, Resource]:
    """Resources for the server. Raises ModelFileError for a model that can't be chatted with."""
    # A lone surrogate, which JSON may spell and UTF-8 may not, becomes "?", as it does before it is tokenized.
    described = json.dumps(describe(model), ensure_ascii=False, separators=(",", ":")).encode(errors="replace")
    page = {f"/{path.name}": Resource(path) for path in sorted(PAGE.iterdir()) if path.is_file()}
    return {
        **page,
        "/": page["/index.html"],
        "/model.json": Resource(described, "application/json"),
        **{url: Resource(path) for url, path in model_files(model).items()},
        **{f"/lib/{name}": Resource(path) for name, path in libraries.items()},
    }
