"""The load benchmark, short: many clients get whole answers or are told that the queue is full."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from support.bundled import MODEL


@pytest.fixture(scope="module")
def benchmark() -> Any:
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "serve_load.py"
    spec = importlib.util.spec_from_file_location("serve_load", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["serve_load"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("options", [[], ["--slots", "2", "--queue", "2"]])
def test_load(benchmark: Any, options: list[str]) -> None:
    found = benchmark.measure(MODEL, clients=8, seconds=4, options=options)
    assert found["errors"] == 0, found["first_errors"]
    assert found["answers"] > 8 and found["tokens_per_second"] > 0
    assert (found["queue_full"] > 0) == bool(options)
    assert found["resident_mb"]["growth"] < 20
