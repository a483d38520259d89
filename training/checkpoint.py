"""A run's folder, and how it survives being killed.

RUN/run.json             every hyperparameter, the model's shape and its teacher
RUN/*.tokens             token shards of the training and the held-out text
RUN/metrics.jsonl        one line per logged step or evaluation
RUN/state.pt             latents, AdamW moments, step: what an exact resume needs (tensors only, no pickled code)
RUN/model/               the checkpoint in the official form, with its tokenizer: what `fbiedge export` reads
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fbiedge.errors import CheckpointError
from fbiedge.files import atomic_file
from fbiedge.weights import open_checkpoint, write_checkpoint

from .model import Llama, rope_tables
from .shared_scales import storable_scales


def save_state(run: Path, model: Llama, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Replace RUN/state.pt at once, so that a kill at any moment leaves the old state or the new one."""
    state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    with atomic_file(run / "state.pt") as temporary:
        torch.save(state, temporary)


def load_state(run: Path, model: Llama, optimizer: torch.optim.Optimizer) -> int:
    """Restore model and optimizer from RUN/state.pt; returns the steps done, 0 where nothing was saved yet.

    Raises CheckpointError for a damaged file.
    """
    if not (run / "state.pt").exists():
        return 0
    try:
        state: dict[str, Any] = torch.load(run / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return int(state["step"])
    except Exception as error:  # torch raises a dozen types for a damaged file; all mean the same to the user
        raise CheckpointError(f"{run}/state.pt can't be resumed: {str(error).splitlines()[0]}") from error


def save_model(model: Llama, out: Path, files: Mapping[str, str]) -> None:
    """Write the official form; `files` are its sidecars (tokenizer.json, ...) by name."""
    state = model.state_dict()
    if model.shared_scales:
        state.update(storable_scales(model))
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]  # the embedding, stored once
    tensors = ((name, tensor.detach().float().cpu().numpy()) for name, tensor in state.items())
    write_checkpoint(out, model.config, tensors, files)


def load_model(path: Path, dtype: torch.dtype = torch.float32) -> Llama:
    """A Llama with the weights of an official-form checkpoint, latents included. Raises CheckpointError."""
    weights = open_checkpoint(path)
    with torch.device("meta"):
        model = Llama(weights.config)
    names = list(model.state_dict())
    model.load_state_dict({name: torch.from_numpy(weights.tensor(name)).to(dtype) for name in names}, assign=True)
    if weights.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.cos, model.sin = rope_tables(weights.config)
    return model
