"""Stock llama.cpp, called through its C interface and nothing of ours: what a user's llama.cpp does with a file."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import numpy as np

_LOG: list[str] = []


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _keep_log(_level: int, text: bytes, _data: object) -> None:
    """Of the module, because llama.cpp may call it until the process ends."""
    _LOG.append(text.decode(errors="replace"))


class StockLlamaCpp:
    """A GGUF model, with adapters as `llama.cpp --lora` takes them."""

    def __init__(self, model: Path, *adapters: Path, threads: int = 2) -> None:
        import llama_cpp

        self.api = llama_cpp
        _LOG.clear()
        llama_cpp.llama_log_set(_keep_log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(model).encode(), llama_cpp.llama_model_default_params())
        assert self.model, f"llama.cpp refuses {model}: {_LOG[-5:]}"
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = llama_cpp.llama_model_n_ctx_train(self.model)
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.type_k = parameters.type_v = 0  # F32: what is compared is the file
        parameters.flash_attn_type = 0
        self.context = llama_cpp.llama_init_from_model(self.model, parameters)
        assert self.context, f"llama.cpp can't make a context: {_LOG[-5:]}"
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(self.vocab)
        loaded = [llama_cpp.llama_adapter_lora_init(self.model, str(path).encode()) for path in adapters]
        assert all(loaded), f"llama.cpp refuses an adapter: {_LOG[-5:]}"
        if loaded:
            handles = (type(loaded[0]) * len(loaded))(*loaded)
            scales = (ctypes.c_float * len(loaded))(*[1.0] * len(loaded))
            assert llama_cpp.llama_set_adapters_lora(self.context, handles, len(loaded), scales) == 0

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits [T, vocab] of every position, from an empty cache."""
        api = self.api
        api.llama_memory_clear(api.llama_get_memory(self.context), True)
        batch = api.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for position, token in enumerate(ids):
            batch.token[position], batch.pos[position] = token, position
            batch.n_seq_id[position], batch.seq_id[position][0] = 1, 0
            batch.logits[position] = 1
        assert api.llama_decode(self.context, batch) == 0
        rows = api.llama_get_logits(self.context)
        logits = np.ctypeslib.as_array(rows, (len(ids), self.vocab_size)).copy()
        api.llama_batch_free(batch)
        return logits

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Ids of `text`."""
        data = text.encode()
        ids = (ctypes.c_int32 * (len(data) + 8))()
        count = self.api.llama_tokenize(self.vocab, data, len(data), ids, len(ids), add_special, parse_special)
        assert count >= 0
        return list(ids[:count])

    def is_end(self, token: int) -> bool:
        """Whether generation stops at this token."""
        return bool(self.api.llama_vocab_is_eog(self.vocab, token))

    def close(self) -> None:
        """Free it."""
        self.api.llama_free(self.context)
        self.api.llama_model_free(self.model)
