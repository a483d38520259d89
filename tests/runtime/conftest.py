"""Tiny models that the runtime's tests share; files are written once and never changed."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny_model import CHAT_TEMPLATE, tiny_model

NO_LIBRARY = "/nonexistent/libfbiedge_ops.so"


@pytest.fixture(scope="session")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a chat template. Its checkpoint lies beside it as `checkpoint`."""
    return tiny_model(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a chat template and a context of 512."""
    folder = tmp_path_factory.mktemp("chat")
    return tiny_model(folder, chat_template=CHAT_TEMPLATE, max_position_embeddings=512)


@pytest.fixture(scope="session")
def external_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose weights lie in a file of their own."""
    return tiny_model(tmp_path_factory.mktemp("external"), export={"embed_limit_bytes": 0})


@pytest.fixture(params=["library", "fallback"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Sessions run on the op library, or on stock ops because there is none."""
    if request.param == "fallback":
        monkeypatch.setenv("FBIEDGE_OPS_LIBRARY", NO_LIBRARY)
    return str(request.param)
