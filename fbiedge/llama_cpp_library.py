"""llama.cpp by its C functions, as llama-cpp-python declares them: a model, an adapter, a context, logits.

It runs on the CPU, with the defaults of stock llama.cpp (keys and values in fp16). Its log is kept from the terminal and
asked for the reason where something fails.
"""

from __future__ import annotations

import copy
import ctypes
import os
import re
import weakref
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import ModelFileError, UsageError

# Before this, llama.cpp has no Q1_0 (or not with these blocks), and functions have other names.
_OLDEST = (0, 3, 36)
_LOG_ERROR, _LOG_CONTINUES = 4, 5
_FUNCTIONS = re.compile(r"^(?:[\w:]+: |error loading model: |failed to apply lora adapter: )+")


class Llama:
    """A model in llama.cpp with one context, in which one sequence grows and is cut."""

    def __init__(self, path: Path) -> None:
        """Raises ModelFileError with llama.cpp's reason, UsageError where llama-cpp-python is missing or of no use."""
        self._api = api = load_library()
        self._path = path
        self._context: Any = None
        self._adapter: Any = None
        self._elder: Llama | None = None
        _log.clear()
        parameters = api.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self._model = api.llama_model_load_from_file(os.fsencode(path), parameters)
        if not self._model:
            raise ModelFileError(f"llama.cpp can't open {path}: {_log.reason()}")
        weakref.finalize(self, api.llama_model_free, self._model)  # and its adapters
        _log.raise_interrupt()
        self.vocab_size: int = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self.version = f"llama-cpp-python {api.__version__}"

    def load_adapter(self, path: Path) -> None:
        """A LoRA at scale 1; before the context, which plans for it. Raises ModelFileError."""
        _log.clear()
        self._adapter = self._api.llama_adapter_lora_init(self._model, os.fsencode(path))
        if not self._adapter:
            raise ModelFileError(f"llama.cpp can't open the adapter {path}: {_log.reason()}")

    def open_context(self, capacity: int, batch: int, threads: int) -> None:
        """For `capacity` tokens, of which at most `batch` come at a time. Raises UsageError where memory is short."""
        api = self._api
        self._shape = capacity, batch, threads
        parameters = api.llama_context_default_params()
        parameters.n_ctx = capacity
        parameters.n_batch = parameters.n_ubatch = batch
        parameters.n_threads = parameters.n_threads_batch = threads
        _log.clear()
        self._context = api.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise UsageError(
                f"llama.cpp can't hold a context of {capacity} tokens: {_log.reason()}; choose a smaller one with --context"
            )
        weakref.finalize(self, api.llama_free, self._context)  # the last finalizer runs first, so before the model's
        _log.raise_interrupt()
        self._memory = api.llama_get_memory(self._context)
        self._ids = (ctypes.c_int32 * batch)()
        self._every = (ctypes.c_int8 * batch)(*[1] * batch)
        if self._adapter:
            adapters = (api.llama_adapter_lora_p_ctypes * 1)(self._adapter)
            api.llama_set_adapters_lora(self._context, adapters, 1, (ctypes.c_float * 1)(1.0))

    def sibling(self) -> Llama:
        """The same model and adapter with a context of its own. Raises UsageError where memory is short."""
        other = copy.copy(self)
        other._elder = self  # whose end frees the model
        other.open_context(*self._shape)
        return other

    def decode(self, ids: Sequence[int], *, every: bool) -> npt.NDArray[np.float32]:
        """Append 1 to `batch` ids -> logits of every one of them or of the last [rows, vocab], until the next decode.

        Raises ModelFileError.
        """
        api, length = self._api, len(ids)
        self._ids[:length] = list(ids)
        batch = api.llama_batch_get_one(self._ids, length)  # without flags: the last one's logits alone
        if every:
            batch.logits = self._every
        _log.clear()
        code = api.llama_decode(self._context, batch)
        _log.raise_interrupt()
        if code != 0:
            raise ModelFileError(f"llama.cpp can't run {self._path}: {_log.reason()} (code {code})")
        logits: npt.NDArray[np.float32] = np.ctypeslib.as_array(
            api.llama_get_logits(self._context), (length if every else 1, self.vocab_size)
        )
        return logits

    def cut(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self._api.llama_memory_seq_rm(self._memory, 0, length, -1)

    def state(self) -> npt.NDArray[np.uint8]:
        """Keys and values of the sequence, in llama.cpp's own form."""
        api = self._api
        state = np.empty(api.llama_state_seq_get_size(self._context, 0), np.uint8)
        written = api.llama_state_seq_get_data(self._context, _bytes(state), state.nbytes, 0)
        return state[:written]

    def restore(self, state: memoryview) -> None:
        """What `state` gave, to a context without tokens. Raises UsageError where llama.cpp refuses it."""
        _log.clear()
        taken = np.frombuffer(state, np.uint8)
        if self._api.llama_state_seq_set_data(self._context, _bytes(taken), taken.nbytes, 0) != taken.nbytes:
            self.cut(0)
            raise UsageError(f"llama.cpp refuses its keys and values: {_log.reason()}")


def _bytes(array: npt.NDArray[np.uint8]) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


class _Log:
    """llama.cpp's last lines. There is one log for the process."""

    def __init__(self) -> None:
        self._lines: deque[tuple[int, str]] = deque(maxlen=100)
        self._callback: Any = None  # alive as long as llama.cpp may call it
        self._interrupted = False

    def listen(self, api: Any) -> None:
        """Take the log over."""
        if self._callback is None:
            self._callback = api.llama_log_callback(self._write)
        api.llama_log_set(self._callback, ctypes.c_void_p(0))

    def clear(self) -> None:
        """Before a call whose reason may be asked for."""
        self._lines.clear()
        self._interrupted = False

    def raise_interrupt(self) -> None:
        """After a call: Ctrl-C that came in it. Python notices while it writes the log, where an exception is lost."""
        if self._interrupted:
            raise KeyboardInterrupt

    def reason(self) -> str:
        """The first error since clear(), which is the most exact one; without the names of functions before it."""
        errors = [" ".join(line.split()) for level, line in self._lines if level == _LOG_ERROR and line.strip()]
        return _FUNCTIONS.sub("", errors[0]) if errors else "it doesn't say why"

    def _write(self, level: int, text: bytes, _user_data: Any) -> None:
        try:
            line = text.decode("utf-8", "replace").rstrip("\n")
            if level == _LOG_CONTINUES and self._lines:
                before, start = self._lines.pop()
                self._lines.append((before, start + line))
            else:
                self._lines.append((level, line))
        except KeyboardInterrupt:
            self._interrupted = True


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
