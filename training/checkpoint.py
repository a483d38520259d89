"""A run's folder, and the official form of its model.

RUN/run.json             every hyperparameter, the model's shape and its teacher
RUN/train/, held_out/    token shards of the training and the held-out text, see corpus.py
RUN/metrics.jsonl        one line per logged step or evaluation
RUN/teacher/             what the teacher said so far, with --cache-teacher and while the run lasts, see teacher_cache.py
RUN/state/STEP/          latents, AdamW moments, step: what an exact resume needs, see state.py
RUN/model/               the checkpoint in the official form, with its tokenizer: what `fbiedge export` reads
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from fbiedge.errors import OutputError
from fbiedge.weights import open_checkpoint, write_checkpoint

from .model import BinaryLinear, Llama, rope_tables
from .parallel import agreed, is_first, whole
from .shared_scales import FOLDED_SCALES, storable_scales


def save_model(model: Llama, out: Path, files: Mapping[str, str]) -> None:
    """Write the official form; `files` are its sidecars (tokenizer.json, ...) by name.

    All processes of a training call this together: process 0 writes, each tensor is gathered when its turn comes.
    Raises OutputError, and CheckpointError where `model` isn't what its config says.
    """
    tensors = _whole_tensors(model)
    with agreed():
        if is_first():
            try:
                write_checkpoint(out, model.config, tensors, files)
            except OSError as error:  # one that names a file that is no part of the checkpoint
                raise OutputError(f"can't write {out}: {error}") from error
            finally:
                deque(tensors, maxlen=0)  # where writing failed, the others still gather
        else:
            deque(tensors, maxlen=0)


def _whole_tensors(model: Llama) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    linears = dict(model.named_modules())
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if model.config.tie_word_embeddings and name == "lm_head.weight":
            continue  # the embedding, stored once
        tensor = whole(parameter)
        if model.shared_scales and name.endswith(FOLDED_SCALES):
            linear = linears[name.removesuffix(".wscale")]
            assert isinstance(linear, BinaryLinear)
            tensor = storable_scales(linear, tensor)
        yield name, tensor.float().numpy()


def load_model(path: Path, dtype: torch.dtype = torch.float32, values: bool = True) -> Llama:
    """A Llama with the weights of an official-form checkpoint, latents included. Raises CheckpointError.

    Without `values` nothing is read but what is there: the parameters are on the meta device, see parallel.py.
    """
    weights = open_checkpoint(path)
    with torch.device("meta"):
        model = Llama(weights.config)
    state = model.state_dict()
    for name, tensor in state.items():
        state[name] = (torch.from_numpy(weights.tensor(name)) if values else tensor).to(dtype)
    model.load_state_dict(state, assign=True)
    if weights.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    if values:
        model.cos, model.sin = rope_tables(weights.config)
    return model
