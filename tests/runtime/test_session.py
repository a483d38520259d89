"""A session against the numpy reference, however its tokens are cut into runs, and the files it must refuse."""

from __future__ import annotations

import mmap
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from support.tiny_model import tiny_model

from fbiedge import cached_session
from fbiedge.config import PRESETS
from fbiedge.cpu import default_threads
from fbiedge.errors import ModelFileError, UsageError
from fbiedge.kv_cache import KVCache
from fbiedge.model_file import ModelFile
from fbiedge.ops_library import available_isas
from fbiedge.reference import Reference
from fbiedge.session import CHUNK, Session
from fbiedge.weights import open_checkpoint

IDS = np.random.default_rng(0).integers(3, 259, 40).tolist()
ROUNDING = {"rtol": 1e-4, "atol": 5e-4}  # float32 sums in another order; logits are of size 1 to 10


@pytest.fixture(scope="module")
def expected(plain_model: Path) -> np.ndarray:
    """Logits [40, 259] of IDS by the reference."""
    return Reference(open_checkpoint(plain_model.parent / "checkpoint")).logits(IDS)


@pytest.fixture
def session(plain_model: Path, engine: str) -> Session:
    return Session.open(plain_model, threads=1)


def test_logits_are_the_references(session: Session, expected: np.ndarray, engine: str) -> None:
    assert (session.isa is None) == (session.fallback_reason is not None) == (engine == "fallback")
    np.testing.assert_allclose(session.all_logits(IDS), expected, **ROUNDING)
    assert session.position == len(IDS)


def test_a_token_at_a_time_gives_the_same(session: Session, expected: np.ndarray) -> None:
    for position, token in enumerate(IDS):
        np.testing.assert_allclose(session.forward([token]), expected[position], **ROUNDING)


@pytest.mark.parametrize("chunk", [1, 3, 16, 39, 40])
def test_prefill_in_chunks_gives_the_same(
    session: Session, expected: np.ndarray, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cached_session, "CHUNK", chunk)
    np.testing.assert_allclose(session.forward(IDS), expected[-1], **ROUNDING)
    session.truncate(0)
    np.testing.assert_allclose(session.all_logits(IDS), expected, **ROUNDING)


def test_runs_of_any_length_alternate(session: Session, expected: np.ndarray) -> None:
    at = 0
    for length in (1, 5, 1, 1, 9, 2, 1, 20):
        np.testing.assert_allclose(session.forward(IDS[at : at + length]), expected[at + length - 1], **ROUNDING)
        at += length
    assert session.tokens == tuple(IDS)


def test_what_was_truncated_leaves_no_trace(session: Session, expected: np.ndarray) -> None:
    session.forward(IDS[:10])
    session.forward([7] * 30)
    session.truncate(10)
    np.testing.assert_allclose(session.all_logits(IDS[10:]), expected[10:], **ROUNDING)
    with pytest.raises(UsageError, match="holds 40"):
        session.truncate(41)


def test_earlier_logits_survive_the_next_run(session: Session) -> None:
    first = session.forward(IDS[:3])
    kept = first.copy()
    session.forward(IDS[3:])
    np.testing.assert_array_equal(first, kept)


def test_logits_without_a_copy_are_the_same_until_the_next_run(session: Session) -> None:
    session.forward(IDS[:3])
    view = session.forward(IDS[3:4], copy=False)
    kept = view.copy()
    session.truncate(3)
    np.testing.assert_array_equal(session.forward(IDS[3:4]), kept)
    session.forward(IDS[5:6])
    assert not np.array_equal(view, kept)  # so it was one; else `copy` saves nothing


def test_reuse_keeps_the_common_beginning(session: Session, expected: np.ndarray) -> None:
    assert session.reuse(IDS) == 0
    session.forward(IDS[:20])
    assert session.reuse([*IDS[:12], 0, 0]) == 12
    assert session.position == 12
    assert session.reuse(IDS) == 12
    np.testing.assert_allclose(session.forward(IDS[12:]), expected[-1], **ROUNDING)
    # The same prompt again: its last token must run, because nobody kept its logits.
    assert session.reuse(IDS) == len(IDS) - 1
    np.testing.assert_allclose(session.forward(IDS[-1:]), expected[-1], **ROUNDING)


def test_the_cache_is_written_in_place(session: Session) -> None:
    buffers = list(session._kv_cache.buffers.values())
    addresses = [buffer.ctypes.data for buffer in buffers]
    session.forward(IDS[:5])
    written = [buffer.copy() for buffer in buffers]
    session.forward(IDS[5:6])
    for before, now in zip(written, buffers, strict=True):
        np.testing.assert_array_equal(now[:, :, :5], before[:, :, :5])
        assert np.abs(now[:, :, :6]).min(axis=-1).max() > 0  # all six rows are there
        np.testing.assert_array_equal(now[:, :, 6:], 0)  # and none beyond
    assert [buffer.ctypes.data for buffer in session._kv_cache.buffers.values()] == addresses
    assert all(address % 64 == 0 for address in addresses)


@pytest.fixture(scope="module")
def int8_cache_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As plain_model, with an int8 cache."""
    return tiny_model(tmp_path_factory.mktemp("int8_cache"), export={"kv_cache": "int8"})


def test_an_int8_cache_costs_little_and_takes_a_quarter(
    int8_cache_model: Path, plain_model: Path, expected: np.ndarray, engine: str
) -> None:
    """8 bits of keys and values round what small random weights make of them by under 5 % of the logits' spread."""
    session, exact = Session.open(int8_cache_model, threads=1), Session.open(plain_model, threads=1)
    error = np.sqrt(np.mean((session.all_logits(IDS) - expected) ** 2)) / expected.std()
    assert 0 < error < 0.05
    sizes = [sum(buffer.nbytes for buffer in s._kv_cache.buffers.values()) for s in (session, exact)]
    assert sizes[0] == sizes[1] * (16 + 4) / (4 * 16)


def test_an_int8_cache_gives_the_same_in_any_pieces_and_after_going_back(int8_cache_model: Path) -> None:
    """To the bit: the rows that one run attends to are those that the next finds in the cache."""
    session = Session.open(int8_cache_model, threads=1)
    whole = session.all_logits(IDS)
    session.truncate(7)
    np.testing.assert_array_equal(session.all_logits(IDS[7:]), whole[7:])
    session.truncate(0)
    for position, token in enumerate(IDS):
        np.testing.assert_allclose(session.forward([token]), whole[position], **ROUNDING)
    assert session.reuse([*IDS[:12], 0, 0]) == 12
    np.testing.assert_allclose(session.forward(IDS[12:]), whole[-1], **ROUNDING)


def test_an_int8_cache_is_written_in_place(int8_cache_model: Path) -> None:
    session = Session.open(int8_cache_model, threads=1)
    session.forward(IDS[:5])
    for name, buffer in session._kv_cache.buffers.items():
        assert buffer.dtype == (np.float32 if name.endswith("_scale") else np.int8)
        assert np.abs(buffer[:, :, :5].astype(float)).min(axis=2).max() > 0
        np.testing.assert_array_equal(buffer[:, :, 5:], 0)


def test_the_context_ends_where_it_says(plain_model: Path, engine: str) -> None:
    session = Session.open(plain_model, threads=1, context=8)
    with pytest.raises(UsageError, match="prompt of 9 tokens is longer than the context of 8"):
        session.forward(IDS[:9])
    assert session.position == 0
    session.forward(IDS[:8])
    with pytest.raises(UsageError, match="1 tokens after 8 in the cache is longer than the context of 8"):
        session.forward([1])
    assert session.position == 8


def test_a_context_cut_short_computes_the_same(plain_model: Path, expected: np.ndarray, engine: str) -> None:
    np.testing.assert_allclose(Session.open(plain_model, context=40).all_logits(IDS), expected, **ROUNDING)


def test_longer_prompts_than_a_chunk(chat_model: Path, engine: str) -> None:
    ids = np.random.default_rng(1).integers(3, 259, 2 * CHUNK + 17).tolist()
    expected = Reference(open_checkpoint(chat_model.parent / "checkpoint")).logits(ids)
    np.testing.assert_allclose(Session.open(chat_model).all_logits(ids), expected, **ROUNDING)


def test_more_threads_than_cores_are_not_used(plain_model: Path) -> None:
    assert Session.open(plain_model, threads=1000).threads == default_threads()


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_nothing(plain_model: Path, expected: np.ndarray, threads: int, engine: str) -> None:
    np.testing.assert_allclose(Session.open(plain_model, threads=threads).all_logits(IDS), expected, **ROUNDING)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("name", ["input_ids", "logits", "attention_mask"])
def test_an_interrupt_while_binding_leaves_the_session_usable(plain_model: Path, name: str, after: bool) -> None:
    """Ctrl-C can come before or after any one call; what follows computes as if the interrupted run hadn't been."""

    class Interrupted:
        def __init__(self, binding: object) -> None:
            self.binding, self.armed = binding, False

        def __getattr__(self, method: str) -> object:
            def call(*arguments: object) -> object:
                stop = self.armed and arguments[:1] == (name,)
                if not stop or after:
                    getattr(self.binding, method)(*arguments)
                if stop:
                    self.armed = False
                    raise KeyboardInterrupt
                return None

            return call if method.startswith("bind_") else getattr(self.binding, method)

    class Onnx:
        """Runs with the binding itself, as ONNX Runtime takes no other object."""

        def __init__(self, onnx_session: Any) -> None:
            self.onnx_session = onnx_session

        def run_with_iobinding(self, interrupted: Any) -> None:
            self.onnx_session.run_with_iobinding(interrupted.binding)

    session, undisturbed = Session.open(plain_model, threads=1), Session.open(plain_model, threads=1)
    expected = undisturbed.all_logits(IDS)
    session.forward(IDS[:3])
    binding = Interrupted(session._binding)
    session._binding, session._onnx = binding, Onnx(session._onnx)
    binding.armed = True
    with pytest.raises(KeyboardInterrupt):
        session.all_logits(IDS[3:10])
    session.truncate(2)
    np.testing.assert_array_equal(session.forward([IDS[2]]), undisturbed_row(undisturbed, IDS[:3]))
    np.testing.assert_allclose(session.all_logits(IDS[3:]), expected[3:], **ROUNDING)


def undisturbed_row(session: Session, ids: Sequence[int]) -> np.ndarray:
    session.truncate(0)
    session.forward(ids[:2])
    return session.forward(ids[2:])


def test_two_sessions_of_one_file_are_independent(plain_model: Path, expected: np.ndarray, engine: str) -> None:
    one, other = Session.open(plain_model, threads=1), Session.open(plain_model, threads=1)
    one.forward(IDS[:7])
    other.forward([9] * 20)
    np.testing.assert_allclose(one.forward(IDS[7:]), expected[-1], **ROUNDING)


def test_external_data(external_model: Path, engine: str) -> None:
    expected = Reference(open_checkpoint(external_model.parent / "checkpoint")).logits(IDS)
    np.testing.assert_allclose(Session.open(external_model).all_logits(IDS), expected, **ROUNDING)


@pytest.mark.parametrize("pattern", ["row", "single", "block", "none"])
def test_every_scale_form(pattern: str, tmp_path: Path, engine: str) -> None:
    path = tiny_model(tmp_path, pattern=pattern, export={"block_scales": "fp32"})
    expected = Reference(open_checkpoint(tmp_path / "checkpoint")).logits(IDS)
    np.testing.assert_allclose(Session.open(path).all_logits(IDS), expected, **ROUNDING)


def test_the_accuracy_level_can_be_chosen(tmp_path: Path) -> None:
    path = tiny_model(tmp_path, export={"accuracy_level": "int8"})
    reference = Reference(open_checkpoint(tmp_path / "checkpoint")).logits(IDS)
    as_stored, exact = Session.open(path), Session.open(path, accuracy_level="fp32")
    assert (as_stored.accuracy_level, exact.accuracy_level) == ("int8", "fp32")
    np.testing.assert_allclose(exact.all_logits(IDS), reference, **ROUNDING)
    error = np.sqrt(np.mean((as_stored.all_logits(IDS) - reference) ** 2)) / reference.std()
    assert 0.01 < error < 0.2  # activations of 8 bits round, and random weights pass all of it on


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 0}, "context is 0, expected a number from 1 to 64"),
        ({"context": 65}, "context is 65, expected a number from 1 to 64"),
        ({"threads": 0}, "threads is 0"),
        ({"accuracy_level": "int4"}, "accuracy level is 'int4', expected one of int8, fp32"),
    ],
)
def test_options_out_of_range(plain_model: Path, options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Session.open(plain_model, **options)


@pytest.mark.parametrize("version", ["1.18.1", "1.21.9"])
def test_an_onnx_runtime_that_computes_wrongly(
    plain_model: Path, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxruntime.__version__", version)
    with pytest.raises(UsageError, match=f"ONNX Runtime is {version}, expected 1.22 or later"):
        Session.open(plain_model)


@pytest.mark.parametrize("ids", [[], [-1], [259]])
def test_ids_out_of_range(session: Session, ids: list[int]) -> None:
    with pytest.raises(UsageError):
        session.forward(ids)
    assert session.position == 0


# Files that are no model of ours. One line each, and never ONNX Runtime's own words for what can be said better.


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="does not exist"):
        Session.open(tmp_path / "no.onnx")


@pytest.mark.parametrize(
    "content",
    [b"Hello, this is a text.", b"\x89PNG\r\n\x1a\n" + bytes(100), b"PK\x03\x04" + bytes(50), b"GGUF\x03\0\0\0", bytes(64),
     b"\x7fELF" + bytes(80), b'{"a": 1}', b"\x08\x0a", b"\x0a\xff\xff\xff\xff\x0f" + b"x" * 20],
)  # fmt: skip
def test_a_file_that_is_not_onnx(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match="is not an ONNX file"):
        Session.open(path)


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").touch()
    with pytest.raises(ModelFileError, match="is empty"):
        Session.open(tmp_path / "model.onnx")


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file(plain_model: Path, tmp_path: Path, share: float) -> None:
    data = plain_model.read_bytes()
    path = tmp_path / "model.onnx"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ModelFileError, match="is cut short: .* bytes, expected at least"):
        Session.open(path)


def test_every_truncation_is_one_error(tmp_path: Path, plain_model: Path) -> None:
    """Cut anywhere in the head and the tail of the file, where the structure is."""
    data = plain_model.read_bytes()
    path = tmp_path / "model.onnx"
    for length in [*range(1, 60), *range(len(data) - 400, len(data))]:
        path.write_bytes(data[:length])
        with pytest.raises(ModelFileError) as caught:
            ModelFile.open(path)
        assert "\n" not in str(caught.value)


def test_onnx_that_is_not_ours(plain_model: Path, tmp_path: Path) -> None:
    model = onnx.load(plain_model)
    del model.metadata_props[:]
    path = tmp_path / "other.onnx"
    onnx.save(model, path)
    with pytest.raises(ModelFileError, match="not one of fbiedge's"):
        Session.open(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("fbiedge.format_version", "2", "format version 2, this fbiedge reads 1"),
        ("fbiedge.config", "{", "unusable fbiedge.config"),
        ("fbiedge.config", "[]", "unusable fbiedge.config"),
        ("fbiedge.config", '{"hidden_size": 5}', "unusable fbiedge.config"),
    ],
)
def test_metadata_that_can_not_be_used(plain_model: Path, tmp_path: Path, key: str, value: str, message: str) -> None:
    model = onnx.load(plain_model)
    for entry in model.metadata_props:
        if entry.key == key:
            entry.value = value
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    with pytest.raises(ModelFileError, match=message):
        Session.open(path)


def test_a_graph_that_onnx_runtime_refuses(plain_model: Path, tmp_path: Path) -> None:
    model = onnx.load(plain_model)
    model.graph.node[0].op_type = "NoSuchOperator"
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    with pytest.raises(ModelFileError, match="can't open .*NoSuchOperator") as caught:
        Session.open(path)
    assert "\n" not in str(caught.value)


def test_folders(tmp_path: Path, plain_model: Path) -> None:
    with pytest.raises(ModelFileError, match="is a checkpoint; export it first"):
        Session.open(plain_model.parent / "checkpoint")
    with pytest.raises(ModelFileError, match="without a model.onnx"):
        Session.open(tmp_path)
    assert Session.open(plain_model.parent).model.path == plain_model


def test_external_data_missing_or_cut_short(external_model: Path, tmp_path: Path) -> None:
    path = tmp_path / external_model.name
    shutil.copy(external_model, path)
    with pytest.raises(ModelFileError, match=r"model.onnx.data does not exist; model.onnx keeps its weights there"):
        Session.open(path)
    data = external_model.with_name("model.onnx.data").read_bytes()
    path.with_name("model.onnx.data").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelFileError, match=f"cut short: {len(data) // 2} bytes, expected at least {len(data)}"):
        Session.open(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        *(("location", place, f"lies in {place!r}, expected a file beside the model") for place in
          ("/etc/passwd", "../secret.data", "sub/model.onnx.data", "..", "", "a\\b", "a\0b")),
        *(("offset", text, f"has {text!r} as the offset of its data") for text in ("-4096", "many", "9" * 30, "")),
        ("length", "-1", "has '-1' as the length of its data"),
    ],
)  # fmt: skip
def test_external_data_at_no_usable_place(
    external_model: Path, tmp_path: Path, key: str, value: str, message: str
) -> None:
    """The runtime and the exporter follow one rule."""
    from fbiedge.exporters.onnx import open_onnx

    model = onnx.load(external_model, load_external_data=False)
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == "model.embed_tokens.weight")
    (entry,) = (entry for entry in tensor.external_data if entry.key == key)
    entry.value = value
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    shutil.copy(external_model.with_name("model.onnx.data"), tmp_path)
    for opened in (Session.open, open_onnx):
        with pytest.raises(ModelFileError, match=re.escape(f"model.embed_tokens.weight {message}")):
            opened(path)


# The op library: what is wrong with it is said once, and the model runs all the same.


@pytest.mark.parametrize("kind", ["missing", "text", "foreign"])
def test_an_op_library_that_can_not_be_loaded(
    kind: str, plain_model: Path, expected: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "libfbiedge_ops.so"
    if kind == "text":
        library.write_text("no library")
    elif kind == "foreign":
        import onnxruntime

        shutil.copy(
            next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime_providers_shared*")), library
        )
    monkeypatch.setenv("FBIEDGE_OPS_LIBRARY", str(library))
    session = Session.open(plain_model)
    assert session.isa is None
    assert session.fallback_reason and str(library) in session.fallback_reason and "\n" not in session.fallback_reason
    np.testing.assert_allclose(session.all_logits(IDS), expected, **ROUNDING)


def test_an_isa_forced_but_unknown_is_not_ignored(plain_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FBIEDGE_ISA", "pdp11")
    with pytest.raises(UsageError, match="FBIEDGE_ISA is 'pdp11', this machine can run .*scalar"):
        Session.open(plain_model)


def test_forcing_an_isa(plain_model: Path, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FBIEDGE_ISA", "scalar")
    session = Session.open(plain_model)
    assert session.isa == "scalar"
    np.testing.assert_allclose(session.all_logits(IDS), expected, **ROUNDING)


def test_the_int8_level_is_the_same_on_every_isa_and_thread_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_model(tmp_path, export={"accuracy_level": "int8", "head": "int8"})
    expected = None
    for isa in available_isas():
        monkeypatch.setenv("FBIEDGE_ISA", isa)
        for threads in (1, 2):
            session = Session.open(path, threads=threads)
            assert session.isa == isa
            logits = [*session.all_logits(IDS[:30]), *(session.forward([token]) for token in IDS[30:])]
            expected = logits if expected is None else expected
            np.testing.assert_array_equal(logits, expected)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_cache_takes_memory_only_where_it_is_written() -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    before = resident_bytes()
    cache = KVCache(replace(PRESETS["1.3b"], num_hidden_layers=1), "fp32", 8192)  # 134 MB
    for rows in cache.buffers.values():
        assert rows.flags.writeable and not rows[0, :, 0].any()
        rows[0, :, 0] = 1.0  # what the first token writes: one row a head
    assert resident_bytes() - before < 10_000_000


def test_a_prompts_logits_are_the_last_of_all_logits(plain_model: Path) -> None:
    """A prefill computes the head for one position only; it must be the right one, in the first chunk and behind it."""
    session = Session.open(plain_model)
    rows = session.all_logits(IDS)
    session.truncate(0)
    np.testing.assert_array_equal(session.forward(IDS), rows[-1])
    session.truncate(7)
    np.testing.assert_array_equal(session.forward(IDS[7:20]), rows[19])
