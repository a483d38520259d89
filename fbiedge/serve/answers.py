"""What is answered: the JSON of whole answers and of server-sent events, in OpenAI's shapes.

Answers    gathers the events of a request's answers, whichever way they go out
Chat       the shapes of /v1/chat/completions
Text       the shapes of /v1/completions
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

from .. import __version__
from ..generate import Piece
from .scheduler import Event, Finished

DONE = b"data: [DONE]\n\n"
LEAST_LOGPROB = -9999.0  # as OpenAI: JSON has no infinity

TokenBytes = Callable[[int], bytes]


def server_sent(data: dict[str, Any]) -> bytes:
    """One event of a stream."""
    return b"data: " + _json(data) + b"\n\n"


class Answers:
    """The answers to one request: what has come, and how the whole of it or its next part is told."""

    kind: str  # of object
    chunk_kind: str
    prefix: str  # of ids

    def __init__(self, model: str, token_bytes: TokenBytes, *, choices: int, per_prompt: int, logprobs: bool) -> None:
        self._envelope = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": f"fbiedge-{__version__}",
        }
        self._token_bytes = token_bytes
        self._per_prompt = per_prompt
        self.logprobs = logprobs
        self.texts = [""] * choices
        self.pieces: list[list[Piece]] = [[] for _ in range(choices)]
        self.finished: list[Finished | None] = [None] * choices

    def add(self, index: int, event: Event) -> None:
        """What has come of answer `index`, for whole()."""
        if isinstance(event, Finished):
            self.finished[index] = event
            return
        self.texts[index] += event.text
        if self.logprobs and event.token_id is not None:
            self.pieces[index].append(event)

    def usage(self) -> dict[str, Any]:
        """Tokens of all prompts, each counted once, and of all answers."""
        ends = [end.stats for end in self.finished if end is not None]
        first = ends[:: self._per_prompt]  # of each prompt
        prompt, generated = sum(end.prompt_tokens for end in first), sum(end.generated_tokens for end in ends)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": sum(end.cached_tokens for end in first)},
        }

    def whole(self) -> bytes:
        """The answer in one piece. For a worker thread: with logprobs it may take seconds.

        Choice by choice, because no other thread runs while json writes one value.
        """
        around = _json({**self._envelope, "object": self.kind, "usage": self.usage()})
        choices = b",".join(_json(self._choice(index)) for index in range(len(self.texts)))
        return around[:-1] + b',"choices":[' + choices + b"]}"

    def _choice(self, index: int) -> dict[str, Any]:
        return {
            "index": index,
            **self.content(self.texts[index]),
            "logprobs": self.told(self.pieces[index], 0) if self.logprobs else None,
            "finish_reason": _reason(self.finished[index]),
        }

    def opening(self, index: int) -> dict[str, Any] | None:
        """The event before the first of answer `index`."""
        return None

    def chunk(self, index: int, event: Event) -> dict[str, Any] | None:
        """The event for what has come; None where there is nothing to say."""
        if isinstance(event, Finished):
            self.finished[index] = event
            return self._chunk(index, self.delta(None), None, _reason(event))
        named = self.logprobs and event.token_id is not None
        if not event.text and not named:
            return None
        logprobs = self.told([event], len(self.texts[index])) if named else None
        self.texts[index] += event.text
        return self._chunk(index, self.delta(event.text), logprobs, None)

    def last_chunk(self) -> dict[str, Any]:
        """The event with the usage."""
        return {**self._envelope, "object": self.chunk_kind, "choices": [], "usage": self.usage()}

    def content(self, text: str) -> dict[str, Any]:
        """A whole answer's text."""
        raise NotImplementedError

    def delta(self, text: str | None) -> dict[str, Any]:
        """A part of it, or None at the end."""
        raise NotImplementedError

    def told(self, pieces: Sequence[Piece], offset: int) -> dict[str, Any]:
        """Logprobs of tokens; `offset`: characters before them."""
        raise NotImplementedError

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None, reason: str | None
    ) -> dict[str, Any]:
        choice = {"index": index, **delta, "logprobs": logprobs, "finish_reason": reason}
        return {**self._envelope, "object": self.chunk_kind, "choices": [choice]}

    def _text(self, token_id: int) -> str:
        return self._token_bytes(token_id).decode("utf-8", "replace")


class Chat(Answers):
    """Of /v1/chat/completions."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def opening(self, index: int) -> dict[str, Any] | None:
        """See Answers."""
        return self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, None, None)

    def content(self, text: str) -> dict[str, Any]:
        """See Answers."""
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def delta(self, text: str | None) -> dict[str, Any]:
        """See Answers."""
        return {"delta": {} if text is None else {"content": text}}

    def told(self, pieces: Sequence[Piece], offset: int) -> dict[str, Any]:
        """See Answers."""
        content = [
            {
                **self._named(piece.token_id or 0, piece.logprob or 0.0),
                "top_logprobs": [self._named(*likely) for likely in piece.top_logprobs],
            }
            for piece in pieces
        ]
        return {"content": content, "refusal": None}

    def _named(self, token_id: int, logprob: float) -> dict[str, Any]:
        spelt = self._token_bytes(token_id)
        return {"token": self._text(token_id), "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(spelt)}


class Text(Answers):
    """Of /v1/completions."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def content(self, text: str) -> dict[str, Any]:
        """See Answers."""
        return {"text": text}

    def delta(self, text: str | None) -> dict[str, Any]:
        """See Answers."""
        return {"text": text or ""}

    def told(self, pieces: Sequence[Piece], offset: int) -> dict[str, Any]:
        """See Answers. An offset counts the characters of the answer's text that were certain before the token."""
        tokens, chosen, likely, offsets = [], [], [], []
        for piece in pieces:
            own = piece.token_id or 0, piece.logprob or 0.0
            tokens.append(self._text(own[0]))
            chosen.append(max(own[1], LEAST_LOGPROB))
            # As OpenAI, with the token itself, also where others were more likely.
            likely.append(
                {self._text(token): max(logprob, LEAST_LOGPROB) for token, logprob in (*piece.top_logprobs, own)}
            )
            offsets.append(offset)
            offset += len(piece.text)
        return {"tokens": tokens, "token_logprobs": chosen, "top_logprobs": likely, "text_offset": offsets}


def _reason(end: Finished | None) -> str | None:
    """`stop`: the model or a stop string ended the text; `length`: a limit did."""
    return None if end is None else "stop" if end.stats.finish_reason in ("end", "stop") else "length"


def _json(data: dict[str, Any]) -> bytes:
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
