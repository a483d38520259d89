"""`export_onnx`: weights -> model.onnx. Fits the parts together; see graph.py, plan.py, fallback.py and writer.py."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx import FunctionProto, ModelProto, helper  # noqa: TID253

import fbiedge
from fbiedge.config import ModelConfig
from fbiedge.errors import OutputError, UsageError
from fbiedge.files import require_utf8
from fbiedge.weights import Weights

from .fallback import DOMAIN, OPSET, binary_matmul_function
from .fallback_attention import attention_function
from .fallback_fused import binary_qkv_function, binary_swiglu_function
from .fallback_head import matmul_nbits_function
from .graph import build_graph
from .metadata import make_metadata
from .options import CODE_BITS, AccuracyLevel, Embedding, ExportOptions, Head, KVCache, Operators, StockBits, Storage
from .plan import Losses, plan_tensors
from .sources import inventory
from .stock import CONTRIB
from .verify import VerifyReport, check_export
from .vocabulary import choose_embedding, choose_head
from .writer import EMBED_LIMIT_BYTES, Progress, data_path, write_model

IR_VERSION = 10


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was written, and what its form can't hold exactly."""

    model: Path
    data: Path | None  # external data, for models above 64 MB
    model_bytes: int
    data_bytes: int
    inventory: Sequence[dict[str, Any]]  # sizes by group, see plan.inventory
    zeros: int  # latent weights that were exactly 0 and became +1
    loss: VerifyReport | None  # what the file computes differently, where it was checked
    seconds: float
    others: Sequence[Path] = ()  # files that were written along with it


def export_onnx(
    weights: Weights,
    out: Path,
    *,
    accuracy_level: AccuracyLevel | None = None,
    head: Head | None = None,
    embedding: Embedding | None = None,
    block_scales: Storage = "fp16",
    kv_cache: KVCache | None = None,
    operators: Operators = "fbiedge",
    stock_bits: StockBits = 4,
    embed_limit_bytes: int = EMBED_LIMIT_BYTES,
    progress: Progress | None = None,
    verify_on: Sequence[int] | None = None,
) -> ExportReport:
    """Write `weights` as an ONNX model at `out`, replacing an older file, holding about one tensor in memory.

    Where head and embedding are left open: 1 bit where the weights hold them so, else int8 and fp32; the level is then
    int8, but for `stock_bits` of 1.
    With the token ids `verify_on`, the file is compared with `weights` before it appears (see verify.check_export).
    Raises UsageError (an option or head_dim that can't be, an output that is the source), CheckpointError (weights that
    contradict their config, a tokenizer or other file beside them that can't be used) or OutputError (disk full, no
    permission, a file that came out wrong); then nothing new is left at `out`.
    """
    started = time.perf_counter()
    out = Path(out)
    require_utf8(out, OutputError)
    _refuse_source(weights, out)
    options = ExportOptions(
        accuracy_level=accuracy_level or ("fp32" if operators == "stock" and stock_bits == 1 else "int8"),
        head=choose_head(weights, head),
        embedding=choose_embedding(weights, embedding),
        block_scales=block_scales,
        kv_cache=kv_cache,
        operators=operators,
        stock_bits=stock_bits,
    )
    losses = Losses()
    sources = list(plan_tensors(weights, options, losses))
    rows = inventory([spec for source in sources for spec in source.specs])
    model = _model(weights.config, options)
    helper.set_model_props(model, make_metadata(weights.config, weights.files, options, rows))
    loss: list[VerifyReport] = []

    def check(path: Path) -> None:
        if verify_on is not None:
            loss.append(check_export(weights, path, verify_on))

    written = write_model(model, sources, out, embed_limit_bytes=embed_limit_bytes, progress=progress, check=check)
    return ExportReport(
        model=written.model,
        data=written.data,
        model_bytes=written.model_bytes,
        data_bytes=written.data_bytes,
        inventory=rows,
        zeros=losses.zeros,
        loss=loss[0] if loss else None,
        seconds=time.perf_counter() - started,
    )


def _refuse_source(weights: Weights, out: Path) -> None:
    """A model is read while it is written out again, so it can't be its own output."""
    sources = getattr(weights, "paths", ())
    for target in (out, data_path(out)):
        if any(target.exists() and target.samefile(source) for source in sources):
            raise UsageError(f"{target} belongs to the model that is exported; choose another name for the output")


def _model(config: ModelConfig, options: ExportOptions) -> ModelProto:
    ours = options.ours(config)
    functions: list[FunctionProto] = []
    if ours:
        form = config.scaling_pattern
        functions = [binary_qkv_function(form), binary_swiglu_function(form), binary_matmul_function(form, bias=True)]
    if ours and options.head in CODE_BITS:
        functions.append(matmul_nbits_function(CODE_BITS[options.head]))
    if options.cache(config) == "int8":
        functions.append(attention_function(norms=config.has_head_norms))
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
    if functions:
        opsets.append(helper.make_opsetid(DOMAIN, 1))
    model: ModelProto = helper.make_model(
        build_graph(config, options),
        functions=functions,
        opset_imports=opsets,
        ir_version=IR_VERSION,
        producer_name="fbiedge",
        producer_version=fbiedge.__version__,
    )
    return model
