"""The model behind the server: what is asked, as prompts of tokens for the scheduler. For worker threads, because a
template and a tokenizer take milliseconds, in which the event loop has others to look after."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..cached_session import CachedSession
from ..chat_template import ChatTemplate
from ..errors import UsageError
from ..generate import GenerationOptions, end_tokens
from ..kv_cache import cache_bytes
from ..machine import memory_bytes
from ..sampling import SamplingOptions
from ..tokenizer import Tokenizer
from .api_error import ApiError, invalid
from .options import ServerOptions
from .protocol import MAX_CHOICES, ChatRequest, CompletionRequest, Request
from .scheduler import Job
from .templates import BoundedTemplate

_COMPILED = 16  # constraints that are kept: a client sends the same schema again and again


class Service:
    """One model, and how it is asked."""

    def __init__(self, session: CachedSession, options: ServerOptions) -> None:
        """Raises ModelFileError, UsageError for a model that can't be served so."""
        self.session = session
        self.options = options
        self.name = options.name or _name(session.model.path)
        self.created = int(session.model.path.stat().st_mtime)
        self.tokenizer = Tokenizer.from_model(session.model)
        self.ends = end_tokens(session.model, self.tokenizer)
        self.longest_prompt = min(session.capacity, options.max_prompt_tokens or session.capacity)
        self._recommended = session.model.json_object("generation_config")
        SamplingOptions.from_generation_config(self._recommended)
        template = ChatTemplate.from_model(session.model)
        # Every character of a conversation may be in its text twice, and something goes around it.
        self._template = template and BoundedTemplate(template, longest=2 * options.max_body_bytes + 65536)
        self._compile = functools.lru_cache(maxsize=_COMPILED)(self._compiled)

    @property
    def chats(self) -> bool:
        """Whether the model has a chat template."""
        return self._template is not None

    def check_template(self) -> str | None:
        """Render a first message -> why that failed."""
        try:
            if self._template:
                self._template.render([{"role": "user", "content": "Hello"}])
        except ApiError as error:
            return error.message
        return None

    def sessions(self) -> list[CachedSession]:
        """As many as there are slots. Raises UsageError where memory can't hold their caches."""
        slots, session = self.options.slots, self.session
        needed = slots * cache_bytes(session.config, session.kv_cache, session.capacity)
        memory = memory_bytes()
        if memory is not None and needed > memory:
            raise UsageError(
                f"{slots} slots with a context of {session.capacity} tokens take {needed / 1e9:.1f} GB, more than there "
                "is memory; choose fewer with --slots or a smaller one with --context"
            )
        return [session, *(session.sibling() for _ in range(slots - 1))]

    def close(self) -> None:
        """End what runs beside the server."""
        if self._template:
            self._template.close()

    def jobs(self, request: Request) -> list[Job]:
        """The answers that `request` asks for: `n` of each prompt. Raises ApiError."""
        if request.model is not None and request.model != self.name:
            raise ApiError(
                404, f"the model {request.model[:60]!r} does not exist; this server has {self.name!r}",
                code="model_not_found", param="model",
            )  # fmt: skip
        try:
            options = self._generation_options(request)
            prompts = [self._checked(prompt) for prompt in self._prompts(request)]
        except UsageError as error:
            raise invalid(str(error)) from error
        if len(prompts) * request.n > MAX_CHOICES:
            raise invalid(f"{len(prompts)} prompts and n = {request.n} make more than {MAX_CHOICES} answers", "n")
        return [
            Job(prompt_ids=ids, options=options if request.n == 1 else _nth(options, copy), reuse=request.cache_prompt)
            for ids in prompts
            for copy in range(request.n)
        ]

    def token_bytes(self, token_id: int) -> bytes:
        """What a token spells."""
        return self.tokenizer.token_bytes(token_id)

    def _prompts(self, request: Request) -> list[list[int]]:
        if isinstance(request, CompletionRequest):
            return [self.tokenizer.encode(one) if isinstance(one, str) else one for one in request.prompts]
        assert isinstance(request, ChatRequest)
        if self._template is None:
            raise invalid("this model has no chat template; ask /v1/completions")
        return [self.tokenizer.encode_rendered(self._template.render(request.turns))]

    def _checked(self, ids: list[int]) -> list[int]:
        if not ids:
            raise invalid("the prompt is empty, expected at least one token")
        if len(ids) > self.longest_prompt:
            raise invalid(
                f"the prompt has {len(ids)} tokens; this server takes at most {self.longest_prompt}",
                code="context_length_exceeded",
            )
        if not 0 <= min(ids) <= max(ids) < self.session.vocab_size:
            raise invalid(
                f"token ids of the prompt run from {min(ids)} to {max(ids)}, expected 0 to {self.session.vocab_size - 1}",
                "prompt",
            )
        return ids

    def _generation_options(self, request: Request) -> GenerationOptions:
        most = [limit for limit in (request.max_tokens, self.options.max_tokens) if limit is not None]
        biases = request.biases
        if biases and not 0 <= min(biases) <= max(biases) < self.session.vocab_size:
            raise invalid(f"logit_bias names a token that is none of 0 to {self.session.vocab_size - 1}", "logit_bias")
        wanted = request.constraint
        return GenerationOptions(
            max_tokens=min(most, default=None),
            stop=request.stop_strings,
            sampling=SamplingOptions.from_generation_config(
                self._recommended, temperature=request.temperature, top_p=request.top_p, top_k=request.top_k,
                min_p=request.min_p, repetition_penalty=request.repetition_penalty, seed=request.seed,
            ),
            logit_bias=biases,
            logprobs=request.top_logprobs_wanted,
            constraint=None if wanted is None else self._compile(json.dumps(wanted, sort_keys=True)),
        )  # fmt: skip

    def _compiled(self, wanted: str) -> Any:
        """Raises UsageError."""
        from ..constraint import compile_constraint

        return compile_constraint(self.tokenizer, self.session.vocab_size, **json.loads(wanted))


def _nth(options: GenerationOptions, copy: int) -> GenerationOptions:
    """The same for another answer: a seed must not give them all the same text."""
    if options.sampling.seed is None:
        return options
    return replace(options, sampling=replace(options.sampling, seed=options.sampling.seed + copy))


def _name(path: Path) -> str:
    """The file's, or its folder's where every model's file has the same name."""
    return path.resolve().parent.name if path.stem == "model" and path.resolve().parent.name else path.stem
