"""Many clients at a time: each gets what it would get alone, prompts are not run twice, and limits are said clearly."""

from __future__ import annotations

import asyncio
import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from support.bundled import MODEL, PROMPT, UNSEEN_STORY
from support.server import RunningServer

from .conftest import client_of

STARTS = ["The dog", "One day", "Mia had a", "In the park, ", "Tom said", "The sun", "A small bird", "Mom and"]


def questions() -> list[dict[str, Any]]:
    """Of many lengths, greedy and seeded, some with a beginning in common."""
    chance = random.Random(1)
    asked = []
    for index in range(24):
        body: dict[str, Any] = {"prompt": chance.choice(STARTS) + UNSEEN_STORY[: chance.choice([0, 9, 60, 333])]}
        body |= {"max_tokens": chance.choice([5, 20, 60])}
        body |= {"temperature": 0} if index % 2 else {"temperature": 1.2, "seed": index}
        body |= chance.choice([{}, {"repetition_penalty": 1.2}, {"logit_bias": {"300": 3}}, {"top_k": 7}])
        asked.append(body)
    return asked


@pytest.mark.parametrize("slots", [1, 3])
def test_interleaved_requests_get_what_each_gets_alone(slots: int) -> None:
    """Alone: one after another, by a server with one slot that remembers nothing."""
    asked = questions()
    with RunningServer(MODEL, "--slots", 1) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        alone = [text_of(http, body | {"cache_prompt": False}) for body in asked]
    with RunningServer(MODEL, "--slots", slots) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        order = list(range(len(asked)))
        for again in range(2):
            random.Random(again).shuffle(order)
            with ThreadPoolExecutor(8) as clients:
                texts = list(clients.map(lambda index: text_of(http, asked[index]), order))
            assert texts == [alone[index] for index in order]


def text_of(http: httpx.Client, body: dict[str, Any]) -> str:
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["text"]
    return text


def test_a_common_beginning_is_not_run_again() -> None:
    with RunningServer(MODEL, "--slots", 2) as server, client_of(server) as client:

        def cached(prompt: str, **options: Any) -> tuple[int, int]:
            done = client.completions.create(model="default", prompt=prompt, temperature=0, max_tokens=4, **options)
            assert done.usage and done.usage.prompt_tokens_details
            return done.usage.prompt_tokens_details.cached_tokens or 0, done.usage.prompt_tokens

        assert cached(UNSEEN_STORY)[0] == 0
        again, all_of_it = cached(UNSEEN_STORY)
        assert again == all_of_it - 1 > 80, "one is run for its logits"
        assert cached(UNSEEN_STORY, extra_body={"cache_prompt": False})[0] == 0
        longer, tokens = cached(UNSEEN_STORY + " The next day")
        assert longer >= all_of_it - 1 and tokens > all_of_it
        assert cached("Something else")[0] <= 1, "the other slot is free, and this one's memory is worth more"
        assert cached(UNSEEN_STORY + " She")[0] >= all_of_it - 1, "it was kept"


def test_a_conversation_runs_only_its_newest_turn(client: openai.OpenAI) -> None:
    messages: list[Any] = []
    before = 0
    for question in ("Hello, how are you today?", "What do you like to eat?", "And your dog?"):
        messages.append({"role": "user", "content": question})
        done = client.chat.completions.create(model="default", messages=messages, temperature=0, max_tokens=20)
        messages.append({"role": "assistant", "content": done.choices[0].message.content})
        assert done.usage and done.usage.prompt_tokens_details
        assert (done.usage.prompt_tokens_details.cached_tokens or 0) >= before
        before = done.usage.prompt_tokens - 1


ENDLESS = {"max_tokens": 400, "logit_bias": {str(token): -100 for token in range(6)}, "temperature": 0}


def test_more_than_fit_the_queue_are_told_to_come_back() -> None:
    with RunningServer(MODEL, "--slots", 2, "--queue", 3) as server:

        async def ask_all() -> list[Any]:
            async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
                asked = [client.completions.create(model="default", prompt=PROMPT, **ENDLESS) for _ in range(12)]
                return await asyncio.gather(*asked, return_exceptions=True)

        answers = asyncio.run(ask_all())
        refused = [answer for answer in answers if isinstance(answer, openai.RateLimitError)]
        assert 5 <= len(answers) - len(refused) < 12
        for error in refused:
            assert error.code == "queue_full" and error.response.headers["retry-after"] == "1"
            assert "the queue of 3 answers is full" in error.message
        texts = [answer.choices[0].text for answer in answers if answer not in refused]
        assert len(set(texts)) == 1
        with client_of(server, max_retries=5) as patient:  # the official client comes back by itself
            assert patient.completions.create(model="default", prompt=PROMPT, max_tokens=1)


def test_a_timeout_cuts_an_answer_short_or_says_that_there_was_none() -> None:
    with RunningServer(MODEL, "--slots", 1, "--request-timeout", 0.2) as server:
        url = f"{server.url}/v1/completions"
        body = {"prompt": PROMPT, "n": 20} | ENDLESS
        late = httpx.post(url, json=body, timeout=60)
        assert late.status_code == 503 and late.json()["error"]["code"] == "timeout"
        assert late.headers["retry-after"] == "1"
        streamed = httpx.post(url, json=body | {"stream": True}, timeout=60)
        assert streamed.status_code == 200 and '"code":"timeout"' in streamed.text
        assert streamed.text.endswith("data: [DONE]\n\n")
    with RunningServer(MODEL, "--slots", 1, "--request-timeout", 0.2) as server:
        one = httpx.post(f"{server.url}/v1/completions", json=body | {"n": 1}, timeout=60)
        assert one.json()["choices"][0]["finish_reason"] == "length"


def test_limits_of_the_server() -> None:
    options = ("--max-tokens", 3, "--max-prompt-tokens", 20, "--name", "small")
    with RunningServer(MODEL, *options) as server, client_of(server) as client:
        done = client.completions.create(model="small", prompt="The dog", max_tokens=50)
        assert done.usage and done.usage.completion_tokens <= 3
        with pytest.raises(openai.BadRequestError, match="this server takes at most 20"):
            client.completions.create(model="small", prompt=UNSEEN_STORY)


def test_constrained_answers(client: openai.OpenAI) -> None:
    """Of a model that knows nothing of JSON."""
    schema = {
        "type": "object", "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"enum": [1, 2, 3]}},
        "required": ["name", "age"], "additionalProperties": False,
    }  # fmt: skip
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "child", "schema": schema, "strict": True}}
    for seed in range(3):
        done = client.chat.completions.create(
            model="default", messages=[{"role": "user", "content": "Who are you?"}], seed=seed, response_format=wanted
        )
        found = json.loads(done.choices[0].message.content or "")
        assert set(found) == {"name", "age"} and found["age"] in (1, 2, 3) and done.choices[0].finish_reason == "stop"
    answer = client.completions.create(
        model="default", prompt=PROMPT, temperature=0, max_tokens=20, extra_body={"regex": r" went to the (zoo|moon)\."}
    )
    assert answer.choices[0].text in (" went to the zoo.", " went to the moon.")
    grammar = 'root ::= " yes" | " no"'
    stream = client.completions.create(
        model="default", prompt=PROMPT, max_tokens=20, stream=True, extra_body={"grammar": grammar}
    )
    assert "".join(chunk.choices[0].text for chunk in stream) in (" yes", " no")


def test_a_gguf_is_shared_the_same_way(gguf_server: RunningServer) -> None:
    """Two contexts of llama.cpp, many clients; alone: nothing is remembered and nobody else asks."""
    chance = random.Random(2)
    asked = [
        {"prompt": [chance.randrange(5, 90) for _ in range(chance.choice([1, 7, 40]))], "max_tokens": chance.choice([4, 30])}
        | ({"temperature": 0} if index % 2 else {"temperature": 1.3, "seed": index})
        for index in range(12)
    ]  # fmt: skip
    with httpx.Client(base_url=gguf_server.url, timeout=60) as http:
        alone = [text_of(http, body | {"cache_prompt": False}) for body in asked]
        assert len(set(alone)) > 3
        order = [*range(len(asked))] * 2
        chance.shuffle(order)
        with ThreadPoolExecutor(6) as clients:
            texts = list(clients.map(lambda index: text_of(http, asked[index]), order))
    assert texts == [alone[index] for index in order]


def longest_wait(server: RunningServer, busy: dict[str, Any]) -> tuple[httpx.Response, float]:
    """The answer to `busy`, and the most seconds that /health took meanwhile."""
    worst = 0.0
    with httpx.Client(base_url=server.url) as http, ThreadPoolExecutor(1) as other:
        http.get("/health")
        answer = other.submit(httpx.post, f"{server.url}/v1/completions", json=busy, timeout=60)
        while not answer.done():
            started = time.monotonic()
            http.get("/health", timeout=60)
            worst = max(worst, time.monotonic() - started)
    return answer.result(), worst


def test_nobody_waits_for_a_prompt_that_takes_seconds_to_cut_into_tokens(server: RunningServer) -> None:
    answer, worst = longest_wait(server, {"prompt": "abcdefghij" * 100_000})
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert worst < 1


def test_an_answer_of_megabytes_is_whole(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={"prompt": "The", "n": 10, "logprobs": 20} | ENDLESS)
    assert len(answer.content) > 2_000_000 and answer.headers["content-type"] == "application/json"
    assert [len(choice["logprobs"]["tokens"]) for choice in answer.json()["choices"]] == [400] * 10
