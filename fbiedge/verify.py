"""`fbiedge verify A B`: do two models say the same? Any two of checkpoint, ONNX and GGUF, on the same windows of a text.

A is the reference: KL(A || B). Every position of every window is compared; the perplexities leave out what
evaluation.py leaves out, the first token of each window. Logits of both come and go in chunks, so a long text takes no
more memory than a short one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .engines import LogitEngine
from .errors import UsageError
from .evaluation import CHUNK, WINDOW, Progress, cut, encode, perplexity_of, without_infinities
from .metrics import ComparisonSum, token_losses

_ROUNDED_INPUTS = (
    "llama.cpp rounds the inputs of Q1_0 layers to 8 bits, which on an untrained (random) model costs more than the "
    "default bounds; --max-kl and --min-agreement set others"
)


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What still counts as the same."""

    max_kl: float = 1e-3  # nats
    min_agreement: float = 0.99  # 0 to 1

    def __post_init__(self) -> None:
        if not self.max_kl >= 0:  # also for NaN
            raise UsageError(f"--max-kl is {self.max_kl}, expected a number of at least 0")
        if not 0 <= self.min_agreement <= 1:
            raise UsageError(f"--min-agreement is {self.min_agreement}, expected a number from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class Verification:
    """How far model `b` is from model `a`."""

    a: str
    b: str
    engine_a: str
    engine_b: str
    tokens: int  # positions compared
    window: int  # tokens
    windows: int
    max_logit_difference: float
    kl_divergence: float  # KL(a || b), mean over positions, in nats
    top1_agreement: float  # 0 to 1
    perplexity_a: float
    perplexity_b: float
    bounds: Bounds

    @property
    def beyond(self) -> tuple[str, ...]:
        """Which bounds are exceeded, in words. What is no number exceeds them too."""
        bounds, found = self.bounds, []
        if not self.kl_divergence <= bounds.max_kl:
            found.append(f"KL divergence {self.kl_divergence:.3g} is above --max-kl {bounds.max_kl:g}")
        if not self.top1_agreement >= bounds.min_agreement:
            found.append(f"top-1 agreement {self.top1_agreement:.4f} is below --min-agreement {bounds.min_agreement:g}")
        return tuple(found)

    @property
    def inputs_are_rounded(self) -> bool:
        """Whether one of the two is llama.cpp with 1-bit layers, going by the words of its description."""
        return any("llama.cpp" in engine and "Q1_0" in engine for engine in (self.engine_a, self.engine_b))

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**without_infinities(asdict(self)), "beyond": list(self.beyond)}

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"A           {self.a}: {self.engine_a}, perplexity {self.perplexity_a:.4f}",
            f"B           {self.b}: {self.engine_b}, perplexity {self.perplexity_b:.4f}",
            f"text        {self.tokens:,} tokens in {self.windows} windows of {self.window}",
            f"logits      largest difference {self.max_logit_difference:.3g}",
            f"KL(A || B)  {self.kl_divergence:.3g} nats",
            f"agreement   {100 * self.top1_agreement:.2f} % of the most likely tokens",
            *(f"differs     {reason}" for reason in self.beyond),
            *([f"note        {_ROUNDED_INPUTS}"] if self.beyond and self.inputs_are_rounded else []),
            *(["same        within the bounds"] if not self.beyond else []),
        ]


def verify(
    a: LogitEngine,
    b: LogitEngine,
    ids: Sequence[int],
    *,
    bounds: Bounds,
    window: int = WINDOW,
    progress: Progress = lambda done, total: None,
) -> Verification:
    """Compare `b` with `a` on `ids`, in windows that fit both. Raises UsageError for fewer than two tokens."""
    windows = cut(ids, min(window, a.capacity, b.capacity), rest=True)
    total = sum(map(len, windows))
    comparison = ComparisonSum()
    losses, predicted, done = np.zeros(2), 0, 0
    for part in windows:
        a.reset()
        b.reset()
        for start in range(0, len(part), CHUNK):
            chunk, targets = part[start : start + CHUNK], part[start + 1 : start + 1 + CHUNK]
            logits = a.logits(chunk), b.logits(chunk)
            comparison.add(*logits)
            if targets:
                losses += [token_losses(rows[: len(targets)], targets).sum() for rows in logits]
            predicted += len(targets)
            done += len(chunk)
            progress(done, total)
    result = comparison.result()
    perplexity_a, perplexity_b = (perplexity_of(float(loss) / predicted) for loss in losses)
    return Verification(
        a=str(a.path),
        b=str(b.path),
        engine_a=a.description,
        engine_b=b.description,
        tokens=result.positions,
        window=len(windows[0]),
        windows=len(windows),
        max_logit_difference=result.max_abs_error,
        kl_divergence=result.kl_divergence,
        top1_agreement=result.top1_agreement,
        perplexity_a=perplexity_a,
        perplexity_b=perplexity_b,
        bounds=bounds,
    )


def common_ids(a: LogitEngine, b: LogitEngine, text: str) -> list[int]:
    """`text` in the tokens of both. Raises UsageError where they have not the same, or no tokenizer at all."""
    sizes = a.vocab_size, b.vocab_size
    if sizes[0] != sizes[1]:
        raise UsageError(
            f"{a.path} has a vocabulary of {sizes[0]} tokens and {b.path} one of {sizes[1]}; expected the same"
        )
    found = [encode(engine.tokenizer, text, sizes[0]) for engine in (a, b) if engine.tokenizer is not None]
    if not found:
        raise UsageError(f"neither {a.path} nor {b.path} has a tokenizer; put tokenizer.json into one of them")
    if found[0] != found[-1]:
        where = next(
            (i for i, pair in enumerate(zip(*found, strict=False)) if pair[0] != pair[1]), min(map(len, found))
        )
        raise UsageError(
            f"the tokenizers of {a.path} and {b.path} split this text differently, from token {where} on; "
            "only models of the same tokenizer can be compared"
        )
    return found[0]
