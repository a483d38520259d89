"""A GGUF model in stock llama.cpp, through the C functions of llama-cpp-python, with the face of session.Session.

Only the logits come from llama.cpp: tokens are split, picked and put together by the same code as with ONNX, so the same
options give the same text wherever the logits are the same. An adapter beside the model, `model.beta.gguf`, that our
exporter wrote with it holds what Q1_0 has no place for; it is loaded with the model, at scale 1.

llama.cpp ends the process where something is wrong that it didn't expect. So a file is checked before it is handed over
(gguf_file.py, gguf_model.py, llama_cpp_checks.py), no batch is empty or too long, and no id is outside the vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .cached_session import CHUNK, CachedSession, check_context, threads_to_use
from .config import ModelConfig
from .errors import ModelFileError, UsageError
from .gguf_file import GgufFile
from .gguf_model import find_adapter, missing_adapter, open_gguf_model
from .kv_cache import Precision, cache_bytes
from .llama_cpp_checks import check_adapter, check_for_llama_cpp
from .llama_cpp_library import Llama
from .machine import memory_bytes
from .model_file import ModelFile

# llama.cpp writes the whole KV cache at the start, so by default it is no longer than this allows.
_DEFAULT_CACHE_BYTES = 2 << 30


class LlamaCppSession(CachedSession):
    """A model in llama.cpp, for one conversation at a time."""

    def __init__(
        self,
        model: ModelFile,
        llama: Llama,
        *,
        capacity: int,
        threads: int,
        adapter: Path | None,
        description: str,
        warning: str | None,
    ) -> None:
        """Use `LlamaCppSession.open`."""
        super().__init__(model, capacity=capacity, threads=threads)
        self._llama = llama
        self._adapter = adapter
        # Rows that llama.cpp may hold: more than `position` after truncate, or where Ctrl-C came in a run.
        self._held = 0
        self._description, self._warning = description, warning

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
        model, adapter = open_gguf_model(file), find_adapter(file)
        check_context(context, model.config)
        capacity = _capacity(context, model.config)
        llama = Llama(path)
        if llama.vocab_size != model.config.vocab_size:
            raise ModelFileError(
                f"{path} has {model.config.vocab_size} rows of embedding and {llama.vocab_size} tokens; expected the same"
            )
        if adapter:
            check_adapter(GgufFile.open(adapter))
            llama.load_adapter(adapter)
        llama.open_context(capacity, CHUNK, threads)
        missing = missing_adapter(file, adapter)
        return cls(
            model, llama, capacity=capacity, threads=threads, adapter=adapter,
            description=f"llama.cpp ({llama.version}), {layer_types(file)} layers{f' with {adapter.name}' if adapter else ''}",
            warning=f"{path.name}: {missing}; without them the model answers worse" if missing else None,
        )  # fmt: skip

    @property
    def warning(self) -> str | None:
        """See CachedSession."""
        return self._warning

    @property
    def description(self) -> str:
        """See CachedSession."""
        return self._description

    @property
    def kv_cache(self) -> Precision:
        """See CachedSession."""
        return "fp16"

    def sibling(self) -> LlamaCppSession:
        """See CachedSession."""
        return LlamaCppSession(
            self.model, self._llama.sibling(), capacity=self.capacity, threads=self.threads, adapter=self._adapter,
            description=self._description, warning=self._warning,
        )  # fmt: skip

    @property
    def files(self) -> tuple[Path, ...]:
        """See CachedSession."""
        return (*super().files, *([self._adapter] if self._adapter else []))

    def rows(self) -> Iterator[npt.NDArray[Any]]:
        """See CachedSession."""
        self._settle()
        yield self._llama.state()

    def _restore(self, count: int, rows: memoryview) -> None:
        self._settle()  # of the cache, which is empty now
        self._llama.restore(rows)
        self._held = count

    def _settle(self) -> None:
        if self._held > self.position:
            self._llama.cut(self.position)
            self._held = self.position

    def _run(self, ids: Sequence[int], keep: int) -> npt.NDArray[np.float32]:
        self._settle()
        self._held = self.position + len(ids)
        rows = self._llama.decode(ids, every=keep > 1)
        self._tokens.extend(ids)  # last, and in one step: Ctrl-C may come anywhere before it
        return rows


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
