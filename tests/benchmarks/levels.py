"""`make bench-levels TEXT=FILE`: what each accuracy level costs in perplexity, beside the numpy reference.

The text is cut into windows as long as the context that don't overlap; every engine sees the same ones. Exact means
fp32 activations everywhere; the int8 head stays int8 in all rows, as in the file. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fbiedge.exporters.onnx import export_onnx, open_onnx
from fbiedge.metrics import compare_logits, perplexity
from fbiedge.reference import Reference
from fbiedge.session import Session
from fbiedge.tokenizer import Tokenizer

Logits = Callable[[list[int]], npt.NDArray[np.float32]]


def session_logits(path: Path, library: str | None = None) -> Logits:
    """Logits of a window from an empty cache; `library`: another op library, a missing one means stock ops."""
    before = os.environ.pop("FBIEDGE_OPS_LIBRARY", None)
    if library is not None:
        os.environ["FBIEDGE_OPS_LIBRARY"] = library
    try:
        session = Session.open(path)
    finally:
        os.environ.pop("FBIEDGE_OPS_LIBRARY", None)
        if before is not None:
            os.environ["FBIEDGE_OPS_LIBRARY"] = before

    def logits(window: list[int]) -> npt.NDArray[np.float32]:
        session.truncate(0)
        return session.all_logits(window)

    return logits


def main() -> None:
    """Print a Markdown table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--windows", type=int, default=40)
    arguments = parser.parse_args()

    weights = open_onnx(arguments.model)
    tokenizer = Tokenizer.from_model(Session.open(arguments.model).model)
    ids = tokenizer.encode(arguments.text.read_text(encoding="utf-8"))
    length = weights.config.max_position_embeddings
    windows = [ids[i : i + length] for i in range(0, len(ids) - length, length)][: arguments.windows]
    reference = Reference(weights)

    def reference_logits(window: list[int]) -> npt.NDArray[np.float32]:
        reference.reset()
        return reference.logits(window)

    with tempfile.TemporaryDirectory() as folder:
        exact = Path(folder) / "fp32.onnx"
        export_onnx(weights, exact, accuracy_level="fp32")
        engines: dict[str, Logits] = {
            "numpy reference": reference_logits,
            "op library, fp32": session_logits(exact),
            "op library, int8 (default)": session_logits(arguments.model),
            "stock ops, fp32": session_logits(exact, "/nonexistent"),
            "stock ops, int8": session_logits(arguments.model, "/nonexistent"),
        }
        expected = [reference_logits(window) for window in windows]
        targets = np.concatenate([window[1:] for window in windows])
        rows = []
        for name, engine in engines.items():
            logits = np.concatenate([engine(window)[:-1] for window in windows])
            exact_logits = np.concatenate([window[:-1] for window in expected])
            difference = compare_logits(exact_logits, logits)
            rows.append(
                {
                    "engine": name,
                    "perplexity": perplexity(logits, targets),
                    "kl_divergence": difference.kl_divergence,
                    "top1_agreement": difference.top1_agreement,
                }
            )
    base = rows[0]["perplexity"]
    print("| engine | perplexity | against the reference | KL, nats | same top token |\n|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['engine']} | {row['perplexity']:.4f} | {100 * (row['perplexity'] / base - 1):+.3f} % "
            f"| {row['kl_divergence']:.1e} | {100 * row['top1_agreement']:.2f} % |"
        )
    print(json.dumps({"model": str(arguments.model), "tokens": len(targets), "rows": rows}))


if __name__ == "__main__":
    main()
