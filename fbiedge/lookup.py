"""Speculative decoding by prompt lookup: what follows an earlier occurrence of the last tokens is a guess at the next.

Answers often repeat what was said before: names, quotations, code, a text that is to be corrected. So the longest run of
last tokens that occurred before is looked up, and the tokens that followed it there are a draft. One run of the model
over the newest token and the draft gives the logits after each of them. Tokens are then picked from these logits in
order by the ordinary sampler, with its ordinary random draws; where the pick differs from the draft, the rest of the
draft is cut off from the cache. So a draft never changes what is picked, it only saves runs.

A run of 9 tokens takes as long as 2 to 3 runs of one, so wrong guesses cost. A draft is therefore at most twice as long
as what was right of the last one, and after one of which nothing was right, it takes a longer match. Reckoned with the
bundled model's times of runs and drafts of at most 8 tokens, that keeps 2.7 of 3.0 times the speed on a copied text, and
costs a text without repetitions 6 % instead of 18 % (a model of 130M: nothing instead of 10 %).

The text is the same as without drafts as far as a run of several tokens gives the logits of runs of one. With our
operators and an int8 KV cache it does, to the bit, on every instruction set and at both accuracy levels
(tests/runtime/test_lookup.py). Where others' operators compute, rounding differs: with an fp32 KV cache, whose attention
is ONNX Runtime's, by 1e-5 in a logit, in llama.cpp by about as much, without our op library by up to 0.1. There two
tokens that are as good as equally likely may change places.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from .generate import Engine

_SHORTEST = 2  # one token alone says too little about the next
_SHORTEST_AFTER_WRONG = 3
_LONGEST = 16  # a longer match says no more
_CANDIDATES = 64  # earlier occurrences to compare, newest first


class Lookup:
    """Finds drafts in a growing text."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._ends: dict[tuple[int, ...], list[int]] = {}  # the shortest match -> where it ended, in order

    def append(self, token_id: int) -> None:
        """The text goes on."""
        self.tokens.append(token_id)
        if len(self.tokens) >= _SHORTEST:
            self._ends.setdefault(tuple(self.tokens[-_SHORTEST:]), []).append(len(self.tokens))

    def draft(self, most: int, shortest: int = _SHORTEST) -> list[int]:
        """At most `most` tokens that followed the longest earlier occurrence of the last ones, the newest among equals.

        None where fewer than `shortest` are the same.
        """
        tokens = self.tokens
        earlier = self._ends.get(tuple(tokens[-_SHORTEST:]), [])[:-1]
        best, longest = 0, 0
        for end in reversed(earlier[-_CANDIDATES:]):
            size = _SHORTEST
            while size < min(end, _LONGEST) and tokens[end - 1 - size] == tokens[-1 - size]:
                size += 1
            if size > longest:
                best, longest = end, size
            if size == _LONGEST:
                break
        return tokens[best : best + most] if longest >= shortest else []


class Decoder:
    """Logits after each picked token, several from one run where a draft was right."""

    def __init__(self, engine: Engine, prompt_ids: Sequence[int], draft_tokens: int) -> None:
        """draft_tokens: at most so many in one run; 0 looks nothing up."""
        self._engine = engine
        self._lookup = Lookup()
        self._draft_tokens = draft_tokens
        self.tokens = self._lookup.tokens  # the prompt and what was picked
        for token_id in prompt_ids:
            self._append(token_id)
        # What was run ahead of the picks: tokens at the end of the engine's cache, and the logits after each.
        self._draft: list[int] = []
        self._rows: list[npt.NDArray[np.float32]] = []
        self._right = 1  # tokens of the last draft
        self.drafted = self.accepted = 0

    @property
    def position(self) -> int:
        """Tokens in the cache that are there to stay."""
        return self._engine.position - len(self._draft)

    def step(self, token_id: int, most: float) -> npt.NDArray[np.float32]:
        """Go on with `token_id` -> the logits after it, valid until the next step; `most` more will be asked for."""
        self._append(token_id)
        if self._draft and self._draft[0] == token_id:
            self.accepted += 1
            self._right += 1
            del self._draft[0]
            return self._rows.pop(0)
        self.finish()
        room = min(self._draft_tokens, max(1, 2 * self._right), most, self._engine.capacity - self.position - 1)
        shortest = _SHORTEST if self._right else _SHORTEST_AFTER_WRONG
        draft = self._lookup.draft(int(room), shortest) if room > 0 else []
        if not draft:
            return self._engine.forward([token_id], copy=False)
        rows = self._engine.all_logits([token_id, *draft])
        self._draft, self._rows, self._right = draft, list(rows[1:]), 0
        self.drafted += len(draft)
        return rows[0]  # type: ignore[no-any-return]

    def shifted(self, token_id: int, keep: int) -> list[int]:
        """Go on with `token_id` where the cache is full -> the tokens to have in it instead.

        The first `keep` stay, and of the others the newer half. Their keys and values say what they meant where they
        stood, after all that stood before, so they are run again: that is exact, where turning old keys to new
        positions would leave in them what is forgotten.
        """
        self._append(token_id)
        capacity = self._engine.capacity
        keep = min(keep, capacity // 2)
        return [*self.tokens[:keep], *self.tokens[-((capacity - keep + 1) // 2) :]]

    def finish(self) -> None:
        """Cut off what was run ahead of the picks."""
        if self._draft:
            self._engine.truncate(self.position)
            self._draft, self._rows = [], []

    def _append(self, token_id: int) -> None:
        if self._draft_tokens:
            self._lookup.append(token_id)
        else:
            self.tokens.append(token_id)
