"""A conversation with a model: turns in, pieces of the answer out. Knows nothing of terminals.

The whole conversation is the prompt of every answer; the session's KV cache still holds all but the newest turn, so only
that is run. For this the ids must stay the same: a model's own words, tokenized again, may split differently, so the ids
that it generated are spliced in instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from .cached_session import CachedSession
from .chat_template import ChatTemplate, Message
from .errors import UsageError
from .generate import Event, GenerationOptions, GenerationStats, Piece, end_tokens, generate
from .tokenizer import Tokenizer


@dataclass(frozen=True)
class _Answer:
    text: str
    ids: tuple[int, ...] | None  # None where they are not exactly the ids of `text`


class Chat:
    """Turns with one model. Without a chat template every turn's text is added to one text, which the model continues."""

    def __init__(self, session: CachedSession, options: GenerationOptions, *, system: str | None = None) -> None:
        """Raises ModelFileError for an unusable tokenizer or chat template, UsageError for a system prompt without one."""
        self.session = session
        self.options = options
        self.tokenizer = Tokenizer.from_model(session.model)
        self.template = ChatTemplate.from_model(session.model)
        if system and self.template is None:
            raise UsageError("this model has no chat template, so it can't take a system prompt")
        self._ends = end_tokens(session.model, self.tokenizer)
        self._system: list[Message] = [{"role": "system", "content": system}] if system else []
        self._turns = 0
        self.reset()

    def reset(self) -> None:
        """Forget the conversation."""
        self._messages: list[Message] = list(self._system)
        self._answers: list[_Answer] = []
        self._plain_ids: list[int] = []

    def ask(self, text: str, cancelled: Callable[[], bool] = lambda: False) -> Iterator[Event]:
        """The answer to `text`, which joins the conversation with it, also when cancelled halfway.

        Raises UsageError where the conversation no longer fits the context; the turn then leaves no trace.
        """
        messages: list[Message] = [*self._messages, {"role": "user", "content": text}]
        ids = self._plain_prompt(text) if self.template is None else self._prompt(self.template, messages)
        if len(ids) > self.session.capacity:
            raise UsageError(
                f"the conversation of {len(ids)} tokens no longer fits the context of {self.session.capacity}; "
                "/reset starts a new one"
            )
        options = self.options
        if options.sampling.seed is not None:  # a new sampler a turn must not draw the same numbers again
            options = replace(options, sampling=replace(options.sampling, seed=options.sampling.seed + self._turns))
        self._turns += 1
        answer = ""
        for event in generate(self.session, self.tokenizer, ids, options, ends=self._ends, cancelled=cancelled):
            if isinstance(event, Piece):
                answer += event.text
            elif isinstance(event, GenerationStats) and (event.generated_ids or event.finish_reason != "cancelled"):
                same = event.finish_reason != "stop" and self.tokenizer.decode(event.generated_ids) == answer
                self._answers.append(_Answer(answer, event.generated_ids if same else None))
                self._messages = [*messages, {"role": "assistant", "content": answer}]
                self._plain_ids = [*ids, *event.generated_ids]
            yield event

    def _plain_prompt(self, text: str) -> list[int]:
        if not self._plain_ids:
            return self.tokenizer.encode(text)
        return [*self._plain_ids, *self.tokenizer.encode_rendered("\n" + text, continues=True)]

    def _prompt(self, template: ChatTemplate, messages: list[Message]) -> list[int]:
        """Ids of `messages` by the template, with the generated ids of earlier answers in their places."""
        rendered = template.render(messages)
        marked: list[Message] = []
        texts: list[str] = []
        for message in messages:
            if message["role"] == "assistant" and self._answers[len(texts)].ids is not None:
                marked.append({"role": "assistant", "content": f"\ue000{len(texts)}\ue001"})
            else:
                marked.append(message)
            if message["role"] == "assistant":
                texts.append(message["content"])
        if marked == messages:
            return self.tokenizer.encode_rendered(rendered)
        # Where the template changes an answer (trims it, drops the thinking), the ids would say something else.
        frame = template.render(marked)
        ids: list[int] = []
        joined = ""
        for index, answer in enumerate(self._answers):
            before, mark, after = frame.partition(f"\ue000{index}\ue001")
            if answer.ids is None:
                continue
            if not mark:
                return self.tokenizer.encode_rendered(rendered)
            joined += before + answer.text
            ids += [*self.tokenizer.encode_rendered(before, continues=bool(ids)), *answer.ids]
            frame = after
        if joined + frame != rendered:
            return self.tokenizer.encode_rendered(rendered)
        return [*ids, *self.tokenizer.encode_rendered(frame, continues=True)]
