"""`export_gguf`: weights -> model.gguf and, where there is a beta, model.beta.gguf. Fits the parts together.

fold.py, folded.py, fit.py   what the file holds in place of scales per input, exactly or as well as it can
vocabulary.py, metadata.py   what travels beside the weights
plan.py, q1_0.py, writer.py  the tensors, one at a time
adapter.py                   beta
cost.py                      what was lost
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fbiedge.config import ModelConfig
from fbiedge.errors import ModelFileError, OutputError, UsageError
from fbiedge.files import atomic_files, real_target, require_utf8
from fbiedge.gguf_file import GgufFile
from fbiedge.gguf_model import adapter_path
from fbiedge.weights import Weights

from ..onnx.sidecars import check_sidecars
from ..onnx.sources import inventory
from .adapter import Adapter
from .cost import Costs, Expected, is_resident
from .fit import TOKENS_AN_INPUT, Fit, fit_linear, record_inputs, rms
from .fold import INPUT_OF, LayerFold, column_fold
from .folded import FoldedModel
from .metadata import add_metadata, check_rope
from .plan import Losses, check_shapes, matrix_parameters, plan_tensors
from .provenance import Provenance
from .storage import GgufOptions, Storage
from .vocabulary import read_vocabulary
from .writer import Progress, write_model

# What a fit may take: the inputs it keeps, and the multiply-adds of the pass that records them (7B: about 240 tokens).
_FIT_INPUT_BYTES = 256 * 1000**2
_FIT_MULTIPLY_ADDS = 4 * 1000**4
_FIT_MOST_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class GgufReport:
    """What was written, and what its form can't hold exactly."""

    model: Path
    adapter: Path | None
    model_bytes: int
    adapter_bytes: int
    inventory: Sequence[Mapping[str, Any]]  # sizes by group, see exporters.onnx.plan.inventory
    exact: bool  # but for rounding to fp16
    errors: Mapping[str, float]  # of lossy linears: rms error of their outputs, relative to the outputs
    fit_tokens: int  # positions that the lossy ones were fitted to
    costs: Costs | None  # where there were ids to measure on
    zeros: int  # latent weights that were exactly 0 and became +1
    clamped: int  # scales of 0, or nearly so, that had to be folded
    notes: Sequence[str]  # what llama.cpp's tokenizer does differently on rare texts, and what qualifies the numbers
    seconds: float


def export_gguf(
    weights: Weights,
    out: Path,
    *,
    embedding: Storage = "f16",
    head: Storage = "f16",
    allow_lossy: bool = False,
    calibration_ids: Sequence[int] | None = None,
    verify_ids: Sequence[int] | None = None,
    provenance: Provenance | None = None,
    progress: Progress | None = None,
) -> GgufReport:
    """Write `weights` as a GGUF that stock llama.cpp runs, replacing older files, holding about one tensor in memory.

    Scales that don't fold are fitted to `calibration_ids` and, without `allow_lossy`, refused; the loss is measured on
    `verify_ids`. Raises UsageError (an option, a lossy export, an output that is the source), CheckpointError (shapes, RoPE or
    a tokenizer that GGUF can't hold) or OutputError (disk full, no permission); then nothing new is left at `out`.
    """
    started = time.perf_counter()
    out, config = Path(out), weights.config
    require_utf8(out, OutputError)
    out = real_target(out, "a file") if out.is_symlink() else out  # the adapter lies beside the file itself
    beta = adapter_path(out)
    _refuse_source(weights, out)
    _refuse_foreign(beta)
    options = GgufOptions(embedding=embedding, head=head)
    check_shapes(config, options)
    check_rope(config)
    check_sidecars(weights.files)
    vocabulary = read_vocabulary(config, weights.files)
    model, errors, fit_tokens = _fold(weights, calibration_ids)
    has_adapter = config.scaling_pattern not in ("block", "none")
    expected = None if verify_ids is None else Expected(weights, verify_ids)
    costs = None if expected is None else expected.costs(model, options, has_adapter=has_adapter)
    if errors and not allow_lossy:
        raise UsageError(_refusal(errors, costs))

    adapter, losses = Adapter(), Losses()
    tensors = list(plan_tensors(weights, model, options, adapter, losses))
    _require_room(out, sum(tensor.spec.nbytes for tensor in tensors))
    provenance = provenance or Provenance()
    adapter_bytes = 0
    with atomic_files(out) as path:
        sha256 = write_model(
            path,
            config.model_type,
            lambda writer: add_metadata(
                writer, config, weights.files, vocabulary, options, provenance, exact=not errors
            ),
            tensors,
            progress,
        )
        if adapter:
            adapter_bytes = adapter.write(path.with_name(beta.name), config.model_type, provenance.name, sha256)
        model_bytes = path.stat().st_size
        if expected is not None and costs is not None and is_resident(weights):
            cost = expected.check_in_llama_cpp(path, costs.with_adapter.kl_divergence, shown_as=out)
            costs = replace(costs, in_llama_cpp=cost)
        _refuse_foreign(beta)  # it may have come meanwhile
    if not adapter:
        with suppress(OSError):
            beta.unlink()  # what an earlier export of this name left
    return GgufReport(
        model=out,
        adapter=beta if adapter else None,
        model_bytes=model_bytes,
        adapter_bytes=adapter_bytes,
        inventory=inventory([tensor.spec for tensor in tensors]),
        exact=not errors,
        errors=errors,
        fit_tokens=fit_tokens,
        costs=costs,
        zeros=losses.zeros,
        clamped=sum(fold.clamped for fold in model.folds),
        notes=[f"in llama.cpp, {note}" for note in vocabulary.notes]
        + _notes(config, fit_tokens, calibration_ids, verify_ids),
        seconds=time.perf_counter() - started,
    )


def _fold(weights: Weights, ids: Sequence[int] | None) -> tuple[FoldedModel, dict[str, float], int]:
    """The folded model, the errors of linears that had to be fitted, and to how many tokens."""
    layers = range(weights.config.num_hidden_layers)
    if weights.config.scaling_pattern != "column":
        return FoldedModel(weights=weights, folds=(), fitted={}), {}, 0
    folds = [column_fold(weights, layer) for layer in layers]
    if not any(fold.lossy for fold in folds):
        return FoldedModel(weights=weights, folds=tuple(folds), fitted={}), {}, 0
    if not ids:
        raise UsageError("scales that differ between linears must be fitted to a text; give one of at least one token")

    # 1. Inputs of the lossy linears; those that share one are named by the first.
    first = {place: name for name, place in reversed(INPUT_OF.items())}
    watched = {f"model.layers.{layer}.{first[INPUT_OF[name]]}" for layer in layers for name in folds[layer].lossy}
    ids = list(ids)[: _affordable(weights, watched)]
    inputs = record_inputs(weights, ids, watched, resident=is_resident(weights))
    # 2. Gammas, now that the size of inputs is known, and d.
    fitted: dict[str, Fit] = {}
    for layer in layers:
        prefix = f"model.layers.{layer}."
        known = {place: inputs[f"{prefix}{name}"] for place, name in first.items() if f"{prefix}{name}" in inputs}
        fold = column_fold(weights, layer, {place: rms(x) for place, x in known.items()})
        folds[layer] = fold
        for name in fold.lossy:
            fitted[f"{prefix}{name}"] = _fit(weights, f"{prefix}{name}", fold, name, known[INPUT_OF[name]])
    errors = {name: fit.error for name, fit in fitted.items()}
    return FoldedModel(weights=weights, folds=tuple(folds), fitted=fitted), errors, len(ids)


def _fit(weights: Weights, full_name: str, fold: LayerFold, name: str, inputs: npt.NDArray[np.float32]) -> Fit:
    linear: Any = weights.linear(full_name)
    packed, ratio, _, a = fold.parts(name, linear)
    return fit_linear(packed, ratio, a, inputs * fold.gamma[INPUT_OF[name]])


def _affordable(weights: Weights, watched: set[str]) -> int:
    shapes = weights.config.linear_shapes()
    token_bytes = 4 * sum(shapes[name.split(".", 3)[3]][1] for name in watched)
    by_work = _FIT_MULTIPLY_ADDS // matrix_parameters(weights.config)
    return max(16, min(_FIT_MOST_TOKENS, _FIT_INPUT_BYTES // token_bytes, by_work))


def _refusal(errors: Mapping[str, float], costs: Costs | None) -> str:
    kinds = ", ".join(dict.fromkeys(name.rsplit(".", 1)[1].removesuffix("_proj") for name in errors))
    worst = max(errors, key=lambda name: errors[name])
    numbers = f"the outputs of {worst} would be off by {100 * errors[worst]:.0f} % rms"
    if costs is not None:
        numbers += (
            f", KL divergence {costs.with_adapter.kl_divergence:.3g} nats, perplexity {costs.perplexity:.4g} -> "
            f"{costs.with_adapter.perplexity:.4g} on {costs.tokens} tokens"
        )
    return (
        f"GGUF can't hold this model exactly: {len(errors)} linears ({kinds}) have a scale for each input that others "
        f"don't share; {numbers}. Accept that with --allow-lossy, or make the model exact with `fbiedge train --init "
        "CHECKPOINT --scaling column-shared`"
    )


def _notes(
    config: ModelConfig, fit_tokens: int, calibration: Sequence[int] | None, measured: Sequence[int] | None
) -> list[str]:
    """What a user should know about a fit."""
    notes = []
    needed = TOKENS_AN_INPUT * config.hidden_size
    if 0 < fit_tokens < needed:
        notes.append(
            f"signs are fitted too, which may halve the loss, from {needed:,} tokens on; give them by --calibration-text"
        )
    if fit_tokens and measured is not None and list(calibration or ()) == list(measured):
        notes.append("it was measured on the text that it was fitted to; --calibration-text and --verify-text give two")
    return notes


def _refuse_source(weights: Weights, out: Path) -> None:
    """A model is read while it is written out again, so it can't be its own output."""
    for target in (out, adapter_path(out)):
        if any(target.exists() and target.samefile(source) for source in getattr(weights, "paths", ())):
            raise UsageError(f"{target} belongs to the model that is exported; choose another name for the output")


def _refuse_foreign(beta: Path) -> None:
    """The adapter's place is taken only from an adapter of ours: the user named another file, so this one may be anything."""
    if not os.path.lexists(beta):
        return
    real_target(beta, "a file")
    try:
        metadata = GgufFile.open(beta).metadata
    except ModelFileError:
        metadata = {}
    if metadata.get("general.type") != "adapter" or "fbiedge.beta_of" not in metadata:
        raise OutputError(
            f"{beta} lies where the adapter goes and isn't one of ours; move it, or choose another name for the output"
        )


def _require_room(target: Path, needed: int) -> None:
    """Say at once what would fail after minutes of writing."""
    if target.is_dir():
        raise OutputError(f"can't write {target}: it is a folder; give the name of a file, such as model.gguf")
    folder = next((parent for parent in target.absolute().parents if parent.is_dir()), None)
    if folder is not None and (free := shutil.disk_usage(folder).free) < needed:
        raise OutputError(
            f"can't write {target}: it needs {needed / 1e6:.0f} MB and {folder} has {free / 1e6:.0f} MB free; "
            "nothing was written"
        )


def binary_bits(report: GgufReport) -> float:
    """Bits a binary weight takes in the file."""
    rows = [row for row in report.inventory if row["form"] == "Q1_0" and row["group"] in ("attention", "mlp")]
    weights = sum(row["parameters"] for row in rows)
    return 8 * sum(row["bytes"] for row in rows) / weights if weights else 0.0
