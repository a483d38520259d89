"""The error tree is as drawn in its docstring, and the numpy-only layer imports nothing heavy."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from fbiedge import errors


def test_tree_is_as_drawn() -> None:
    drawn = set(re.findall(r"[├└]── (\w+)", errors.__doc__ or ""))
    defined = {kind.__name__ for kind in errors.FbiEdgeError.__subclasses__()}
    assert drawn == defined
    assert all(not kind.__subclasses__() for kind in errors.FbiEdgeError.__subclasses__())


@pytest.mark.parametrize("kind", errors.FbiEdgeError.__subclasses__())
def test_every_leaf_exits_with_2(kind: type[errors.FbiEdgeError]) -> None:
    assert kind("message").exit_code == 2
    assert str(kind("message")) == "message"


@pytest.mark.parametrize("module", ["weights", "initialize", "reference", "metrics", "bits", "config", "files"])
def test_import_stays_light(module: str) -> None:
    """What reads weights needs numpy alone until a file is opened."""
    script = (
        f"import sys, fbiedge.{module}; "
        "print([name for name in ('torch', 'onnx', 'onnxruntime', 'safetensors', 'ml_dtypes', 'tokenizers') "
        "if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
