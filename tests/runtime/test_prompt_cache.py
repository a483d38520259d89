"""Prompts whose keys and values are kept in a file: nothing is run again, and nothing that is wrong is taken."""

from __future__ import annotations

import errno
import json
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import onnx
import pytest
from support.errors import raises_line
from support.tiny_gguf import tiny_gguf
from support.tiny_model import CHAT_TEMPLATE, tiny_model

from fbiedge.cached_session import CachedSession
from fbiedge.chat import Chat
from fbiedge.engines import open_session
from fbiedge.errors import OutputError, UsageError
from fbiedge.generate import GenerationOptions, GenerationStats, generate
from fbiedge.prompt_cache import PromptCache
from fbiedge.sampling import SamplingOptions
from fbiedge.session import Session
from fbiedge.tokenizer import Tokenizer

from .conftest import Run, one_error_line

GREEDY = SamplingOptions(temperature=0)
PROMPT = "Once upon a time there was a small town"

MODELS: dict[str, Callable[[Path], Path]] = {
    "fp32": lambda folder: tiny_model(folder, max_position_embeddings=256),
    "int8": lambda folder: tiny_model(folder, max_position_embeddings=256, export={"kv_cache": "int8"}),
    "gguf": lambda folder: tiny_gguf(folder, max_position_embeddings=256),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MODELS[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def int8_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MODELS["int8"](tmp_path_factory.mktemp("one"))


def count(model: Path, text: str) -> int:
    return len(Tokenizer.from_model(open_session(model).model).encode(text))


def answer(session: CachedSession, path: Path, prompt: str = PROMPT, **options: Any) -> tuple[str, GenerationStats]:
    """As `fbiedge generate --prompt-cache`."""
    tokenizer = Tokenizer.from_model(session.model)
    cache = PromptCache(path, session)
    settings = GenerationOptions(**({"max_tokens": 20, "sampling": GREEDY} | options))
    *_, stats = cache.keep(generate(session, tokenizer, tokenizer.encode(prompt), settings, ends=frozenset()))
    assert isinstance(stats, GenerationStats)
    return tokenizer.decode(stats.generated_ids), stats


def test_the_next_start_runs_one_token(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompt.cache"
    text, first = answer(open_session(model), path)
    assert first.cached_tokens == 0
    again, second = answer(open_session(model), path)
    assert again == text
    assert second.cached_tokens == second.prompt_tokens - 1


def test_a_longer_prompt_runs_what_is_new_and_is_kept_too(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompt.cache"
    answer(open_session(model), path)
    longer = PROMPT + " by the sea"
    text, stats = answer(open_session(model), path, longer)
    assert stats.cached_tokens == count(model, PROMPT)
    assert text == answer(open_session(model), tmp_path / "other", longer)[0]
    assert answer(open_session(model), path, longer)[1].cached_tokens == stats.prompt_tokens - 1


def test_another_prompt_takes_what_they_share(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompt.cache"
    answer(open_session(model), path)
    _, stats = answer(open_session(model), path, PROMPT[:20] + "X")
    assert stats.cached_tokens == count(model, PROMPT[:20])


def test_a_prompt_that_the_file_begins_with_leaves_the_file(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompt.cache"
    answer(open_session(model), path)
    before = path.read_bytes()
    for prompt in (PROMPT, PROMPT[:10]):
        answer(open_session(model), path, prompt)
        assert path.read_bytes() == before


def test_only_the_prompt_is_kept(model: Path, tmp_path: Path) -> None:
    """Whatever comes of it, also where the context is shifted in the answer."""
    short, long = tmp_path / "short", tmp_path / "long"
    answer(open_session(model, context=60), short, max_tokens=1)
    answer(open_session(model, context=60), long, max_tokens=90, context_shift=True)
    assert short.read_bytes() == long.read_bytes()


def test_rows_are_those_that_were_run(int8_model: Path, tmp_path: Path) -> None:
    first, second = Session.open(int8_model), Session.open(int8_model)
    ids = list(range(3, 200))
    first.forward(ids)
    second.restore(ids, memoryview(b"".join(bytes(part) for part in first.rows())))
    for name, buffer in first._kv_cache.buffers.items():
        assert (second._kv_cache.buffers[name][:, :, : len(ids)] == buffer[:, :, : len(ids)]).all()
    assert (first.forward([5]) == second.forward([5])).all()


def test_a_chat_keeps_its_first_prompt(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "m", chat_template=CHAT_TEMPLATE, max_position_embeddings=512)
    path = tmp_path / "prompt.cache"
    options = GenerationOptions(max_tokens=5, sampling=GREEDY)
    stats = []
    for _ in range(2):
        session = open_session(model)
        chat = Chat(session, options, system="Be kind.", prompt_cache=PromptCache(path, session))
        for text in ("Hello", "again"):
            *_, last = chat.ask(text)
            stats.append(last)
        written = path.read_bytes()
    assert stats[2].cached_tokens == stats[2].prompt_tokens - 1
    assert path.read_bytes() == written


@pytest.fixture
def cached(int8_model: Path, tmp_path: Path) -> tuple[Session, Path]:
    """A session, and the file of a short prompt."""
    session, path = Session.open(int8_model), tmp_path / "prompt.cache"
    answer(session, path, "Once")
    return session, path


def test_damage_at_every_byte(cached: tuple[Session, Path]) -> None:
    session, path = cached
    content = path.read_bytes()
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ (1 + at % 255)]) + content[at + 1 :])
        session.truncate(0)
        with raises_line(UsageError, str(path)):
            PromptCache(path, session)
        assert session.position == 0


def test_every_length(cached: tuple[Session, Path]) -> None:
    session, path = cached
    content = path.read_bytes()
    session.truncate(0)
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with raises_line(UsageError, "is no prompt cache" if length < 8 else "is damaged or cut short; delete it"):
            PromptCache(path, session)
    path.write_bytes(content + b"\0")
    with raises_line(UsageError, "is damaged"):
        PromptCache(path, session)


def rewritten(content: bytes, **changes: Any) -> bytes:
    """With another header, or other bytes of ids and rows, and the check sum that goes with them."""
    (size,) = struct.unpack_from("<I", content, 8)
    header, rest = json.loads(content[12 : 12 + size]), content[12 + size : -4]
    rest = changes.pop("rest", rest)
    text = json.dumps(header | changes).encode()
    body = content[:8] + struct.pack("<I", len(text)) + text + rest
    return body + struct.pack("<I", zlib.crc32(body))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "is of another version (2, this is 1)"),
        ({"model": "0" * 32, "name": "other.onnx"}, "is of another model (other.onnx, this is model.onnx)"),
        ({"model": "0" * 32}, "is of another model (of the same name, model.onnx)"),
        ({"engine": "abacus"}, "is of another engine (abacus, this is "),
        ({"kv_cache": "fp32"}, "is of another precision (fp32, this is int8)"),
        ({"tokens": 10**9}, "is damaged"),
        ({"tokens": 2**63}, "is damaged"),
        ({"tokens": -1}, "is damaged"),
        ({"tokens": True}, "is damaged"),
        ({"tokens": "5"}, "is damaged"),
        ({"tokens": None}, "is damaged"),
        ({"tokens": 0}, "can't be used: no tokens"),
        ({"tokens": 4}, "can't be used: it has "),
        ({"tokens": 300}, "holds 300 tokens, more than the context of 256"),
        ({"rest": b"\xff" * 20}, "can't be used: token ids run from -1"),
    ],
)
def test_files_made_to_hurt(cached: tuple[Session, Path], changes: dict[str, Any], message: str) -> None:
    """With a check sum that is right."""
    session, path = cached
    content = path.read_bytes()
    if changes.get("tokens") == 300:
        changes = {**changes, "rest": b"\0" * 100_000}
    path.write_bytes(rewritten(content, **changes))
    session.truncate(0)
    with raises_line(UsageError, message, str(path)):
        PromptCache(path, session)
    assert session.position == 0


@pytest.mark.parametrize("header", [b"[]", b"null", b"{", b"\xff", b"[" * 10_000, b"{}"])
def test_headers_that_are_none(cached: tuple[Session, Path], header: bytes) -> None:
    session, path = cached
    body = b"FBICACHE" + struct.pack("<I", len(header)) + header + b"\0" * 20
    path.write_bytes(body + struct.pack("<I", zlib.crc32(body)))
    with raises_line(UsageError, str(path)):
        PromptCache(path, session)


def test_llama_cpp_is_given_no_state_of_another_length(tmp_path: Path) -> None:
    model = MODELS["gguf"](tmp_path)
    path = tmp_path / "prompt.cache"
    answer(open_session(model), path)
    content = path.read_bytes()
    (size,) = struct.unpack_from("<I", content, 8)
    session = open_session(model)
    for rest in (content[12 + size : -4][:-8], content[12 + size : -4] + b"\0" * 8, content[12 + size :][: 4 * 60]):
        path.write_bytes(rewritten(content, rest=rest))
        with raises_line(UsageError, str(path), "delete it"):
            PromptCache(path, session)
    assert session.position == 0
    text, stats = answer(session, tmp_path / "other")
    assert stats.cached_tokens == 0 and text == answer(open_session(model), path.with_name("third"))[0]


def test_a_copy_is_the_same_model_and_one_with_other_weights_is_not(int8_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompt.cache"
    answer(Session.open(int8_model), path)
    copy = tmp_path / "copy.onnx"
    shutil.copy(int8_model, copy)
    assert answer(Session.open(copy), path)[1].cached_tokens > 0
    changed = onnx.load(copy)
    weights = max(changed.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    weights.raw_data = weights.raw_data[::-1]
    onnx.save(changed, copy)
    session = Session.open(copy)
    with raises_line(UsageError, "is of another model"):
        PromptCache(path, session)


def test_a_cache_longer_than_the_context(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompt.cache"
    answer(open_session(model), path)
    with raises_line(UsageError, f"holds {count(model, PROMPT)} tokens, more than the context of 20"):
        PromptCache(path, open_session(model, context=20))


def test_a_full_disk_leaves_the_file_as_it_was(cached: tuple[Session, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    session, path = cached
    before, files = path.read_bytes(), sorted(path.parent.iterdir())
    original = Path.open

    class Full:
        def __init__(self, file: BinaryIO) -> None:
            self._file = file

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            self._file.close()

        def write(self, part: bytes) -> None:
            if len(part) > 100:
                raise OSError(errno.ENOSPC, "No space left on device")
            self._file.write(part)

    def opened(self: Path, mode: str = "r", **options: Any) -> Any:
        file = original(self, mode, **options)
        return Full(file) if mode == "wb" else file

    monkeypatch.setattr(Path, "open", opened)
    with raises_line(OutputError, f"can't write {path}: No space left on device"):
        answer(session, path, "Something else that is long")
    assert path.read_bytes() == before and sorted(path.parent.iterdir()) == files


def test_what_can_be_no_file(fbiedge: Run, int8_model: Path, tmp_path: Path) -> None:
    arguments = ["generate", int8_model, "-p", "a", "--max-tokens", 2, "--prompt-cache"]
    assert "it is a folder" in one_error_line(fbiedge(*arguments, tmp_path))
    (tmp_path / "file").write_text("text")
    assert "is no prompt cache" in one_error_line(fbiedge(*arguments, tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "text"
    assert fbiedge(*arguments, tmp_path / "new" / "prompt.cache")[0] == 0
    assert (tmp_path / "new" / "prompt.cache").exists()
