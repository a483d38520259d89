"""How well a model predicts a text: loss by token, and perplexity with what chance alone may have added to it.

As published for GPTQ, and since then for FBI-LLM and nearly everything else: the text, tokenized as one (with the token
that begins a text, where the tokenizer puts one), is cut into windows of 2048 tokens that don't overlap. Each is read
from an empty cache, and all its tokens but the first are predicted. What is left at the end is no whole window and is
left out; a text shorter than a window is one short window.

The 95 % interval is that of a bootstrap: the text's parts (windows; runs of 128 tokens where there are fewer than 20
windows) are drawn again with replacement 2000 times, always by the same random numbers. It says how much another text
of the same kind and length might differ, not how exact the number is for this text.

Perplexity is per token, so it compares models of one tokenizer only. Bits per byte of text compare all.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from .engines import LogitEngine
from .errors import ModelFileError, UsageError
from .metrics import token_losses
from .tokenizer import DOCUMENT_END, Tokenizer

WINDOW = 2048
CHUNK = 128  # tokens whose logits are in memory at once: 16 MB for 32,000 of them
_RUN = 128  # tokens of one part of a text that has few windows
_FEW_WINDOWS = 20
_RESAMPLES = 2000

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Loss of one model on one text."""

    model: str
    engine: str
    window: int  # tokens
    windows: int
    tokens: int  # predicted
    left_out: int  # tokens at the end that fill no window
    nats_per_token: float
    bits_per_byte: float | None  # None without a tokenizer
    perplexity: float
    interval: tuple[float, float] | None  # 95 % of the perplexity; None for a text of one part
    parts: int  # drawn by the bootstrap
    tokens_per_second: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which knows no infinity."""
        return without_infinities(asdict(self))

    def lines(self) -> list[str]:
        """For people."""
        unit = "windows" if self.parts == self.windows else f"runs of {_RUN} tokens"
        interval = "no interval, the text is too short for one"
        if self.interval:
            low, high = self.interval
            interval = f"95 % interval {low:.4f} to {high:.4f}, bootstrap over {self.parts} {unit}"
        bits = "" if self.bits_per_byte is None else f", {self.bits_per_byte:.4f} bits per byte"
        rest = f", {self.left_out:,} at the end left out" if self.left_out else ""
        return [
            f"model       {self.model}",
            f"engine      {self.engine}",
            f"text        {self.tokens:,} tokens predicted, all but the first of {self.windows} windows of {self.window}{rest}",
            f"loss        {self.nats_per_token:.4f} nats per token{bits}",
            f"perplexity  {self.perplexity:.4f} ({interval})",
            f"speed       {self.tokens_per_second:.0f} tok/s",
        ]


def evaluate(
    engine: LogitEngine, ids: Sequence[int], *, window: int = WINDOW, progress: Progress = lambda done, total: None
) -> Evaluation:
    """Loss of `engine` on `ids`, in windows of `window` tokens or its context, where that is shorter.

    `progress` is told how many tokens are predicted, and how many will be. Raises UsageError for fewer than two tokens,
    ModelFileError where the logits are no numbers.
    """
    length = min(window, engine.capacity)
    windows = cut(ids, length)
    tokens = sum(map(len, windows)) - len(windows)
    losses: list[npt.NDArray[np.float64]] = []
    done, started = 0, perf_counter()
    for part in windows:
        engine.reset()
        losses.append(np.empty(len(part) - 1))
        for start in range(0, len(part) - 1, CHUNK):
            targets = part[start + 1 : start + 1 + CHUNK]
            logits = finite_logits(engine, part[start : start + len(targets)])
            losses[-1][start : start + len(targets)] = token_losses(logits, targets)
            done += len(targets)
            progress(done, tokens)
    seconds = perf_counter() - started
    loss = sum(float(part.sum()) for part in losses) / tokens
    parts = losses
    if len(windows) < _FEW_WINDOWS:
        parts = [part[start : start + _RUN] for part in losses for start in range(0, len(part), _RUN)]
    return Evaluation(
        model=str(engine.path),
        engine=engine.description,
        window=len(windows[0]),
        windows=len(windows),
        tokens=tokens,
        left_out=len(ids) - tokens - len(windows),
        nats_per_token=loss,
        bits_per_byte=_bits_per_byte(engine.tokenizer, windows, loss * tokens),
        perplexity=perplexity_of(loss),
        interval=_interval(parts) if len(parts) > 1 else None,
        parts=len(parts),
        tokens_per_second=tokens / seconds,
    )


def cut(ids: Sequence[int], length: int, *, rest: bool = False) -> list[Sequence[int]]:
    """Windows of `length` tokens; the rest at the end is one more where `rest` asks for it, or where it is all there is.

    Raises UsageError for fewer than two tokens, of which nothing can be predicted.
    """
    if length < 2:
        raise UsageError(f"window is {length}, expected at least 2 tokens")
    if len(ids) < 2:
        raise UsageError(f"the text has {len(ids)} token{'s' if len(ids) != 1 else ''}, expected at least 2")
    windows = [ids[start : start + length] for start in range(0, len(ids), length)]
    if len(windows) > 1 and len(windows[-1]) < (2 if rest else length):
        windows.pop()
    return windows


def finite_logits(engine: LogitEngine, ids: Sequence[int]) -> npt.NDArray[np.float32]:
    """Those of `engine` after each of `ids`. Raises ModelFileError where they are no numbers."""
    rows = engine.logits(ids)
    if not np.isfinite(rows.max(axis=-1)).all():  # a maximum is NaN where anything is
        raise ModelFileError(f"{engine.path} gives logits that are not finite; the model is broken")
    return rows


def encode(tokenizer: Tokenizer, text: str, vocab_size: int) -> list[int]:
    """Ids of a whole text. Raises UsageError where they go beyond the vocabulary.

    Documents with markers between them, which the tokenizer doesn't know as tokens, are each between the tokens that begin
    and end a text, as training has them.
    """
    documents = [document.strip() for document in DOCUMENT_END.split(text)]
    if len(documents) > 1 and tokenizer.token_id("<|endoftext|>") is None:
        begin, end = (
            [] if found is None else [found]
            for found in map(tokenizer.token_id, (tokenizer.bos_token, tokenizer.eos_token))
        )
        ids = [i for document in documents if document for i in (*begin, *tokenizer.encode_rendered(document), *end)]
    else:
        ids = tokenizer.encode(text)
    if ids and max(ids) >= vocab_size:
        raise UsageError(f"the tokenizer gives ids up to {max(ids)}, but the vocabulary is {vocab_size}")
    return ids


def perplexity_of(nats_per_token: float) -> float:
    """exp, which is infinite where a float can't hold it."""
    return math.exp(nats_per_token) if nats_per_token < 700 else math.inf


def without_infinities(fields: dict[str, Any]) -> dict[str, Any]:
    """`fields`, however deep, with None for the numbers that JSON has no word for."""

    def valid(value: Any) -> Any:
        if isinstance(value, dict):
            return without_infinities(value)
        if isinstance(value, (list, tuple)):
            return [valid(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {name: valid(value) for name, value in fields.items()}


def _bits_per_byte(tokenizer: Tokenizer | None, windows: Sequence[Sequence[int]], nats: float) -> float | None:
    """Of the text that the predicted tokens spell."""
    if tokenizer is None:
        return None
    counts = Counter(token for window in windows for token in window[1:])
    size = sum(len(tokenizer.token_bytes(token)) * count for token, count in counts.items())
    return nats / math.log(2) / size if size else None


def _interval(parts: Sequence[npt.NDArray[np.float64]]) -> tuple[float, float]:
    """Bounds that 95 % of the resampled perplexities lie between."""
    sums = np.array([part.sum() for part in parts])
    counts = np.array([len(part) for part in parts])
    generator = np.random.default_rng(0)
    means = np.empty(_RESAMPLES)
    for index in range(_RESAMPLES):
        drawn = generator.integers(0, len(parts), len(parts))
        means[index] = sums[drawn].sum() / counts[drawn].sum()
    low, high = np.quantile(means, [0.025, 0.975])
    return perplexity_of(float(low)), perplexity_of(float(high))
