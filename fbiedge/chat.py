"""A conversation with a model: turns in, pieces of the answer out. Knows nothing of terminals.

The whole conversation is the prompt of every answer; the session's KV cache still holds all but the newest turn, so only
that is run. For this the ids must stay the same: a model's own words, tokenized again, may split differently, so the ids
that it generated are spliced in instead.

With `context_shift`, a conversation that leaves too little room for an answer loses its oldest turns, so many at a time
that the next turns need no more shifts: what stays must be run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .cached_session import CachedSession
from .chat_template import ChatTemplate, Message
from .errors import UsageError
from .generate import Event, GenerationOptions, GenerationStats, Piece, end_tokens, generate
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from .prompt_cache import PromptCache


@dataclass(frozen=True)
class _Answer:
    text: str
    ids: tuple[int, ...] | None  # None where they are not exactly the ids of `text`


@dataclass(frozen=True)
class _Talk:
    """Questions and their answers."""

    questions: list[str]
    answers: list[_Answer]

    def messages(self) -> list[Message]:
        messages: list[Message] = []
        for question, answer in zip(self.questions, self.answers, strict=True):
            messages += {"role": "user", "content": question}, {"role": "assistant", "content": answer.text}
        return messages

    def with_turn(self, question: str, answer: _Answer) -> _Talk:
        return _Talk([*self.questions, question], [*self.answers, answer])

    def without_oldest(self) -> _Talk:
        return _Talk(self.questions[1:], self.answers[1:])


class Chat:
    """Turns with one model. Without a chat template every turn's text is added to one text, which the model continues."""

    def __init__(
        self,
        session: CachedSession,
        options: GenerationOptions,
        *,
        system: str | None = None,
        prompt_cache: PromptCache | None = None,
    ) -> None:
        """prompt_cache: keeps the prompt of the first answer.

        Raises ModelFileError for an unusable tokenizer or chat template, UsageError for a system prompt without one.
        """
        self.session = session
        self.options = options
        self.tokenizer = Tokenizer.from_model(session.model)
        self.template = ChatTemplate.from_model(session.model)
        if system and self.template is None:
            raise UsageError("this model has no chat template, so it can't take a system prompt")
        self.forgotten_turns = 0  # for want of room, before the last answer
        self._ends = end_tokens(session.model, self.tokenizer)
        self._system: list[Message] = [{"role": "system", "content": system}] if system else []
        self._turns = 0
        self._prompt_cache = prompt_cache
        self.reset()

    def reset(self) -> None:
        """Forget the conversation."""
        self._talk = _Talk([], [])
        self._plain_ids: list[int] = []

    def ask(self, text: str, cancelled: Callable[[], bool] = lambda: False) -> Iterator[Event]:
        """The answer to `text`, which joins the conversation with it, also when cancelled halfway.

        Raises UsageError where the conversation no longer fits the context; the turn then leaves no trace.
        """
        talk, options = self._talk, self.options
        if self.template is None:
            ids = self._plain_prompt(text)
        else:
            talk, ids = self._fitting(self.template, text)
            if options.context_shift:
                options = replace(options, keep_tokens=self._fixed_start(self.template, ids))
        if len(ids) > self.session.capacity:
            raise UsageError(
                f"the conversation of {len(ids)} tokens no longer fits the context of {self.session.capacity}; "
                "/reset starts a new one"
            )
        if options.sampling.seed is not None:  # a new sampler a turn must not draw the same numbers again
            options = replace(options, sampling=replace(options.sampling, seed=options.sampling.seed + self._turns))
        self._turns += 1
        self.forgotten_turns = len(self._talk.answers) - len(talk.answers)
        answer = ""
        events = generate(self.session, self.tokenizer, ids, options, ends=self._ends, cancelled=cancelled)
        if self._prompt_cache is not None:
            events, self._prompt_cache = self._prompt_cache.keep(events), None
        for event in events:
            if isinstance(event, Piece):
                answer += event.text
            elif isinstance(event, GenerationStats) and (event.generated_ids or event.finish_reason != "cancelled"):
                same = event.finish_reason != "stop" and self.tokenizer.decode(event.generated_ids) == answer
                self._talk = talk.with_turn(text, _Answer(answer, event.generated_ids if same else None))
                self._plain_ids = [*ids, *event.generated_ids]
            yield event

    def _fitting(self, template: ChatTemplate, text: str) -> tuple[_Talk, list[int]]:
        """What of the conversation stays, and the prompt made of it and of the question `text`."""
        talk, capacity = self._talk, self.session.capacity
        ids = self._prompt(template, talk, text)
        room = min(self.options.max_tokens or capacity, capacity // 4)
        if self.options.context_shift and len(ids) + room > capacity:
            while talk.answers and len(ids) > capacity // 2:
                talk = talk.without_oldest()
                ids = self._prompt(template, talk, text)
        return talk, ids

    def _fixed_start(self, template: ChatTemplate, ids: list[int]) -> int:
        """How many tokens of the prompt `ids` come before the first turn's text; a shift in an answer leaves them."""
        other = self._prompt(template, _Talk([], []), "\ue000")
        return next((at for at, (a, b) in enumerate(zip(ids, other, strict=False)) if a != b), 0)

    def _plain_prompt(self, text: str) -> list[int]:
        if not self._plain_ids:
            return self.tokenizer.encode(text)
        ids = [*self._plain_ids, *self.tokenizer.encode_rendered("\n" + text, continues=True)]
        capacity = self.session.capacity
        if self.options.context_shift and len(ids) > capacity - capacity // 4:
            new = len(ids) - len(self._plain_ids)
            return [ids[0], *ids[-max(new, capacity // 2) :]]
        return ids

    def _prompt(self, template: ChatTemplate, talk: _Talk, text: str) -> list[int]:
        """Ids of the conversation by the template, with the generated ids of earlier answers in their places."""
        messages: list[Message] = [*self._system, *talk.messages(), {"role": "user", "content": text}]
        rendered = template.render(messages)
        marked: list[Message] = []
        texts: list[str] = []
        for message in messages:
            if message["role"] == "assistant" and talk.answers[len(texts)].ids is not None:
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
        for index, answer in enumerate(talk.answers):
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
