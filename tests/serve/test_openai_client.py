"""The official client against a real server: every way to ask, and what it says is what the command line says."""

from __future__ import annotations

import asyncio
import math

import openai
import pytest
from support.bundled import MODEL, PROMPT, golden
from support.server import RunningServer

from .conftest import client_of, generated_alone

QUESTION = [{"role": "user", "content": "What do you like to do for fun?"}]
ANSWER = "I like to go to the gym, read, and spend time with my family."  # greedy, as in the README


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["default"]
    model = client.models.retrieve("default")
    assert (model.object, model.owned_by) == ("model", "fbiedge") and model.created > 0
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_a_completion_is_the_golden_text(client: openai.OpenAI) -> None:
    done = client.completions.create(model="default", prompt=PROMPT, temperature=0, max_tokens=64)
    assert golden("int8").startswith(done.choices[0].text) and len(done.choices[0].text) > 100
    assert (done.object, done.choices[0].finish_reason) == ("text_completion", "length")
    assert done.usage and (done.usage.prompt_tokens, done.usage.completion_tokens) == (9, 64)
    assert done.usage.total_tokens == 73


def test_a_completion_ends_after_16_tokens_unless_told_otherwise(client: openai.OpenAI) -> None:
    done = client.completions.create(model="default", prompt=PROMPT)
    assert done.usage and done.usage.completion_tokens == 16


def test_a_chat_says_what_the_command_line_says(client: openai.OpenAI) -> None:
    done = client.chat.completions.create(model="default", messages=QUESTION, temperature=0)
    choice = done.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", ANSWER, "stop")
    assert done.object == "chat.completion" and done.id.startswith("chatcmpl-") and done.usage
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens


def test_a_streamed_chat_is_the_same(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="default", messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == ANSWER
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == [] and chunks[-1].usage and chunks[-1].usage.completion_tokens == 17
    assert chunks[-1].usage.prompt_tokens_details
    assert len(chunks) > 10, "text comes as it is generated"


def test_without_include_usage_no_chunk_has_any(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="default", messages=QUESTION, temperature=0, stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


def test_a_streamed_completion_is_the_same(client: openai.OpenAI) -> None:
    stream = client.completions.create(model="default", prompt=PROMPT, temperature=0, max_tokens=40, stream=True)
    chunks = list(stream)
    assert golden("int8").startswith("".join(chunk.choices[0].text for chunk in chunks))
    assert chunks[-1].choices[0].finish_reason == "length"


def test_many_at_once_from_the_async_client(server: RunningServer) -> None:
    """Greedy and streamed, more of them than there are slots."""

    async def ask(client: openai.AsyncOpenAI, streamed: bool) -> str:
        if not streamed:
            done = await client.chat.completions.create(model="default", messages=QUESTION, temperature=0)
            return done.choices[0].message.content or ""
        stream = await client.chat.completions.create(model="default", messages=QUESTION, temperature=0, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, streamed=index % 2 == 0) for index in range(10)))

    assert asyncio.run(ask_all()) == [ANSWER] * 10


def test_a_seed_is_that_of_the_command_line(client: openai.OpenAI) -> None:
    done = [
        client.completions.create(model="default", prompt=PROMPT, seed=7, temperature=1.1, top_p=0.9, max_tokens=40)
        for _ in range(2)
    ]
    alone = generated_alone(MODEL, PROMPT, 40, seed=7, temperature=1.1, top_p=0.9)
    assert [one.choices[0].text for one in done] == [alone, alone]
    other = client.completions.create(model="default", prompt=PROMPT, seed=8, temperature=1.1, top_p=0.9, max_tokens=40)
    assert other.choices[0].text != alone


def test_sampling_beyond_openai(client: openai.OpenAI) -> None:
    extensions = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.3}
    done = client.completions.create(
        model="default", prompt=PROMPT, seed=3, temperature=1.5, top_p=1, max_tokens=40, extra_body=extensions
    )
    alone = generated_alone(MODEL, PROMPT, 40, seed=3, temperature=1.5, top_p=1.0, **extensions)
    assert done.choices[0].text == alone
    greedy = client.completions.create(
        model="default", prompt=PROMPT, temperature=2, max_tokens=20, extra_body={"top_k": 1}
    )
    assert golden("int8").startswith(greedy.choices[0].text)


@pytest.mark.parametrize("stop", ["gym", ["nothing that comes", "gym, read"]])
def test_stop(client: openai.OpenAI, stop: str | list[str]) -> None:
    done = client.chat.completions.create(model="default", messages=QUESTION, temperature=0, stop=stop)
    assert (done.choices[0].message.content, done.choices[0].finish_reason) == ("I like to go to the ", "stop")
    stream = client.chat.completions.create(model="default", messages=QUESTION, temperature=0, stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "I like to go to the "


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_max_tokens(client: openai.OpenAI, name: str) -> None:
    limit: dict = {name: 3}
    done = client.chat.completions.create(model="default", messages=QUESTION, temperature=0, **limit)
    assert (done.choices[0].message.content, done.choices[0].finish_reason) == ("I like to", "length")


def test_more_tokens_than_fit_end_with_the_context(client: openai.OpenAI) -> None:
    done = client.completions.create(
        model="default", prompt="the cat " * 150, temperature=0, max_tokens=100_000, logit_bias={"2": -100, "5": -100}
    )
    assert done.usage and done.choices[0].finish_reason == "length"
    assert done.usage.total_tokens <= 513


def test_several_choices(client: openai.OpenAI) -> None:
    """Each is what its own seed gives."""
    done = client.completions.create(model="default", prompt=PROMPT, n=3, seed=20, max_tokens=12)
    assert [choice.index for choice in done.choices] == [0, 1, 2]
    assert [choice.text for choice in done.choices] == [
        generated_alone(MODEL, PROMPT, 12, seed=seed) for seed in (20, 21, 22)
    ]
    assert done.usage and (done.usage.prompt_tokens, done.usage.completion_tokens) == (9, 36)
    stream = client.completions.create(model="default", prompt=PROMPT, n=3, seed=20, max_tokens=12, stream=True)
    texts = ["", "", ""]
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in done.choices]


def test_several_prompts_as_text_and_as_ids(client: openai.OpenAI) -> None:
    one = client.completions.create(model="default", prompt=[PROMPT, "The dog"], temperature=0, max_tokens=8)
    assert golden("int8").startswith(one.choices[0].text) and one.choices[1].index == 1
    assert one.choices[1].text == generated_alone(MODEL, "The dog", 8, temperature=0.0)
    ids = client.completions.create(model="default", prompt=[[1, 300, 301], [1, 400]], temperature=0, max_tokens=8)
    alone = client.completions.create(model="default", prompt=[1, 300, 301], temperature=0, max_tokens=8)
    assert ids.choices[0].text == alone.choices[0].text
    assert ids.usage and ids.usage.prompt_tokens == 5


def test_logprobs_of_a_chat(client: openai.OpenAI) -> None:
    done = client.chat.completions.create(
        model="default", messages=QUESTION, temperature=0, logprobs=True, top_logprobs=3
    )
    assert done.choices[0].logprobs and done.choices[0].logprobs.content and done.usage
    named = done.choices[0].logprobs.content
    assert len(named) == done.usage.completion_tokens
    assert b"".join(bytes(token.bytes or []) for token in named).decode().strip() == ANSWER
    for token in named:
        best = token.top_logprobs[0]
        assert (best.token, best.logprob) == (token.token, token.logprob)  # greedy
        assert len(token.top_logprobs) == 3
        assert token.logprob <= 0 and sum(math.exp(top.logprob) for top in token.top_logprobs) <= 1.0001
    stream = client.chat.completions.create(
        model="default", messages=QUESTION, temperature=0, logprobs=True, top_logprobs=3, stream=True
    )
    streamed = [
        token for chunk in stream if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content or []
    ]
    assert streamed == named


def test_logprobs_of_a_completion(client: openai.OpenAI) -> None:
    done = client.completions.create(model="default", prompt=PROMPT, temperature=0, max_tokens=10, logprobs=2)
    told = done.choices[0].logprobs
    assert told and told.tokens and told.token_logprobs and told.top_logprobs and told.text_offset
    assert "".join(told.tokens) == done.choices[0].text
    text, rows = done.choices[0].text, (told.text_offset, told.tokens, told.token_logprobs, told.top_logprobs)
    for at, token, logprob, top in zip(*rows, strict=True):
        assert text[at:].startswith(token)
        assert top[token] == logprob == max(top.values()) and len(top) == 2
    none = client.completions.create(model="default", prompt=PROMPT, temperature=0, max_tokens=2, logprobs=0)
    assert none.choices[0].logprobs and none.choices[0].logprobs.top_logprobs
    assert [len(top) for top in none.choices[0].logprobs.top_logprobs] == [1, 1]


def test_logit_bias(client: openai.OpenAI) -> None:
    first = client.completions.create(model="default", prompt=[1, 300], temperature=0, max_tokens=1)
    forced = client.completions.create(model="default", prompt=[1, 300], max_tokens=3, logit_bias={"333": 100})
    banned = client.completions.create(
        model="default", prompt=[1, 300], temperature=0, max_tokens=1, logprobs=1, logit_bias={"333": 100}
    )
    assert forced.choices[0].text != first.choices[0].text
    assert forced.choices[0].text == 3 * banned.choices[0].text
    # Logprobs are the model's own, whatever the bias.
    assert banned.choices[0].logprobs and banned.choices[0].logprobs.top_logprobs
    assert first.choices[0].text in banned.choices[0].logprobs.top_logprobs[0]


def test_a_system_prompt_and_earlier_turns_count(gguf_server: RunningServer) -> None:
    user, system = {"role": "user", "content": "Hello"}, {"role": "system", "content": "Be kind."}
    with client_of(gguf_server) as client:

        def tokens(*messages: dict) -> int:
            done = client.chat.completions.create(model="tiny", messages=list(messages), max_tokens=1)
            assert done.usage
            return done.usage.prompt_tokens

        assert tokens(system, user) > tokens(user)
        assert tokens(system | {"role": "developer"}, user) == tokens(system, user)
        assert tokens(user, {"role": "assistant", "content": "Hi"}, user) > tokens(user)
        in_parts = {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}
        assert tokens(in_parts) == tokens(user)


def test_what_is_wrong_raises_the_clients_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="this server has 'default'"):
        client.chat.completions.create(model="gpt-4", messages=QUESTION)
    with pytest.raises(openai.BadRequestError, match="top_p is 2") as raised:
        client.chat.completions.create(model="default", messages=QUESTION, top_p=2)
    assert raised.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="knows the roles user and assistant, not system"):
        client.chat.completions.create(model="default", messages=[{"role": "system", "content": "Be kind."}])
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="default", prompt="the cat " * 600)
    assert long.value.code == "context_length_exceeded"


def test_a_gguf_too(gguf_server: RunningServer) -> None:
    with client_of(gguf_server) as client:
        done = client.chat.completions.create(
            model="tiny", messages=QUESTION, temperature=0, max_tokens=8, logprobs=True, top_logprobs=2
        )
        stream = client.chat.completions.create(
            model="tiny", messages=QUESTION, temperature=0, max_tokens=8, stream=True
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert text == done.choices[0].message.content
        assert done.choices[0].logprobs and done.choices[0].logprobs.content
        again = client.chat.completions.create(model="tiny", messages=QUESTION, temperature=0, max_tokens=8)
        assert again.usage and again.usage.prompt_tokens_details
        assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens - 1
