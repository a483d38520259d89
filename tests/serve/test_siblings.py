"""Sessions that share one model's weights: each has its own cache, and the model lives as long as any of them."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest
from support.tiny_gguf import tiny_gguf
from support.tiny_model import tiny_model

from fbiedge.cached_session import CachedSession
from fbiedge.engines import open_session

FIRST, SECOND = [1, *range(5, 25)], [1, *range(40, 70)]


@pytest.fixture(params=["onnx", "gguf"], scope="module")
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("siblings")
    return tiny_model(folder) if request.param == "onnx" else tiny_gguf(folder, max_position_embeddings=64)


def alone(path: Path, ids: list[int]) -> np.ndarray:
    session = open_session(path)
    return np.stack([session.forward([token_id]) for token_id in ids])


def test_interleaved_they_compute_what_each_computes_alone(path: Path) -> None:
    session = open_session(path)
    siblings: list[CachedSession] = [session, session.sibling(), session.sibling().sibling()]
    texts = [FIRST, SECOND, FIRST[::-1]]
    rows: list[list[np.ndarray]] = [[], [], []]
    for at in range(max(map(len, texts))):
        for index, ids in enumerate(texts):
            if at < len(ids):
                rows[index].append(siblings[index].forward([ids[at]]))
    for index, ids in enumerate(texts):
        np.testing.assert_array_equal(np.stack(rows[index]), alone(path, ids))
        assert siblings[index].tokens == tuple(ids)


def test_the_model_outlives_the_session_that_opened_it(path: Path) -> None:
    session = open_session(path)
    session.forward(SECOND)
    sibling = session.sibling()
    del session
    gc.collect()
    assert sibling.position == 0
    np.testing.assert_array_equal(np.stack([sibling.forward([token_id]) for token_id in FIRST]), alone(path, FIRST))


def test_a_sibling_describes_itself_as_the_first_does(path: Path) -> None:
    session = open_session(path, context=50)
    sibling = session.sibling()
    for name in ("capacity", "threads", "description", "warning", "kv_cache", "accuracy_level", "isa", "model"):
        assert getattr(sibling, name) == getattr(session, name), name
