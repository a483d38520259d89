"""A GGUF model in stock llama.cpp, through the C functions of llama-cpp-python, with the face of session.Session.

Only the logits come from llama.cpp: tokens are split, picked and put together by the same code as with ONNX, so the same
options give the same text wherever the logits are the same. An adapter beside the model, `model.beta.gguf`, that our
exporter wrote with it holds what Q1_0 has no place for; it is loaded with the model, at scale 1.

llama.cpp ends the process where something is wrong that it didn't expect. So the file has been checked before it is
handed over (gguf_file.py, gguf_model.py, llama_cpp_checks.py), no batch is empty or longer than agreed, and no id is outside the vocabulary.
"""

from __future__ import annotations

import ctypes
import os
import re
import weakref
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .cached_session import CHUNK, CachedSession, check_context, threads_to_use
from .config import ModelConfig
from .errors import ModelFileError, UsageError
from .gguf_file import GgufFile
from .gguf_model import adapter_path, find_adapter, open_gguf_model
from .kv_cache import Precision, cache_bytes
from .llama_cpp_checks import check_for_llama_cpp
from .machine import memory_bytes
from .model_file import ModelFile

# Before this, llama.cpp has no Q1_0 (or not with these blocks), and functions have other names.
_OLDEST = (0, 3, 36)
# llama.cpp writes the whole KV cache at the start, so by default it is no longer than this allows.
_DEFAULT_CACHE_BYTES = 2 << 30
_FUNCTIONS = re.compile(r"^(?:[\w:]+: |error loading model: |failed to apply lora adapter: )+")
_LOG_ERROR, _LOG_CONTINUES = 4, 5


class LlamaCppSession(CachedSession):
    """A model in llama.cpp, for one conversation at a time."""

    def __init__(
        self,
        model: ModelFile,
        api: Any,
        handle: Any,
        context: Any,
        *,
        capacity: int,
        threads: int,
        what: str,
        warning: str | None,
    ) -> None:
        """Use `LlamaCppSession.open`."""
        super().__init__(model, capacity=capacity, threads=threads)
        self._api, self._context, self._what = api, context, what
        self._warning = warning
        self._memory = api.llama_get_memory(context)
        self._held = (
            0  # rows that llama.cpp may hold: more than `position` after truncate, or where Ctrl-C came between
        )
        self._ids = (ctypes.c_int32 * CHUNK)()
        self._every = (ctypes.c_int8 * CHUNK)(*[1] * CHUNK)
        weakref.finalize(self, _free, api, handle, context)

    @classmethod
    def open(cls, path: Path, *, threads: int | None = None, context: int | None = None) -> LlamaCppSession:
        """Open the model at `path`, and the adapter beside it.

        threads: as many as cores when None, and at most so many.
        context: tokens the cache can hold; by default the model's most, or what 2 GiB hold.
        Raises ModelFileError, UsageError (also where llama-cpp-python is missing, or a context that memory can't hold).
        """
        threads = threads_to_use(threads)
        file = GgufFile.open(path)
        check_for_llama_cpp(file)
        model = open_gguf_model(path)
        adapter = find_adapter(file)
        check_context(context, model.config)
        capacity = _capacity(context, model.config)
        api = load_library()
        _log.clear()
        handle = None
        try:
            parameters = api.llama_model_default_params()
            parameters.n_gpu_layers = 0
            handle = api.llama_model_load_from_file(os.fsencode(path), parameters)
            if not handle:
                raise ModelFileError(f"llama.cpp can't open {path}: {_log.reason()}")
            vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(handle))
            if vocabulary != model.config.vocab_size:
                raise ModelFileError(
                    f"{path} has {model.config.vocab_size} rows of embedding and {vocabulary} tokens; expected the same"
                )
            lora = None
            if adapter:  # before the context, which plans for it
                lora = api.llama_adapter_lora_init(handle, os.fsencode(adapter))
                if not lora:
                    raise ModelFileError(f"llama.cpp can't open the adapter {adapter}: {_log.reason()}")
            opened = _open_context(api, handle, capacity, threads)
            if not opened:
                raise UsageError(
                    f"llama.cpp can't hold a context of {capacity} tokens: {_log.reason()}; "
                    "choose a smaller one with --context"
                )
        except BaseException:
            if handle:
                api.llama_model_free(handle)
            raise
        if lora:
            api.llama_set_adapters_lora(
                opened, (api.llama_adapter_lora_p_ctypes * 1)(lora), 1, (ctypes.c_float * 1)(1.0)
            )
        what = f"llama.cpp (llama-cpp-python {api.__version__}), {layer_types(file)} layers"
        if adapter:
            what += f" with {adapter.name}"
        return cls(
            model,
            api,
            handle,
            opened,
            capacity=capacity,
            threads=threads,
            what=what,
            warning=_missing_adapter(file, adapter),
        )

    @property
    def warning(self) -> str | None:
        """See CachedSession."""
        return self._warning

    @property
    def description(self) -> str:
        """See CachedSession."""
        return self._what

    @property
    def kv_cache(self) -> Precision:
        """See CachedSession."""
        return "fp16"

    def _run(self, ids: Sequence[int], keep: int) -> npt.NDArray[np.float32]:
        api, length = self._api, len(ids)
        if self._held > self.position:
            api.llama_memory_seq_rm(self._memory, 0, self.position, -1)
        self._held = self.position + length
        self._ids[:length] = list(ids)
        batch = api.llama_batch_get_one(self._ids, length)  # without flags: the last token's logits alone
        if keep > 1:
            batch.logits = self._every
        _log.clear()
        code = api.llama_decode(self._context, batch)
        if code != 0:
            raise ModelFileError(f"llama.cpp can't run {self.model.path}: {_log.reason()} (code {code})")
        rows = np.ctypeslib.as_array(api.llama_get_logits(self._context), (keep, self.config.vocab_size))
        self._tokens.extend(ids)  # last, and in one step: Ctrl-C may come anywhere before it
        return rows


def _missing_adapter(file: GgufFile, adapter: Path | None) -> str | None:
    """A warning where our exporter wrote an adapter beside the model, and it isn't there."""
    if adapter or file.metadata.get("fbiedge.scaling_pattern") not in ("column", "row", "single"):
        return None
    return (
        f"{file.path.name} was exported with {adapter_path(file.path).name}, which isn't beside it; without these offsets "
        "the model answers worse"
    )


def layer_types(file: GgufFile) -> str:
    """The type that most weights of the layers are stored in."""
    sizes: Counter[str] = Counter()
    for tensor in file.tensors.values():
        if tensor.name.startswith("blk."):
            sizes[tensor.ggml_type] += tensor.nbytes
    return sizes.most_common(1)[0][0]


def _capacity(context: int | None, config: ModelConfig) -> int:
    """Tokens of the cache. Raises UsageError where memory can't hold them."""
    row = cache_bytes(config, "fp16", 1)
    capacity = context or min(config.max_position_embeddings, max(1, _DEFAULT_CACHE_BYTES // row))
    memory = memory_bytes()
    if memory is not None and capacity * row > memory:
        raise UsageError(
            f"a context of {capacity} tokens takes {capacity * row / 1e9:.1f} GB, more than there is memory; "
            "choose a smaller one with --context"
        )
    return capacity


def _open_context(api: Any, handle: Any, capacity: int, threads: int) -> Any:
    parameters = api.llama_context_default_params()
    parameters.n_ctx = capacity
    parameters.n_batch = parameters.n_ubatch = CHUNK
    parameters.n_threads = parameters.n_threads_batch = threads
    return api.llama_init_from_model(handle, parameters)


def _free(api: Any, handle: Any, context: Any) -> None:
    api.llama_free(context)
    api.llama_model_free(handle)  # and its adapters


class _Log:
    """llama.cpp's last lines, kept from the terminal. There is one log for the process."""

    def __init__(self) -> None:
        self._lines: deque[tuple[int, str]] = deque(maxlen=100)
        self._callback: Any = None  # alive as long as llama.cpp may call it

    def listen(self, api: Any) -> None:
        """Take the log over."""
        if self._callback is None:
            self._callback = api.llama_log_callback(self._write)
        api.llama_log_set(self._callback, ctypes.c_void_p(0))

    def clear(self) -> None:
        self._lines.clear()

    def reason(self) -> str:
        """The first error since clear(), which is the most exact one; without the names of functions before it."""
        errors = [" ".join(line.split()) for level, line in self._lines if level == _LOG_ERROR and line.strip()]
        return _FUNCTIONS.sub("", errors[0]) if errors else "it doesn't say why"

    def _write(self, level: int, text: bytes, _user_data: Any) -> None:
        line = text.decode("utf-8", "replace").rstrip("\n")
        if level == _LOG_CONTINUES and self._lines:
            before, start = self._lines.pop()
            self._lines.append((before, start + line))
        else:
            self._lines.append((level, line))


_log = _Log()


def load_library() -> Any:
    """llama_cpp, silenced. Raises UsageError where it is missing or of no use."""
    install = "pip install 'fbiedge[gguf]'"
    try:
        import llama_cpp
    except ImportError as error:
        raise UsageError(f"a GGUF model runs in llama.cpp, which isn't installed ({error}): {install}") from error
    except (OSError, RuntimeError) as error:  # its library is missing, or built for another machine
        raise UsageError(f"llama-cpp-python can't be loaded ({error}); install it again: {install}") from error
    version = llama_cpp.__version__
    if tuple(int(part) for part in version.split(".")[:3] if part.isdigit()) < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        raise UsageError(f"llama-cpp-python is {version}, expected {oldest} or later: {install}")
    _log.listen(llama_cpp)
    llama_cpp.llama_backend_init()
    return llama_cpp
