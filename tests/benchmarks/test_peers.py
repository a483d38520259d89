"""`make bench-peers` measures every engine it was asked for. Nothing here depends on speed; see test_stock_ops.py for the
stock models, which compute what ours do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PEERS = Path(__file__).with_name("peers.py")


def test_a_run_ends_in_json(tmp_path: Path) -> None:
    """The whole script on a tiny model, without llama.cpp."""
    arguments = "--preset tiny --prompt-tokens 4 --gen-tokens 2 --depth 3 --threads 1 --repetitions 2"
    done = subprocess.run(
        [sys.executable, str(PEERS), *arguments.split(), "--folder", str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    rows = document["rows"]
    assert [(row["kind"], row["engine"]) for row in rows] == [
        (kind, engine)
        for kind in ("prefill", "decode")
        for engine in ("fbiedge", "onnxruntime 2-bit", "onnxruntime 4-bit")
    ]
    for row in rows:
        ours = next(r for r in rows if r["engine"] == "fbiedge" and r["kind"] == row["kind"])
        ratio = ours["tokens_per_second"]["median"] / row["tokens_per_second"]["median"]
        assert row["ours_is_times_as_fast"] == pytest.approx(ratio)
    assert document["machine"]["date"] and document["read_gb_per_second"]["1"]["median"] > 0
