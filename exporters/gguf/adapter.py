"""model.beta.gguf: beta of every linear as a LoRA of rank 1, which stock llama.cpp adds to a model (`--lora`).

general.type = "adapter", adapter.type = "lora", adapter.lora.alpha = 1      so its scale, alpha / rank, is 1
blk.0.attn_q.weight.lora_a  F32 [1, K]      a
blk.0.attn_q.weight.lora_b  F32 [N, 1]      b          y += b · (a · x)
fbiedge.beta_of = fbiedge.weights_sha256 of the model that it belongs to
"""

from __future__ import annotations

from pathlib import Path

import gguf  # noqa: TID253
import numpy as np
import numpy.typing as npt

import fbiedge


class Adapter:
    """Collects the terms of rank 1; a few hundred kilobytes for each layer of a 7B."""

    def __init__(self) -> None:
        self._terms: dict[str, tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]] = {}

    def add(self, tensor: str, b: npt.NDArray[np.float32], a: npt.NDArray[np.float32]) -> None:
        """b [N] · aᵀ [K] for the model's tensor of that name, rows and padding as there."""
        self._terms[tensor] = (np.ascontiguousarray(b, np.float32), np.ascontiguousarray(a, np.float32))

    def __bool__(self) -> bool:
        return bool(self._terms)

    def write(self, path: Path, architecture: str, name: str, weights_sha256: str) -> int:
        """Write it -> bytes."""
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_type("adapter")
        writer.add_name(f"{name} (beta)")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", 1.0)
        writer.add_string("fbiedge.producer", f"fbiedge {fbiedge.__version__}")
        writer.add_string("fbiedge.beta_of", weights_sha256)
        for tensor, (b, a) in self._terms.items():
            writer.add_tensor(f"{tensor}.lora_a", a[None, :])
            writer.add_tensor(f"{tensor}.lora_b", b[:, None])
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
        return path.stat().st_size
