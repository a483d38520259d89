"""What several areas of tests share: the folder of real data beside the checkout, and stories260K made from it."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

SHARED_DATA = Path(__file__).resolve().parents[1] / "../shared/data"


def pytest_configure() -> None:
    """Ctrl-C is ignored in what a script starts with `&`, and then in the programs that tests start and interrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real corpora, tokenizers and weights; a test that needs it is skipped where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip("needs ../shared/data beside the checkout")
    return SHARED_DATA


@pytest.fixture(scope="session")
def stories260k(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of stories260K, an ordinary Llama trained by somebody else."""
    from support.stories260k import convert

    out = tmp_path_factory.mktemp("stories260k") / "checkpoint"
    convert(shared_data / "weights/stories260K", out)
    return out
