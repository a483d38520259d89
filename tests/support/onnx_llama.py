"""An exported model in ONNX Runtime, with the KV cache as one buffer a layer that is bound as past and as present."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from fbiedge.config import ModelConfig


class OnnxLlama:
    """The interface of fbiedge.reference.Reference, for a model file; `library` None runs the fallback in stock operators."""

    def __init__(self, path: Path, config: ModelConfig, library: Path | None = None) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        if library is not None:
            options.register_custom_ops_library(str(library))
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.config = config
        self.reset()

    def reset(self) -> None:
        """Forget all tokens. The buffers start as NaN, so that a read of a row never written can't go unnoticed."""
        self.position = 0
        self.buffers = {}
        for entry in self.session.get_inputs():
            if entry.name.startswith("past_key_values."):
                shape = (1, self.config.num_key_value_heads, self.config.max_position_embeddings, *entry.shape[3:])
                rows = (
                    np.full(shape, 77, np.int8) if entry.type == "tensor(int8)" else np.full(shape, np.nan, np.float32)
                )
                self.buffers[entry.name] = ort.OrtValue.ortvalue_from_numpy(rows)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Append `ids` to the cache -> their logits [T, vocab]."""
        self.position += len(ids)
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", np.array([ids], np.int64))
        binding.bind_cpu_input("attention_mask", np.ones((1, self.position), np.int64))
        for name, buffer in self.buffers.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffer)
        binding.bind_output("logits")
        self.session.run_with_iobinding(binding)
        return binding.get_outputs()[-1].numpy()[0]

    def greedy(self, ids: Sequence[int], n: int) -> list[int]:
        """The `n` most likely tokens after `ids`, one by one, from an empty cache."""
        self.reset()
        generated: list[int] = []
        fed = list(ids)
        for _ in range(n):
            generated.append(int(self.logits(fed)[-1].argmax()))
            fed = generated[-1:]
        return generated
