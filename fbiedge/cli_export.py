"""The command `fbiedge export`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_support import extra, read_text
from .errors import UsageError


def export(
    checkpoint: Annotated[
        Path, typer.Argument(help="checkpoint folder (FBI-LLM's or Hugging Face's form), or a model.onnx of ours")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="file to write")],
    to: Annotated[str, typer.Option(help="format: onnx")] = "onnx",
    accuracy_level: Annotated[str, typer.Option(help="activations: int8 or fp32")] = "int8",
    head: Annotated[str, typer.Option(help="lm_head: int8, int4 or fp32")] = "int8",
    embedding: Annotated[str, typer.Option(help="embedding: fp32 or fp16")] = "fp32",
    kv_cache: Annotated[
        str | None, typer.Option(help="keys and values: int8 or fp32; default: int8 where the heads allow it")
    ] = None,
    verify_text: Annotated[
        Path | None, typer.Option(help="text to measure the loss on; default: a built-in one")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer.json to put into the model; default: the checkpoint's")
    ] = None,
) -> None:
    """Export a checkpoint to a model.onnx, check it against the reference, and print what was lost."""
    from dataclasses import replace

    from . import terminal
    from .weights import open_checkpoint

    if to != "onnx":
        raise UsageError(f"format is {to!r}, expected onnx")
    if output.is_file() and output.suffix != ".onnx":
        raise UsageError(f"{output} exists and is not a .onnx file; choose another name for the model")
    text = read_text(verify_text) if verify_text else None
    brought = {"tokenizer.json": read_text(tokenizer)} if tokenizer else {}
    with extra("export"):
        exporter: Any = importlib.import_module("fbiedge.exporters.onnx")
    # A model.onnx goes the same way again, to change its accuracy level or the form of its head.
    weights: Any = exporter.open_onnx(checkpoint) if checkpoint.suffix == ".onnx" else open_checkpoint(checkpoint)
    weights = replace(weights, files={**weights.files, **brought})
    if "tokenizer.json" not in weights.files:
        terminal.print_warning(_no_tokenizer(checkpoint))
    ids = exporter.default_text_ids(weights, text)
    with terminal.progress_bar("exporting") as update:
        report = exporter.export_onnx(
            weights, output, accuracy_level=accuracy_level, head=head, embedding=embedding, kv_cache=kv_cache,
            progress=lambda _name, done, total: update(done, total), verify_on=ids,
        )  # fmt: skip
    terminal.print_export(report)


def _no_tokenizer(checkpoint: Path) -> str:
    """What to do about a checkpoint without tokenizer.json."""
    advice = "give one with --tokenizer FILE"
    if (checkpoint / "tokenizer.model").is_file():
        advice += ", made from tokenizer.model (SentencePiece) by transformers' AutoTokenizer and save_pretrained"
    return f"{checkpoint} has no tokenizer.json: it is checked on random ids, and chat and generate won't take it; {advice}"
