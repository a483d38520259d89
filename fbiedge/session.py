"""A model in ONNX Runtime, with a KV cache that stays in place.

    session = Session.open(Path("model.onnx"))
    logits = session.forward([1, 15043])        # [vocab], for the token after the last
    session.truncate(1)                         # forget all but the first token

The cache (kv_cache.py) is bound as past and as present: GroupQueryAttention then writes the new rows where they belong and
copies nothing. A position is valid up to `session.position`, so going back is free. Inputs and outputs are bound once;
between two decoded tokens only the length of the attention mask changes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort  # type: ignore[import-untyped]

from .cached_session import CHUNK, CachedSession, check_context, threads_to_use
from .errors import ModelFileError, OpLibraryError, UsageError
from .kv_cache import KVCache, Precision, precision_of
from .model_file import ModelFile

ACCURACY_LEVELS = ("int8", "fp32")
# Before 1.20, GroupQueryAttention computes a run of several tokens after a filled cache wrongly, and says nothing;
# before 1.22, MatMulNBits can't run the int8 head (found by running 1.18.1, 1.20.1, 1.21.1, 1.22.1, 1.23.2 and 1.31.1).
_OLDEST_ONNX_RUNTIME = (1, 22)
_ALL_OURS = {"kv_cache": "int8", "head_operator": "fbiedge"}  # metadata of a file without stock operators that matter
_MASK_STEP = 256
_SEVERITY_FATAL = 4  # ONNX Runtime also prints what it raises; the exception is enough


class Session(CachedSession):
    """A model in ONNX Runtime, for one conversation at a time."""

    def __init__(
        self,
        model: ModelFile,
        onnx_session: Any,
        *,
        capacity: int,
        threads: int,
        accuracy_level: str,
        isa: str | None,
        fallback_reason: str | None,
    ) -> None:
        """Use `Session.open`."""
        super().__init__(model, capacity=capacity, threads=threads)
        self.accuracy_level = accuracy_level
        self.isa = isa  # the kernels in use; None on the stock-ops fallback
        self.fallback_reason = fallback_reason
        self._onnx = onnx_session
        self._bind()

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        threads: int | None = None,
        accuracy_level: str | None = None,
        context: int | None = None,
    ) -> Session:
        """Open the model at `path`.

        threads: as many as cores (default_threads()) when None, and at most so many: more only wait for one another.
        accuracy_level: `int8` or `fp32` activations instead of what the file asks for; a head of stock operators keeps
        what it was exported with (see head_activations).
        context: tokens the cache can hold, at most and by default the model's max_position_embeddings.
        Where the op library can't be loaded, the session runs on stock ops and `fallback_reason` says why.
        Raises ModelFileError, UsageError (also for a context that memory can't hold).
        """
        if accuracy_level is not None and accuracy_level not in ACCURACY_LEVELS:
            raise UsageError(f"accuracy level is {accuracy_level!r}, expected one of {', '.join(ACCURACY_LEVELS)}")
        threads = threads_to_use(threads)
        if tuple(int(part) for part in ort.__version__.split(".")[:2]) < _OLDEST_ONNX_RUNTIME:
            oldest = ".".join(map(str, _OLDEST_ONNX_RUNTIME))
            raise UsageError(
                f"ONNX Runtime is {ort.__version__}, expected {oldest} or later: pip install -U onnxruntime"
            )
        model = ModelFile.open(path)
        check_context(context, model.config)
        is_stock = model.metadata.get("operators") == "stock"
        if is_stock and accuracy_level not in (None, model.accuracy_level):
            bits = " and --stock-bits 2 or 4" if accuracy_level == "int8" else ""  # 1 bit is fp32 alone
            raise UsageError(
                f"{model.path} is of stock operators, whose level is in the file: {model.accuracy_level}; "
                f"export it with --accuracy-level {accuracy_level}{bits}"
            )

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = _SEVERITY_FATAL
        if accuracy_level is not None:
            options.add_session_config_entry("fbiedge.accuracy_level", accuracy_level)
        # Where all that takes time is ours, our threads do it: they are quicker to hand work to than ONNX Runtime's,
        # and with both, the idle ones of one would take the cores from the other.
        own_threads = all(model.metadata.get(key) == value for key, value in _ALL_OURS.items())
        if own_threads:
            options.add_session_config_entry("fbiedge.threads", str(threads))
        isa, fallback_reason = None, None
        if not is_stock:
            try:
                isa = _register_op_library(options)
                if own_threads:
                    options.intra_op_num_threads = 1
            except OpLibraryError as error:
                fallback_reason = str(error)
        try:
            onnx_session = ort.InferenceSession(str(model.path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise ModelFileError(
                f"ONNX Runtime {ort.__version__} can't open {model.path}: {_first_line(error)}"
            ) from error
        return cls(
            model,
            onnx_session,
            capacity=context or model.config.max_position_embeddings,
            threads=threads,
            # The fallback is made of stock ops, whose level is in the file.
            accuracy_level=(accuracy_level if isa else None) or model.accuracy_level,
            isa=isa,
            fallback_reason=fallback_reason,
        )

    @property
    def head_activations(self) -> str | None:
        """What the lm_head computes with, `int8` or `fp32`; in stock operators it is what the file says."""
        if self.model.metadata.get("head") == "fp32":
            return "fp32"
        ours = self.model.metadata.get("head_operator") == "fbiedge"
        return self.accuracy_level if ours else self.model.accuracy_level

    @property
    def description(self) -> str:
        """See CachedSession."""
        without = "stock ops fallback" if self.fallback_reason else "stock ops"
        kernels = f"{self.isa} kernels" if self.isa else without
        head = self.head_activations
        apart = "" if head == self.accuracy_level else f" ({head} in the head)"
        return f"{kernels}, {self.accuracy_level} activations{apart}"

    @property
    def warning(self) -> str | None:
        """See CachedSession."""
        return f"{self.fallback_reason}; running on stock ops, which are slower" if self.fallback_reason else None

    @property
    def kv_cache(self) -> Precision:
        """See CachedSession."""
        return self._kv_cache.precision

    def sibling(self) -> Session:
        """See CachedSession."""
        return Session(
            self.model, self._onnx, capacity=self.capacity, threads=self.threads, isa=self.isa,
            accuracy_level=self.accuracy_level or self.model.accuracy_level, fallback_reason=self.fallback_reason,
        )  # fmt: skip

    def rows(self) -> Iterator[npt.NDArray[Any]]:
        """See CachedSession."""
        return self._kv_cache.rows(self.position)

    def _restore(self, count: int, rows: memoryview) -> None:
        self._kv_cache.restore(count, rows)
        self._attention_mask[0, :count] = 1

    def _bind(self) -> None:
        config = self.config
        self._input_ids = np.zeros((1, CHUNK), np.int64)
        self._attention_mask = np.zeros((1, self.capacity), np.int64)
        self._mask_length = 0  # that is bound
        self._logits = np.zeros((1, 1, config.vocab_size), np.float32)
        self._binding = self._onnx.io_binding()
        names = {entry.name for entry in self._onnx.get_inputs()} | {entry.name for entry in self._onnx.get_outputs()}
        self._kv_cache = KVCache(config, precision_of(names), self.capacity)
        # Our attention takes a mask that is longer than the tokens, so that it needn't be bound again for each.
        self._mask_step = _MASK_STEP if self.isa and self._kv_cache.precision == "int8" else 1
        cached = [f"{side}.{name}" for name in self._kv_cache.buffers for side in ("past_key_values", "present")]
        for name in ("input_ids", "attention_mask", "logits", *cached):
            if name not in names:
                raise ModelFileError(f"{self.model.path} has no {name}; export it again")
        self._kv_cache.bind(self._binding)
        if "logits_to_keep" not in {entry.name for entry in self._onnx.get_overridable_initializers()}:
            raise ModelFileError(f"{self.model.path} has no logits_to_keep; export it again")
        self._keep = np.zeros(1, np.int64)
        self._binding.bind_input("logits_to_keep", "cpu", 0, np.int64, (1,), self._keep.ctypes.data)
        self._bound = (0, 0)  # tokens of a run, and rows of logits, that input_ids and logits are bound for

    def _run(self, ids: Sequence[int], keep: int) -> npt.NDArray[np.float32]:
        """One step of at most CHUNK tokens -> the last `keep` rows of logits [keep, vocab], valid until the next run."""
        length, binding = len(ids), self._binding
        total = self.position + length
        # Ctrl-C may come between any two steps: what is noted as bound was bound, and memory that is bound stays alive.
        if (length, keep) != self._bound:
            self._bound = (0, 0)
            shape = (1, keep, self.config.vocab_size)
            logits = self._logits if keep <= self._logits.shape[1] else np.zeros(shape, np.float32)
            binding.bind_input("input_ids", "cpu", 0, np.int64, (1, length), self._input_ids.ctypes.data)
            binding.bind_output("logits", "cpu", 0, np.float32, shape, logits.ctypes.data)
            self._logits = logits
            self._keep[0] = keep
            self._bound = (length, keep)
        self._input_ids[0, :length] = ids
        seen = min(-(-total // self._mask_step) * self._mask_step, self.capacity)
        self._attention_mask[0, self.position : total] = 1
        self._attention_mask[0, total:seen] = 0
        if seen != self._mask_length:
            self._mask_length = 0
            binding.bind_input("attention_mask", "cpu", 0, np.int64, (1, seen), self._attention_mask.ctypes.data)
            self._mask_length = seen
        try:
            self._onnx.run_with_iobinding(binding)
        except Exception as error:  # as in open()
            raise ModelFileError(
                f"ONNX Runtime {ort.__version__} can't run {self.model.path}: {_first_line(error)}"
            ) from error
        # Last, and in one step: if Ctrl-C comes before it, the rows written to the cache are as if they weren't there.
        self._tokens.extend(ids)
        return self._logits.reshape(-1, self.config.vocab_size)[:keep]


def _register_op_library(options: Any) -> str:
    """Register the op library -> the name of the kernels that it will run. Raises OpLibraryError, UsageError."""
    from . import ops_library

    path = ops_library.library_path()
    available = ops_library.available_isas()
    forced = os.environ.get("FBIEDGE_ISA")
    if forced and forced not in available:
        # Asked for by name, so falling back in silence would be wrong.
        raise UsageError(f"FBIEDGE_ISA is {forced!r}, this machine can run {', '.join(available)}")
    try:
        options.register_custom_ops_library(str(path))
    except Exception as error:  # as in open()
        raise OpLibraryError(
            f"ONNX Runtime {ort.__version__} refuses the op library {path}: {_first_line(error)}"
        ) from error
    return ops_library.active_isa()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
