"""Heavy imports stay in their layer: the exporter works without torch, the runtime without onnx and torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "onnx", "onnxscript", "onnx_ir", "transformers", "safetensors")

LOADED = """
import importlib, json, pkgutil, sys
import fbiedge
package = importlib.import_module(sys.argv[1])
for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
    if not module.ispkg and not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print(json.dumps(sorted(sys.modules)))
"""


def loaded_by(package: str) -> set[str]:
    """Top-level names in sys.modules after importing every module of `package`."""
    result = subprocess.run([sys.executable, "-c", LOADED, package], capture_output=True, text=True, check=True)
    return set(json.loads(result.stdout))


def test_exporters_import_onnx_but_never_torch() -> None:
    loaded = loaded_by("fbiedge.exporters.onnx")
    assert "onnx" in loaded and "fbiedge.exporters.onnx.verify" in loaded
    assert not loaded & {"torch", "transformers"}


def test_fbiedge_imports_none_of_the_heavy_packages() -> None:
    loaded = loaded_by("fbiedge")
    assert "fbiedge.weights" in loaded
    assert not loaded & {*HEAVY, "fbiedge.exporters", "fbiedge.training"}


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_the_linter_keeps_torch_out_of_the_exporters(package: str) -> None:
    """At the top of a module, that is; the import of onnx is let through line by line."""
    ruff = shutil.which("ruff", path=str(Path(sys.executable).parent)) or shutil.which("ruff")
    if ruff is None:
        pytest.skip("needs ruff: pip install 'fbiedge[dev]'")
    root = Path(__file__).resolve().parents[2]
    command = [ruff, "check", "--no-cache", "--stdin-filename", str(root / "exporters/onnx/new.py"), "-"]
    source = f"import {package}\n\nprint({package})\n"
    result = subprocess.run(command, input=source, capture_output=True, text=True, check=False, cwd=root)
    assert result.returncode == 1 and f"TID253 `{package}` is banned at the module level" in result.stdout
