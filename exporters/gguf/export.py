"""`export_gguf`: weights -> model.gguf and, where there is a beta, model.beta.gguf. Fits the parts together.

fold.py, folded.py, fit.py   what the file holds in place of scales per input, exactly or as well as it can
vocabulary.py, metadata.py   what travels beside the weights
plan.py, q1_0.py, writer.py  the tensors, one at a time
adapter.py                   beta
cost.py                      what was lost
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fbiedge.errors import ModelFileError, OutputError, UsageError
from fbiedge.files import atomic_files, real_target, require_room, require_utf8
from fbiedge.gguf_file import GgufFile
from fbiedge.gguf_model import adapter_path
from fbiedge.weights import Weights

from ..onnx.sidecars import check_sidecars
from ..onnx.sources import inventory
from .adapter import Adapter
from .cost import Costs, Expected, is_resident, why_not_in_llama_cpp
from .fit import ModelFit, fit_model
from .fold import exactness
from .folded import FoldedModel
from .metadata import add_metadata, check_rope
from .plan import Losses, check_shapes, plan_tensors
from .provenance import Provenance
from .storage import GgufOptions, Storage
from .vocabulary import read_vocabulary
from .writer import Progress, write_model

# Where q1_0 costs an embedding or a head more than this, it must be asked for; of binary ones it costs nothing.
_SMALL_LOSS_NATS = 1e-2


@dataclass(frozen=True, kw_only=True)
class GgufReport:
    """What was written, and what its form can't hold exactly."""

    model: Path
    adapter: Path | None
    model_bytes: int
    adapter_bytes: int
    inventory: Sequence[Mapping[str, Any]]  # sizes by group, see exporters.onnx.plan.inventory
    binary: bool  # False: of full precision, whose linears have the form of the head
    exact: bool  # but for rounding to fp16 and the forms of embedding and head
    errors: Mapping[str, float]  # of lossy linears: rms error of their outputs, relative to these, on the fit's text
    fit_tokens: int  # positions that the lossy ones were fitted to
    costs: Costs | None  # where there were ids to measure on
    zeros: int  # latent weights that were exactly 0 and became +1
    clamped: int  # scales of 0, or nearly so, that had to be folded
    notes: Sequence[str]  # what llama.cpp's tokenizer does differently on rare texts, and what would make a fit better
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

    Scales that don't fold are fitted to `calibration_ids`; the loss is measured on `verify_ids`, and never on what was
    fitted to: the same text twice is split. Without `allow_lossy` a fit is refused, and so is an embedding or head in
    q1_0 that costs much. `head` is also the form of the linears of a full-precision model. Raises UsageError (an option,
    a lossy export, an output that is the source), CheckpointError (shapes, RoPE or a tokenizer that GGUF can't hold) or
    OutputError (disk full, no permission); then nothing new is left at `out`.
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
    found = exactness(weights)
    if not found.exact:
        calibration_ids, verify_ids = _two_texts(calibration_ids, verify_ids)
    fit = fit_model(weights, found, calibration_ids, resident=is_resident(weights))
    model = FoldedModel(weights=weights, folds=fit.folds, fitted=fit.linears)
    has_adapter = config.scaling_pattern not in ("block", "none")
    expected = None if verify_ids is None else Expected(weights, verify_ids)
    costs = None if expected is None else expected.costs(model, options, has_adapter=has_adapter)
    if not allow_lossy:
        _refuse_loss(fit, costs, options)

    adapter, losses = Adapter(), Losses()
    tensors = list(plan_tensors(weights, model, options, adapter, losses))
    require_room(out, sum(tensor.spec.nbytes for tensor in tensors), "model.gguf")
    provenance = provenance or Provenance()
    adapter_bytes = 0
    with atomic_files(out) as path:
        sha256 = write_model(
            path,
            config.model_type,
            lambda writer: add_metadata(
                writer, config, weights.files, vocabulary, options, provenance, exact=found.exact
            ),
            tensors,
            progress,
        )
        if adapter:
            adapter_bytes = adapter.write(path.with_name(beta.name), config.model_type, provenance.name, sha256)
        model_bytes = path.stat().st_size
        if expected is not None and costs is not None:
            not_run = why_not_in_llama_cpp(weights)
            kl = costs.with_adapter.kl_divergence
            cost = None if not_run else expected.check_in_llama_cpp(path, kl, shown_as=out)
            costs = replace(costs, in_llama_cpp=cost, not_run=not_run)
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
        binary=config.scaling_pattern != "none",
        exact=found.exact,
        errors={name: one.error for name, one in fit.linears.items()},
        fit_tokens=fit.tokens,
        costs=costs,
        zeros=losses.zeros,
        clamped=sum(fold.clamped for fold in model.folds),
        notes=[f"in llama.cpp, {note}" for note in vocabulary.notes] + [note for note in [fit.advice()] if note],
        seconds=time.perf_counter() - started,
    )


def _two_texts(
    calibration: Sequence[int] | None, measured: Sequence[int] | None
) -> tuple[Sequence[int] | None, Sequence[int] | None]:
    """Of one text, the first half to fit to and the second to measure on: on its own text a fit looks too good."""
    if not calibration or not measured:
        return calibration, measured
    longest = max(calibration, measured, key=len)
    if any(list(text) != list(longest)[: len(text)] for text in (calibration, measured)):
        return calibration, measured
    half = max(1, len(longest) // 2)
    return longest[:half], longest[half:]


def _refuse_loss(fit: ModelFit, costs: Costs | None, options: GgufOptions) -> None:
    """What nobody may lose without having asked for it. Raises UsageError."""
    loss = ""
    if costs is not None:
        loss = (
            f"KL divergence {costs.with_adapter.kl_divergence:.3g} nats, perplexity {costs.perplexity:.4g} -> "
            f"{costs.with_adapter.perplexity:.4g} on {costs.tokens:,}"
        )
    if fit.linears:
        kinds = ", ".join(dict.fromkeys(name.rsplit(".", 1)[1].removesuffix("_proj") for name in fit.linears))
        worst, error = max(((name, one.error) for name, one in fit.linears.items()), key=lambda pair: pair[1])
        advice = fit.advice()
        raise UsageError(
            f"GGUF can't hold this model exactly: {len(fit.linears)} linears ({kinds}) have a scale for each input that "
            f"others don't share; fitted to {fit.tokens:,} tokens, the outputs of {worst} are off by {100 * error:.0f} % rms"
            f"{f' there, {loss} others' if loss else ' there'}{f' ({advice})' if advice else ''}. Accept that with "
            "--allow-lossy, or make the model exact with `fbiedge train --init CHECKPOINT --scaling column-shared`"
        )
    forms = [name for name in ("embedding", "head") if getattr(options, name) == "q1_0"]
    if forms and costs is not None and not costs.with_adapter.kl_divergence <= _SMALL_LOSS_NATS:
        raise UsageError(
            f"{' and '.join(f'{name} q1_0' for name in forms)} would lose much of this model: {loss} tokens; accept that "
            "with --allow-lossy, or choose q8_0 or f16"
        )


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
