"""Servers that tests share: one of the bundled model, one of a GGUF, and the official client for each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from support.bundled import MODEL
from support.server import RunningServer
from support.tiny_gguf import tiny_gguf

CHAT_TEMPLATE = "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}[assistant]"


@pytest.fixture(scope="session")
def server() -> Iterator[RunningServer]:
    with RunningServer(MODEL, "--slots", 3, "--queue", 8) as running:
        yield running


@pytest.fixture(scope="session")
def gguf_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    path = tiny_gguf(
        tmp_path_factory.mktemp("served"), max_position_embeddings=128,
        metadata={"tokenizer.chat_template": CHAT_TEMPLATE},
    )  # fmt: skip
    with RunningServer(path, "--slots", 2, "--name", "tiny") as running:
        yield running


def client_of(server: RunningServer, **options: Any) -> openai.OpenAI:
    """The official client, which doesn't try again."""
    return openai.OpenAI(**{"base_url": f"{server.url}/v1", "api_key": "none", "max_retries": 0} | options)


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with client_of(server) as made:
        yield made


@pytest.fixture
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as made:
        yield made


def generated_alone(model: Path, prompt: str, max_tokens: int, **sampling: Any) -> str:
    """The text of `fbiedge generate`, by a session of its own."""
    from fbiedge.engines import open_session
    from fbiedge.generate import GenerationOptions, Piece, end_tokens, generate
    from fbiedge.sampling import SamplingOptions
    from fbiedge.tokenizer import Tokenizer

    session = open_session(model)
    tokenizer = Tokenizer.from_model(session.model)
    recommended = session.model.json_object("generation_config")
    options = GenerationOptions(
        max_tokens=max_tokens, sampling=SamplingOptions.from_generation_config(recommended, **sampling)
    )
    events = generate(session, tokenizer, tokenizer.encode(prompt), options, ends=end_tokens(session.model, tokenizer))
    return "".join(event.text for event in events if isinstance(event, Piece))
