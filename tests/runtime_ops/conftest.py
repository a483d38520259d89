"""One installation of the op library for all tests that use it as an app does."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.native import install


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prefix of `cmake --install`."""
    folder = tmp_path_factory.mktemp("op library")
    return install(folder / "build", folder / "prefix")
