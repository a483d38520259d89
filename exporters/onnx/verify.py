"""`verify_export`: what an export lost, measured on a text: the ONNX file against the numpy reference.

The file runs in ONNX Runtime with our op library where that can be loaded, else on its stock-operator fallback, and one
of stock operators runs on those; the report says which. All tokens go through one prefill from an empty cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fbiedge.config import ModelConfig
from fbiedge.errors import ModelFileError, OpLibraryError, OutputError, UsageError
from fbiedge.metrics import compare_logits
from fbiedge.model_file import ModelFile
from fbiedge.ops_library import library_path
from fbiedge.reference import RESIDENT_LIMIT_BYTES, Reference
from fbiedge.sample_text import SAMPLE_TEXT
from fbiedge.weights import Weights

DEFAULT_TOKENS = 128

# The text of a large model is cut: a multiply-add by token and weight is what a check costs.
_MULTIPLY_ADDS = 100 * 1000**3  # a few seconds of numpy on two cores
_FEWEST_TOKENS = 16

# No accuracy level costs a tenth of this; a file that loses more computes another model.
_WRONG_ABOVE_NATS = 1.0


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """Loss over `tokens` positions; `note` says in one line what ran and, where the text was cut, why."""

    max_logit_error: float
    kl_divergence: float  # KL(reference || ONNX), mean over positions, in nats
    top1_agreement: float  # 0 to 1
    tokens: int
    op_library: bool  # False: the fallback in stock operators ran
    note: str


def verify_export(weights: Weights, onnx_path: Path, text_ids: Sequence[int]) -> VerifyReport:
    """Compare the logits of `onnx_path` with those of `weights` on `text_ids`, cut to what is affordable.

    Raises ModelFileError where ONNX Runtime refuses the file, UsageError for no ids or ids outside the vocabulary.
    """
    config = weights.config
    parameters = matrix_parameters(config)
    affordable = min(config.max_position_embeddings, max(_FEWEST_TOKENS, _MULTIPLY_ADDS // parameters))
    ids = list(text_ids)[:affordable]
    if not ids:
        raise UsageError("verification needs at least one token; give a text that isn't empty")
    resident = 4 * parameters <= RESIDENT_LIMIT_BYTES
    expected = Reference(weights, resident=resident).logits(ids)
    is_stock = ModelFile.open(Path(onnx_path)).metadata.get("operators") == "stock"
    got, fallback_reason = _onnx_logits(Path(onnx_path), ids, with_library=not is_stock)
    loss = compare_logits(expected, got)
    engine = "stock operators" if is_stock else "the op library"
    if fallback_reason is not None:
        engine = f"the stock-operator fallback ({fallback_reason})"
    cut = f", cut from {len(text_ids)} tokens" if len(ids) < len(text_ids) else ""
    return VerifyReport(
        max_logit_error=loss.max_abs_error,
        kl_divergence=loss.kl_divergence,
        top1_agreement=loss.top1_agreement,
        tokens=len(ids),
        op_library=not is_stock and fallback_reason is None,
        note=f"{len(ids)} tokens{cut}, through {engine}",
    )


def check_export(weights: Weights, onnx_path: Path, text_ids: Sequence[int]) -> VerifyReport:
    """As `verify_export`, and raises OutputError where the file is no approximation of `weights` but wrong."""
    report = verify_export(weights, onnx_path, text_ids)
    if not (report.kl_divergence <= _WRONG_ABOVE_NATS and isfinite(report.max_logit_error)):
        raise OutputError(
            f"the export came out wrong and was dropped: against the numpy reference its max logit error is "
            f"{report.max_logit_error:.3g} and its KL divergence {report.kl_divergence:.3g} nats, expected below "
            f"{_WRONG_ABOVE_NATS:g}; try --accuracy-level fp32 --head fp32"
        )
    return report


def default_text_ids(weights: Weights, text: str | None = None) -> list[int]:
    """`text` in the model's own tokens; by default the beginning of a built-in one.

    Where the model has no tokenizer: random ids, the same each time. Raises UsageError where tokenizer.json is unusable.
    """
    vocab = weights.config.vocab_size
    source = weights.files.get("tokenizer.json")
    if source is None:
        return [int(token) for token in np.random.default_rng(0).integers(0, vocab, DEFAULT_TOKENS)]
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(source)
        ids = tokenizer.encode(SAMPLE_TEXT).ids[:DEFAULT_TOKENS] if text is None else tokenizer.encode(text).ids
    except Exception as error:  # tokenizers raises bare Exception
        raise UsageError(f"tokenizer.json can't be used: {error}") from error
    if not ids or max(ids) >= vocab:
        raise UsageError(f"tokenizer.json gives ids up to {max(ids, default=0)}, but the vocabulary is {vocab}")
    return list(ids)


def matrix_parameters(config: ModelConfig) -> int:
    """Weights that a token is multiplied with, and the embedding's."""
    layer = sum(prod(shape) for shape in config.linear_shapes().values())
    return config.num_hidden_layers * layer + 2 * config.vocab_size * config.hidden_size


def _onnx_logits(path: Path, ids: Sequence[int], *, with_library: bool) -> tuple[npt.NDArray[np.float32], str | None]:
    """Logits [T, vocab] of one prefill, and why the op library that was wanted did not run."""
    import onnxruntime  # type: ignore[import-untyped]

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    fallback_reason = None
    try:
        if with_library:
            _register_library(options)
    except OpLibraryError as error:
        fallback_reason = str(error)
    feeds: dict[str, npt.NDArray[Any]] = {
        "input_ids": np.array([ids], np.int64),
        "attention_mask": np.ones((1, len(ids)), np.int64),
    }
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        feeds |= {
            entry.name: _empty(entry) for entry in session.get_inputs() if entry.name.startswith("past_key_values")
        }
        (logits,) = session.run(["logits"], feeds)
    except Exception as error:  # ONNX Runtime's exceptions share no other base
        raise ModelFileError(f"ONNX Runtime refuses {path}: {_first_line(error)}") from error
    return logits[0], fallback_reason


def _empty(entry: Any) -> npt.NDArray[Any]:
    """A cache of no rows for one input of the model."""
    shape = [1, *(dim if isinstance(dim, int) else 0 for dim in entry.shape[1:])]
    return np.zeros(shape, np.int8 if entry.type == "tensor(int8)" else np.float32)


def _register_library(options: Any) -> None:
    """Register the op library with session options. Raises OpLibraryError."""
    path = library_path()
    try:
        options.register_custom_ops_library(str(path))
    except Exception as error:  # as above
        raise OpLibraryError(f"ONNX Runtime refuses {path}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
