"""The independent implementation that the project is compared with: Hugging Face's Llama or Qwen3, holding the dense W_eff."""

from __future__ import annotations

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from fbiedge.weights import Weights

from .checkpoints import dense

_CLASSES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}


class HuggingFaceLlama:
    """LlamaForCausalLM or Qwen3ForCausalLM in float32, with its KV cache; the interface of Reference."""

    def __init__(self, weights: Weights) -> None:
        make_config, make_model = _CLASSES[weights.config.model_type]
        self.model = make_model(make_config(**weights.config.to_dict())).eval().float()
        state = {
            name: torch.from_numpy(np.array(dense(weights, name.removesuffix(".weight"))))
            if "_proj" in name
            else torch.from_numpy(np.array(weights.tensor(name)))
            for name in self.model.state_dict()
        }
        self.model.load_state_dict(state)
        self.cache = None

    @torch.no_grad()
    def logits(self, ids: list[int]) -> np.ndarray:
        """Logits [T, vocab] of `ids`, appended to those before."""
        output = self.model(torch.tensor([ids]), past_key_values=self.cache, use_cache=True)
        self.cache = output.past_key_values
        return output.logits[0].numpy()
