"""Held-out loss over a whole text: what a model card states."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer

from fbiedge.config import ModelConfig
from fbiedge.errors import UsageError

from .documents import encode, ids_dtype, read_documents
from .loss import head_losses
from .model import Llama
from .shards import Ids, open_shard, write_shard

WINDOWS_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True)
class HeldOutLoss:
    """Mean next-token loss over a text cut into windows that don't overlap."""

    nats_per_token: float
    tokens: int  # predicted
    bytes: int  # of UTF-8 text, markers included

    @property
    def perplexity(self) -> float:
        """exp of the loss per token; depends on the tokenizer."""
        return math.exp(self.nats_per_token)

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers."""
        return self.nats_per_token * self.tokens / self.bytes / math.log(2)


def held_out_loss(model: Llama, text: Path, tokenizer: Tokenizer, scratch: Path) -> HeldOutLoss:
    """Loss of `model` in fp32 on the documents of `text`, in windows as long as its context.

    The last window, where the text ends inside it, is left out. `scratch` receives the text's token shard.
    Raises UsageError for a text shorter than one window.
    """
    tokens = text_tokens(text, tokenizer, model.config, scratch)
    length = model.config.max_position_embeddings
    losses = window_losses(model, tokens)
    if not len(losses):
        raise UsageError(f"{text} has {len(tokens)} tokens, expected {length + 1} or more; give a longer text")
    share = len(losses) * length / len(tokens)
    size = sum(len(document.encode()) for document in read_documents([text]))
    return HeldOutLoss(nats_per_token=float(losses.mean()), tokens=len(losses) * length, bytes=round(size * share))


def text_tokens(text: Path, tokenizer: Tokenizer, config: ModelConfig, scratch: Path) -> Ids:
    """Token ids of the documents of `text`, each between the model's first and last token; written to `scratch`."""
    bos, eos = config.bos_token_id, config.eos_token_id
    write_shard(scratch, encode(read_documents([text]), tokenizer, bos, eos), ids_dtype(tokenizer, bos, eos))
    return open_shard(scratch).tokens


@torch.no_grad()
def window_losses(model: Llama, tokens: Ids) -> npt.NDArray[np.float64]:
    """Mean next-token loss of each whole window of `tokens`, in nats [windows]; windows are as long as the context."""
    length = model.config.max_position_embeddings
    windows = (len(tokens) - 1) // length
    losses = []
    for first in range(0, windows, WINDOWS_AT_ONCE):
        starts = [i * length for i in range(first, min(first + WINDOWS_AT_ONCE, windows))]
        rows = torch.stack([torch.from_numpy(tokens[s : s + length + 1].astype("int64")) for s in starts])
        for features, targets in zip(model.features(rows[:, :-1]), rows[:, 1:], strict=True):
            losses.append(head_losses(features, model.lm_head.weight, targets, chunk=length).one_hot.item())
    return np.array(losses)
