"""A GGUF in llama.cpp: the logits of the numpy reference, a cache that can be trusted, and one line for what is wrong."""

from __future__ import annotations

import struct
import sys
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.checkpoints import small_tensors
from support.errors import raises_line
from support.tiny_gguf import HASH, byte_vocabulary, gguf_tensors, tiny_adapter, tiny_config, tiny_gguf

from fbiedge import llama_cpp_library, llama_cpp_session
from fbiedge.config import ModelConfig
from fbiedge.cpu import default_threads
from fbiedge.engines import is_gguf
from fbiedge.errors import ModelFileError, UsageError
from fbiedge.gguf_file import GgufFile
from fbiedge.gguf_model import adapter_path, find_adapter
from fbiedge.llama_cpp_session import LlamaCppSession
from fbiedge.metrics import compare_logits
from fbiedge.reference import Reference
from fbiedge.weights import Weights, open_checkpoint

IDS = [1, *(int(token) for token in np.random.default_rng(0).integers(3, 260, 299))]
# llama.cpp holds keys and values in fp16, and mixes them in fp16; logits reach 10 here.
ROUNDING: dict[str, Any] = {"atol": 0.1, "rtol": 0}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.gguf, its checkpoint beside it; context 300."""
    return tiny_gguf(tmp_path_factory.mktemp("gguf"), max_position_embeddings=300)


@pytest.fixture(scope="module")
def expected(path: Path) -> np.ndarray:
    return Reference(open_checkpoint(path.parent / "checkpoint")).logits(IDS)


@pytest.fixture
def session(path: Path) -> LlamaCppSession:
    return LlamaCppSession.open(path)


def test_logits_are_those_of_the_reference(session: LlamaCppSession, expected: np.ndarray) -> None:
    """In steps of 128, 128 and 44 tokens."""
    got = session.all_logits(IDS)
    loss = compare_logits(expected, got)
    assert loss.max_abs_error < ROUNDING["atol"] and loss.kl_divergence < 1e-4 and loss.top1_agreement > 0.99
    session.truncate(0)
    np.testing.assert_allclose(session.forward(IDS), got[-1], atol=1e-4)


def test_qwen3_runs_too(tmp_path: Path) -> None:
    """Heads normalised, and larger than hidden / heads."""
    path = tiny_gguf(tmp_path, model_type="qwen3", head_dim=32)
    expected = Reference(open_checkpoint(tmp_path / "checkpoint")).logits(IDS[:60])
    assert compare_logits(expected, LlamaCppSession.open(path).all_logits(IDS[:60])).kl_divergence < 1e-4


def test_a_token_at_a_time_gives_the_same(session: LlamaCppSession, expected: np.ndarray) -> None:
    for position, token in enumerate(IDS[:40]):
        np.testing.assert_allclose(session.forward([token]), expected[position], **ROUNDING)
    assert session.tokens == tuple(IDS[:40])


def test_logits_outlive_the_next_run(session: LlamaCppSession) -> None:
    first = session.forward(IDS[:3])
    kept = first.copy()
    session.forward(IDS[3:9])
    np.testing.assert_array_equal(first, kept)


def test_what_was_truncated_leaves_no_trace(session: LlamaCppSession, expected: np.ndarray) -> None:
    session.forward(IDS[:10])
    session.forward([7, 8, 9])
    session.truncate(10)
    np.testing.assert_allclose(session.all_logits(IDS[10:20]), expected[10:20], **ROUNDING)
    session.truncate(0)
    np.testing.assert_allclose(session.forward(IDS[:5]), expected[4], **ROUNDING)


def test_reuse_keeps_what_is_shared(session: LlamaCppSession, expected: np.ndarray) -> None:
    session.forward([*IDS[:10], 7, 8])
    assert session.reuse(IDS[:20]) == 10
    np.testing.assert_allclose(session.forward(IDS[10:20]), expected[19], **ROUNDING)
    assert session.reuse(IDS[:20]) == 19


def test_an_interrupted_run_is_as_if_it_had_not_been(
    session: LlamaCppSession, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C after llama.cpp has appended tokens and before the session has noted them."""
    session.forward(IDS[:6])
    with monkeypatch.context() as patch:

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(session._llama._api, "llama_get_logits", interrupt)
        with pytest.raises(KeyboardInterrupt):
            session.forward([9, 9, 9])
    assert session.position == 6
    np.testing.assert_allclose(session.forward(IDS[6:12]), expected[11], **ROUNDING)


def test_ctrl_c_while_a_model_is_opened(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is noticed in the log's callback, whose exceptions ctypes would only print."""

    class Interrupted(deque[tuple[int, str]]):
        def append(self, _line: tuple[int, str]) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(llama_cpp_library._log, "_lines", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        LlamaCppSession.open(path)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "no tokens to run"),
        ([260], "token ids run from 260 to 260, expected 0 to 259"),
        ([-1, 3], "token ids run from -1 to 3"),
        ([3] * 299, "prompt of 299 tokens after 2 in the cache is longer than the context of 300"),
    ],
)
def test_tokens_that_can_not_be_run(session: LlamaCppSession, ids: list[int], message: str) -> None:
    session.forward(IDS[:2])
    for run in (session.forward, session.all_logits):
        with raises_line(UsageError, message):
            run(ids)
    assert session.tokens == tuple(IDS[:2])


def test_the_context_can_be_filled(path: Path, expected: np.ndarray) -> None:
    """To the last token, although llama.cpp rounds it up."""
    session = LlamaCppSession.open(path, context=10)
    np.testing.assert_allclose(session.forward(IDS[:10]), expected[9], **ROUNDING)
    with raises_line(UsageError, "longer than the context of 10"):
        session.forward([3])


@pytest.mark.parametrize("context", [0, -1, 301])
def test_a_context_that_can_not_be(path: Path, context: int) -> None:
    with raises_line(UsageError, f"context is {context}, expected a number from 1 to 300"):
        LlamaCppSession.open(path, context=context)


def test_threads(path: Path) -> None:
    assert LlamaCppSession.open(path, threads=1000, context=1).threads == default_threads()
    assert LlamaCppSession.open(path, threads=1, context=1).threads == 1
    with raises_line(UsageError, "threads is 0"):
        LlamaCppSession.open(path, threads=0)


def test_a_long_context_is_cut_to_what_is_cheap_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(max_position_embeddings=1 << 20)
    row = 2 * 2 * 2 * 2 * 16  # key and value, fp16, 2 layers, 2 KV heads of 16
    monkeypatch.setattr(llama_cpp_session, "_DEFAULT_CACHE_BYTES", 100 * row)
    assert llama_cpp_session._capacity(None, config) == 100
    assert llama_cpp_session._capacity(1000, config) == 1000
    assert llama_cpp_session._capacity(None, tiny_config()) == 64
    monkeypatch.setattr(llama_cpp_session, "memory_bytes", lambda: 500 * row)
    with raises_line(UsageError, "a context of 1000 tokens takes", "--context"):
        llama_cpp_session._capacity(1000, config)


def test_description(session: LlamaCppSession) -> None:
    import llama_cpp

    assert session.description == f"llama.cpp (llama-cpp-python {llama_cpp.__version__}), F32 layers"
    assert (session.isa, session.accuracy_level, session.fallback_reason, session.kv_cache) == (
        None,
        None,
        None,
        "fp16",
    )


# The adapter beside the model.


class WithAdapter:
    """Weights plus the tiny adapter's outer product, in the first layer's up_proj."""

    def __init__(self, weights: Weights, adapter: GgufFile) -> None:
        a, b = (adapter.data(f"blk.0.ffn_up.weight.lora_{part}").view(np.float32) for part in "ab")
        self.config: ModelConfig = weights.config
        self.tensor = weights.tensor
        self._weights, self._difference = weights, np.outer(b, a)

    def linear(self, name: str) -> np.ndarray:
        dense = np.asarray(self._weights.linear(name))
        return dense + self._difference if name == "model.layers.0.mlp.up_proj" else dense


def test_the_adapter_is_loaded(tmp_path: Path) -> None:
    tiny_gguf(tmp_path)
    checkpoint = tmp_path / "checkpoint"
    path = tiny_gguf(tmp_path, metadata={"fbiedge.weights_sha256": HASH})
    without = LlamaCppSession.open(path).all_logits(IDS[:40])
    adapter = tiny_adapter(tmp_path / "model.beta.gguf")
    assert find_adapter(GgufFile.open(path)) == adapter_path(path) == adapter
    session = LlamaCppSession.open(path)
    assert session.description.endswith("F32 layers with model.beta.gguf")
    got = session.all_logits(IDS[:40])
    weights = WithAdapter(open_checkpoint(checkpoint), GgufFile.open(adapter))
    expected = Reference(weights).logits(IDS[:40])  # type: ignore[arg-type]
    assert compare_logits(expected, got).kl_divergence < 1e-4
    assert compare_logits(expected, without).kl_divergence > 0.01


def linked(link: Path, target: Path) -> Path:
    link.parent.mkdir(parents=True, exist_ok=True)
    try:
        link.symlink_to(target)
    except OSError as error:
        pytest.skip(f"no symbolic links here: {error}")
    return link


def test_the_adapter_of_a_linked_model(tmp_path: Path) -> None:
    """Beside the given name, as in the cache of Hugging Face, whose files have hashes for names; else beside the file."""
    path = tiny_gguf(tmp_path, metadata={"fbiedge.weights_sha256": HASH, "fbiedge.scaling_pattern": "row"})
    adapter = tiny_adapter(tmp_path / "model.beta.gguf")
    elsewhere = linked(tmp_path / "links" / "other.gguf", path)
    assert find_adapter(GgufFile.open(elsewhere)) == adapter
    assert LlamaCppSession.open(elsewhere).warning is None
    (tmp_path / "blobs").mkdir()
    snapshot = linked(tmp_path / "snapshots" / "x" / "model.gguf", path.rename(tmp_path / "blobs" / "aaa"))
    beside = linked(snapshot.with_name("model.beta.gguf"), adapter.rename(tmp_path / "blobs" / "bbb"))
    assert find_adapter(GgufFile.open(snapshot)) == beside
    assert LlamaCppSession.open(snapshot).description.endswith("with model.beta.gguf")
    beside.unlink()
    assert "its offsets (model.beta.gguf beside it) are missing" in str(LlamaCppSession.open(snapshot).warning)


@pytest.mark.parametrize(("name", "adapter"), [("UP.GGUF", "UP.beta.gguf"), ("renamed.bin", "renamed.bin.beta.gguf")])
def test_the_adapter_by_names_of_other_kinds(name: str, adapter: str, tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path, metadata={"fbiedge.weights_sha256": HASH}).rename(tmp_path / name)
    assert is_gguf(path) and find_adapter(GgufFile.open(path)) is None
    tiny_adapter(tmp_path / adapter)
    assert LlamaCppSession.open(path).description.endswith(f"with {adapter}")


@pytest.mark.parametrize("stated", ["1" * 64, None])
def test_an_adapter_of_another_model_is_refused(tmp_path: Path, stated: str | None) -> None:
    path = tiny_gguf(tmp_path, metadata={"fbiedge.weights_sha256": HASH})
    tiny_adapter(tmp_path / "model.beta.gguf", beta_of=stated)
    with raises_line(ModelFileError, "model.beta.gguf lies beside model.gguf but was not made for it"):
        LlamaCppSession.open(path)


def test_an_adapter_beside_a_model_of_others_is_refused(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path)
    tiny_adapter(tmp_path / "model.beta.gguf")
    with raises_line(ModelFileError, "was not made for it"):
        LlamaCppSession.open(path)


def test_a_broken_adapter(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path, metadata={"fbiedge.weights_sha256": HASH})
    adapter = tiny_adapter(tmp_path / "model.beta.gguf")
    whole = adapter.read_bytes()
    adapter.write_bytes(whole[:-50])
    with raises_line(ModelFileError, "model.beta.gguf", "cut short"):
        LlamaCppSession.open(path)
    for key, value in (("adapter.lora.alpha", 1), ("adapter.type", 3), ("general.type", 3)):
        tiny_adapter(adapter, **{key: value})
        with raises_line(ModelFileError, "model.beta.gguf", key):
            LlamaCppSession.open(path)
    for odd in (np.zeros((1, 64), np.int8), np.zeros((2, 1, 64), np.float32)):
        tiny_adapter(adapter, a=odd)
        with raises_line(ModelFileError, "model.beta.gguf: blk.0.ffn_up.weight.lora_a is", "expected an F32 matrix"):
            LlamaCppSession.open(path)
    tiny_adapter(adapter, **{"general.architecture": "qwen3"})
    with raises_line(ModelFileError, "can't open the adapter", "model arch and LoRA arch mismatch"):
        LlamaCppSession.open(path)


# Files that llama.cpp won't have: its reason comes through, and the process lives.


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("blk.1.ffn_down.weight", None, "tensor 'blk.1.ffn_down.weight' not found"),
        ("output_norm.weight", np.float16, "output_norm.weight is of type F16, which llama.cpp can't compute with"),
        ("blk.0.attn_q.weight", np.int8, "blk.0.attn_q.weight is of type I8"),
        ("token_embd.weight", np.float64, "token_embd.weight is of type F64"),
    ],
)
def test_a_tensor_that_is_missing_or_of_no_use(tmp_path: Path, name: str, dtype: Any, message: str) -> None:
    tensors = gguf_tensors(tiny_config(), small_tensors(tiny_config()))
    if dtype is None:
        del tensors[name]
    else:
        tensors[name] = tensors[name].astype(dtype)
    path = tiny_gguf(tmp_path, named=tensors)
    with raises_line(ModelFileError, str(path), message):
        LlamaCppSession.open(path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (byte_vocabulary(261), "tensor 'token_embd.weight' has wrong shape"),  # one more token than rows
        ({"llama.feed_forward_length": 97}, "tensor 'blk.0.ffn_gate.weight' has wrong shape"),
        ({"llama.attention.head_count_kv": 4}, "tensor 'blk.0.attn_k.weight' has wrong shape"),
        ({"llama.block_count": 3}, "tensor 'blk.2.attn_norm.weight' not found"),
        ({"llama.block_count": 513}, "513 layers, llama.cpp takes at most 512"),
        ({"general.file_type": "x"}, "general.file_type"),
        ({"split.count": 3}, "split"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count is 8"),
        ({"llama.expert_count": 4}, "expert_count is 4"),
        ({"llama.expert_used_count": 4}, "llama.expert_used_count, expected a model without experts"),
        ({"llama.expert_group_count": 4}, "llama.expert_group_count"),
        ({"llama.nextn_predict_layers": 7}, "llama.nextn_predict_layers"),
        ({"llama.context_length": 0}, "context_length is 0"),
        ({"tokenizer.ggml.merges": None}, "merges"),
        ({"tokenizer.ggml.bos_token_id": 260}, "260"),
        ({"general.type": "adapter"}, "is no model but of type 'adapter'"),
    ],
)
def test_metadata_that_does_not_fit(tmp_path: Path, metadata: dict[str, Any], message: str) -> None:
    path = tiny_gguf(tmp_path, metadata=metadata)
    with raises_line(ModelFileError, "model.gguf", message):
        LlamaCppSession.open(path)


def test_truncated_and_foreign_files(path: Path, tmp_path: Path) -> None:
    whole = path.read_bytes()
    for size in (0, 3, 20, 5000, len(whole) - 1):
        (tmp_path / "short.gguf").write_bytes(whole[:size])
        with raises_line(ModelFileError, "short.gguf"):
            LlamaCppSession.open(tmp_path / "short.gguf")
    (tmp_path / "other.gguf").write_bytes(b"GGML" + whole[4:])
    with raises_line(ModelFileError, "is not a GGUF file"):
        LlamaCppSession.open(tmp_path / "other.gguf")
    (tmp_path / "future.gguf").write_bytes(b"GGUF" + struct.pack("<I", 9) + whole[8:])
    with raises_line(ModelFileError, "version 9"):
        LlamaCppSession.open(tmp_path / "future.gguf")
    with raises_line(ModelFileError, "does not exist"):
        LlamaCppSession.open(tmp_path / "no.gguf")


def test_llama_cpp_is_not_installed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with raises_line(UsageError, "isn't installed", "pip install 'fbiedge[gguf]'"):
        LlamaCppSession.open(path)


def test_llama_cpp_is_too_old(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import llama_cpp

    monkeypatch.setattr(llama_cpp, "__version__", "0.3.9")
    with raises_line(UsageError, "llama-cpp-python is 0.3.9, expected 0.3.36 or later", "pip install"):
        LlamaCppSession.open(path)


def test_sessions_do_not_pile_up(path: Path) -> None:
    """Memory of a closed session is given back."""
    import gc

    from fbiedge.machine import peak_rss_bytes

    LlamaCppSession.open(path, threads=1)
    gc.collect()
    before = peak_rss_bytes()
    for _ in range(20):
        LlamaCppSession.open(path, threads=1).forward([1])
    after = peak_rss_bytes()
    if before is None or after is None:
        pytest.skip("this system doesn't tell how much memory a process used")
    assert after - before < 20 << 20
