"""The two engines that run an exported file: our op library, and the fallback in stock operators without it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.checkpoints import small_checkpoint, small_config

from fbiedge.config import ModelConfig
from fbiedge.weights import Weights, open_checkpoint


@pytest.fixture(params=["library", "fallback"])
def library(request: pytest.FixtureRequest) -> Path | None:
    """The op library's path, and None for the fallback."""
    if request.param == "fallback":
        return None
    from fbiedge.ops_library import library_path

    return library_path()


@pytest.fixture
def make_weights(tmp_path: Path) -> Callable[[ModelConfig], Weights]:
    """A small random checkpoint of the given config, opened."""

    def make(config: ModelConfig) -> Weights:
        folder = tmp_path / "checkpoint"
        small_checkpoint(folder, config)
        return open_checkpoint(folder)

    return make


@pytest.fixture
def weights(make_weights: Callable[[ModelConfig], Weights]) -> Weights:
    """A small column model that ONNX Runtime's attention takes (heads of 16)."""
    return make_weights(small_config("column", head_dim=16))
