"""The command `fbiedge export`: checkpoint folder, model.onnx or model.gguf -> model.onnx or model.gguf."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_support import extra, read_text
from .errors import UsageError
from .sample_text import CALIBRATION_TEXT

FORMATS = ("onnx", "gguf")


def export(
    source: Annotated[
        Path,
        typer.Argument(
            help="checkpoint folder (FBI-LLM's or Hugging Face's form), a model.onnx of ours, or a model.gguf"
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="file to write; with --genai, folder")],
    to: Annotated[
        str | None, typer.Option(help="format: onnx or gguf; default: by the output's name, else onnx")
    ] = None,
    accuracy_level: Annotated[str | None, typer.Option(help="onnx: activations, int8 (default) or fp32")] = None,
    head: Annotated[
        str | None,
        typer.Option(
            help="lm_head; onnx: 1bit (default where the source's is), int8 (else), int4, fp32; "
            "gguf: f16 (default), q8_0, q1_0, f32, also for the linears of a full-precision model"
        ),
    ] = None,
    embedding: Annotated[
        str | None,
        typer.Option(
            help="embedding; onnx: 1bit (default where the source's is), fp32 (else), fp16, int8, int4; "
            "gguf: f16 (default), q8_0, q1_0, f32"
        ),
    ] = None,
    kv_cache: Annotated[
        str | None, typer.Option(help="onnx: keys and values, int8 or fp32; default: int8 where the heads allow it")
    ] = None,
    genai: Annotated[bool, typer.Option("--genai", help="onnx: a folder that onnxruntime-genai runs as it is")] = False,
    ops: Annotated[
        str | None,
        typer.Option(help="onnx: operators, fbiedge (default) or stock, for runtimes that can't load a library"),
    ] = None,
    stock_bits: Annotated[
        int | None,
        typer.Option(help="onnx, --ops stock: bits a sign takes in the file: 4 (default), 2, or 1: fp32 in memory"),
    ] = None,
    allow_lossy: Annotated[
        bool,
        typer.Option(
            "--allow-lossy", help="gguf: also where scales per input can only be approximated, or a form loses much"
        ),
    ] = False,
    calibration_text: Annotated[
        Path | None, typer.Option(help="gguf: text that approximations are fitted to; default: a built-in one")
    ] = None,
    verify_text: Annotated[
        Path | None, typer.Option(help="text to measure the loss on; default: a built-in one")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer.json to put into the model; default: the checkpoint's")
    ] = None,
    name: Annotated[str | None, typer.Option(help="gguf: the model's name; default: the output's")] = None,
    license_: Annotated[
        str | None, typer.Option("--license", help="gguf: the model's license; default: its README.md's")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="gguf: what it was made from; default: its README.md's")
    ] = None,
) -> None:
    """Export a model to ONNX or GGUF, check it against the reference, and print what was lost."""
    from . import tables, terminal

    kind = "onnx" if genai and to in (None, "onnx") else _format(source, output, to)
    onnx_only = {"accuracy-level": accuracy_level, "kv-cache": kv_cache, "ops": ops, "stock-bits": stock_bits,
                 "genai": genai or None}  # fmt: skip
    gguf_only = {
        "allow-lossy": allow_lossy or None, "calibration-text": calibration_text, "name": name, "license": license_,
        "base-model": base_model,
    }  # fmt: skip
    for option, value in (onnx_only if kind == "gguf" else gguf_only).items():
        if value is not None:
            other = "onnx" if kind == "gguf" else "gguf"
            raise UsageError(f"--{option} is for --to {other}, and this goes to {kind}; leave it out")
    if stock_bits is not None and ops != "stock":
        raise UsageError("--stock-bits has no effect without --ops stock; leave it out")
    texts = _Texts(measured=_read_some(verify_text), fitted=_read_some(calibration_text))
    weights = _open(source, {"tokenizer.json": read_text(tokenizer)} if tokenizer else {})
    _require_tokenizer(weights, source, kind)
    trained = _trained_forms(source, kind)
    forms = {part: value for part, value in (("head", head), ("embedding", embedding)) if value is not None}
    is_decided = kind == "gguf" and weights.config.tie_word_embeddings  # the head, by the embedding
    for part, value in (trained if ops is None and not genai else {}).items():
        if part not in forms and not (part == "head" and is_decided):
            forms[part] = value
            terminal.print_text(f"{part} {value}, as it was trained")
    with terminal.progress_bar("exporting") as update:

        def progress(_name: str, done: int, total: int) -> None:
            update(done, total)

        if kind == "onnx":
            chosen = {
                "accuracy_level": accuracy_level,
                "kv_cache": kv_cache,
                "operators": ops,
                "stock_bits": stock_bits,
            }
            settings: dict[str, Any] = {option: value for option, value in chosen.items() if value is not None}
            report = _to_onnx(weights, output, texts, genai=genai, progress=progress, **settings, **forms)
        else:
            about = {"name": name or output.stem, "license": license_, "base_model": base_model}
            provenance = _provenance(source, {field: value for field, value in about.items() if value is not None})
            settings = {"provenance": provenance, "allow_lossy": allow_lossy}
            report = _to_gguf(weights, output, texts, progress=progress, **settings, **forms)
    if kind == "onnx":
        tables.print_export(report)
    else:
        tables.print_gguf_export(report)


def _format(source: Path, output: Path, to: str | None) -> str:
    """Which one is wanted. Raises UsageError for one that can't be written there."""
    from .engines import is_gguf

    kind = to or ("gguf" if output.suffix.lower() == ".gguf" else "onnx")
    if kind not in FORMATS:
        raise UsageError(f"format is {kind!r}, expected {' or '.join(FORMATS)}")
    if output.is_file() and output.suffix.lower() != f".{kind}":
        raise UsageError(f"{output} exists and is not a .{kind} file; choose another name for the model")
    if kind == "gguf" and is_gguf(source):
        raise UsageError(f"{source} is a GGUF already; give a checkpoint or a model.onnx, or export it with --to onnx")
    return kind


@dataclass(frozen=True, kw_only=True)
class _Texts:
    """None: the built-in ones."""

    measured: str | None
    fitted: str | None


def _trained_forms(source: Path, kind: str) -> dict[str, str]:
    """How the model of a training run had its head and embedding rounded, as the format calls it."""
    from .tensor_store import read_json

    run = source.resolve().parent / "run.json"
    training = read_json(run).get("training") if source.is_dir() and run.is_file() else None
    names = {"int8": "int8", "int4": "int4"} if kind == "onnx" else {"int8": "q8_0"}
    told = training if isinstance(training, dict) else {}
    return {part: names[told[part]] for part in ("head", "embedding") if told.get(part) in names}


def _read_some(path: Path | None) -> str | None:
    """The text in `path`. Raises UsageError, also where there is none: a tokenizer may begin with a token of its own."""
    if path is None:
        return None
    text = read_text(path)
    if not text.strip():
        raise UsageError(f"{path} holds no text; give one of a few sentences")
    return text


def _open(source: Path, brought: dict[str, str]) -> Any:
    """The weights of any source, with the files that the user brings."""
    from .engines import is_gguf
    from .weights import open_checkpoint

    weights: Any
    with extra("export"):
        if source.suffix == ".onnx":  # goes the same way again, to change the form of its head, say
            weights = importlib.import_module("fbiedge.exporters.onnx").open_onnx(source)
        elif is_gguf(source):
            weights = importlib.import_module("fbiedge.exporters.gguf.reader").open_gguf(source)
        else:
            weights = open_checkpoint(source)
    return replace(weights, files={**weights.files, **brought})


def _require_tokenizer(weights: Any, source: Path, kind: str) -> None:
    from . import terminal

    if "tokenizer.json" in weights.files:
        return
    if kind == "gguf":
        raise UsageError(f"{source} has no tokenizer.json, which a GGUF must carry; {_advice(source)}")
    terminal.print_warning(
        f"{source} has no tokenizer.json: it is checked on random ids, and chat and generate won't take it; "
        f"{_advice(source)}"
    )


def _to_onnx(weights: Any, output: Path, texts: _Texts, *, genai: bool, **settings: Any) -> Any:
    with extra("export"):
        exporter: Any = importlib.import_module("fbiedge.exporters.onnx")
    ids = exporter.default_text_ids(weights, texts.measured)
    export = exporter.export_genai if genai else exporter.export_onnx
    return export(weights, output, verify_on=ids, **settings)


def _provenance(source: Path, stated: dict[str, str]) -> Any:
    """What the files beside the source say, but for what the user says."""
    with extra("export"):
        exporter: Any = importlib.import_module("fbiedge.exporters.gguf")
    return replace(exporter.read_provenance(source), **stated)


def _to_gguf(weights: Any, output: Path, texts: _Texts, **settings: Any) -> Any:
    with extra("export"):
        exporter: Any = importlib.import_module("fbiedge.exporters.gguf")
        text_ids: Any = importlib.import_module("fbiedge.exporters.onnx").default_text_ids
    # An option without effect is a misunderstanding.
    config = weights.config
    if "head" in settings and config.tie_word_embeddings and config.scaling_pattern != "none":
        raise UsageError("--head has no effect: the head of this model is its embedding, so --embedding decides")
    if texts.fitted is not None and exporter.exactness(weights).exact:
        raise UsageError("--calibration-text has no effect: nothing of this model needs a fit; leave it out")
    return exporter.export_gguf(
        weights,
        output,
        calibration_ids=text_ids(weights, texts.fitted or CALIBRATION_TEXT),
        verify_ids=text_ids(weights, texts.measured),
        **settings,
    )


def _advice(source: Path) -> str:
    """Where a tokenizer.json comes from."""
    advice = "give one with --tokenizer FILE"
    if (source / "tokenizer.model").is_file():
        advice += ", made from tokenizer.model (SentencePiece) by transformers' AutoTokenizer and save_pretrained"
    return advice
