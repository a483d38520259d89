"""Reports as tables on stdout: what a model is made of, what an export wrote, what a benchmark measured."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .terminal import out, print_text

if TYPE_CHECKING:
    from .bench import BenchReport
    from .inspection import Inspection

_ARCHITECTURES = {"llama": "Llama", "qwen3": "Qwen3"}


def print_inspection(inspection: Inspection) -> None:
    """Architecture, groups of tensors, files and properties, as tables on stdout."""
    config = inspection.config
    about = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    rows = {
        "file": str(inspection.path),
        "kind": inspection.kind,
        "architecture": f"{_ARCHITECTURES[config.model_type]}, {config.num_hidden_layers} layers, hidden {config.hidden_size}, "
        f"FFN {config.intermediate_size}, {config.num_attention_heads} heads of {config.head_dim}, "
        f"{config.num_key_value_heads} KV heads",
        "vocabulary": f"{config.vocab_size:,}",
        "context": f"{config.max_position_embeddings:,} tokens",
        "parameters": f"{inspection.parameters:,}",
        **inspection.properties,
        **{f"file {name}": f"{size:,} bytes" for name, size in inspection.files.items()},
    }
    for label, value in rows.items():
        about.add_row(Text(label, style="dim"), Text(value))
    _print_table(about)
    _print_table(_group_table([{**entry} for entry in inspection.to_dict()["groups"]]))


def _group_table(groups: Iterable[dict[str, Any]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("group", "form", "tensors", "parameters", "bytes", "bits/weight"):
        table.add_column(heading, justify="left" if heading in ("group", "form") else "right")
    for entry in groups:
        table.add_row(
            Text(str(entry["group"])),
            Text(str(entry["form"])),
            f"{entry['tensors']:,}",
            f"{entry['parameters']:,}",
            f"{entry['bytes']:,}",
            f"{entry['bits_per_weight']:.3f}",
        )
    return table


def _print_table(table: Table) -> None:
    # In a pipe rich assumes 80 columns and would cut long paths; there every row is one line of any length.
    width = None if out.is_terminal else 1000
    for line in Text.from_ansi(_capture(table, width)).split("\n") if width else []:
        print(line.plain.rstrip())
    if width is None:
        out.print(table)
    sys.stdout.flush()


def _capture(table: Table, width: int) -> str:
    console = Console(width=width, no_color=True, highlight=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip("\n")


def print_analysis(analysis: Any) -> None:
    """What `fbiedge analyze` found: a row for each run, of a single one also the scales by projection, what is missing."""
    runs = Table(box=None, padding=(0, 2, 0, 0))
    runs.add_column("run")
    for heading in ("steps", "tokens", "next-token loss", "best held-out", "at step", "flips a step", "alpha", "beta"):
        runs.add_column(heading, justify="right")
    for found in analysis.findings:
        under_way = found.steps < found.planned_steps
        runs.add_row(
            Text(found.run),
            f"{found.steps:,}" + (f" of {found.planned_steps:,}" if under_way else ""),
            f"{found.tokens:,}",
            _number(found.next_token_loss, ".3f"),
            _number(found.best_held_out, ".3f"),
            _number(found.best_step, ",d"),
            "-" if found.flip_flop is None else f"{100 * found.flip_flop:.3g} %",
            *("-" if pair is None else f"{pair[0]:.3g} ± {pair[1]:.2g}" for pair in (found.alpha, found.beta)),
        )
    _print_table(runs)
    if analysis.scales and len(analysis.findings) == 1:
        scales = Table(box=None, padding=(0, 2, 0, 0))
        for heading in ("scale", "projection"):
            scales.add_column(heading)
        for heading in ("count", "mean", "deviation", "1 %", "median", "99 %"):
            scales.add_column(heading, justify="right")
        for summary in analysis.scales:
            low, *_, high = summary.quantiles
            shown = (summary.mean, summary.std, low, summary.quantiles[len(summary.quantiles) // 2], high)
            scales.add_row(
                summary.scale, summary.projection, f"{summary.count:,}",
                *(f"{value:.3g}" for value in shown),
            )  # fmt: skip
        print_text("")
        _print_table(scales)
    for found in analysis.findings:
        for missing in found.missing:
            print_text(f"{found.run}: {missing}")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def print_export(report: Any) -> None:
    """What `export_onnx` wrote, and what it had measured before."""
    loss = report.loss
    files = {report.model: report.model_bytes} | ({report.data: report.data_bytes} if report.data else {})
    for path, size in files.items():
        print_text(f"wrote {path} ({size:,} bytes)")
    if report.others:
        print_text(f"wrote beside it {', '.join(path.name for path in report.others)}")
    _print_table(_group_table(report.inventory))
    if report.zeros:
        print_text(f"{report.zeros:,} latent weights were exactly 0 and became +1")
    print_text(
        f"checked against the numpy reference on {loss.note}: max logit error {loss.max_logit_error:.3g}, "
        f"KL divergence {loss.kl_divergence:.3g} nats, top-1 agreement {100 * loss.top1_agreement:.1f} %"
    )


def print_gguf_export(report: Any) -> None:
    """What `export_gguf` wrote, and what its form can't hold."""
    print_text(f"wrote {report.model} ({report.model_bytes:,} bytes)")
    if report.adapter is not None:
        print_text(
            f"wrote {report.adapter} ({report.adapter_bytes:,} bytes): the offsets beta, as a LoRA (llama.cpp --lora)"
        )
    _print_table(_group_table(report.inventory))
    if report.zeros:
        print_text(f"{report.zeros:,} latent weights were exactly 0 and became +1")
    if report.clamped:
        print_text(f"{report.clamped:,} scales of 0 became a millionth of their tensor's largest")
    if report.errors:
        table = Table(box=None, padding=(0, 2, 0, 0))
        table.add_column("fitted linear")
        table.add_column("rms error of its outputs there", justify="right")
        for name, error in report.errors.items():
            table.add_row(Text(name), f"{100 * error:.2f} %")
        _print_table(table)
        others = f" and measured on {report.costs.tokens:,} others" if report.costs else ""
        print_text(f"lossy: {len(report.errors)} linears were fitted to {report.fit_tokens:,} tokens{others}")
    elif report.binary:
        print_text("its linears are exact, but for rounding scales to fp16")
    if (costs := report.costs) is not None:
        print_text(f"of the source: perplexity {costs.perplexity:.4g} on {costs.tokens:,} tokens")
        forms = {"of the GGUF": costs.with_adapter, "without its adapter": costs.without_adapter}
        for form, cost in (forms | {"of the GGUF in llama.cpp": costs.in_llama_cpp}).items():
            if cost is not None:
                print_text(
                    f"{form}: perplexity {cost.perplexity:.4g}, KL divergence "
                    f"{cost.kl_divergence:.3g} nats, top-1 agreement {100 * cost.top1_agreement:.1f} %, "
                    f"max logit error {cost.max_logit_error:.3g}"
                )
        if costs.not_run:
            print_text(f"not run in llama.cpp: {costs.not_run}")
    for note in report.notes:
        print_text(f"note: {note}")


def print_bench(report: BenchReport) -> None:
    """What `fbiedge bench` measured, as a table on stdout, and on what."""
    machine = report.machine
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in (
        "",
        "threads",
        "tok/s",
        "spread",
        "weights GB/s",
        "of reading",
        "peak RSS MB",
        "load s",
        "first single token s",
    ):
        table.add_column(heading, justify="right" if heading else "left")
    for row in report.measurements:
        speed = row.tokens_per_second
        table.add_row(
            f"prefill {row.tokens}" if row.kind == "prefill" else f"decode {row.tokens} at depth {row.depth}",
            str(row.threads) if row.threads_used == row.threads else f"{row.threads} ({row.threads_used})",
            _significant(speed.median),
            f"{_significant(speed.minimum)}–{_significant(speed.maximum)}",
            "–" if row.weights_gb_per_second is None else f"{row.weights_gb_per_second:.1f}",
            "–" if row.share_of_bandwidth is None else f"{100 * row.share_of_bandwidth:.0f} %",
            "–" if row.peak_rss_bytes is None else f"{row.peak_rss_bytes / 1e6:.0f}",
            f"{row.load_seconds:.3f}",
            f"{row.first_token_seconds:.3f}",
        )
    busy = "" if machine.load_average is None else f", load average {machine.load_average}"
    lines = [
        f"model    {report.model}, {report.engine}",
        f"machine  {machine.cpu}, {machine.cores} cores{busy}",
        f"with     {', '.join(f'{name} {version}' for name, version in machine.versions.items())}",
        f"at       {machine.date}{f', commit {machine.commit}' if machine.commit else ''}",
    ]
    if report.fallback_reason:
        lines.append(f"note     {report.fallback_reason}")
    if report.weight_bytes_per_token is not None:
        lines.append(
            f"weights  {report.weight_bytes_per_token / 1e6:.1f} MB read by a decoded token; its KV cache comes on top"
        )
    for entry in report.bandwidth:
        mapped = entry.mapped_file
        file = (
            f", the mapped model file {mapped.median:.1f} ({mapped.minimum:.1f}–{mapped.maximum:.1f})" if mapped else ""
        )
        memory = f"{entry.memory.median:.1f} GB/s ({entry.memory.minimum:.1f}–{entry.memory.maximum:.1f})"
        lines.append(f"reading  {entry.threads} thread{'s' if entry.threads > 1 else ''}: memory {memory}{file}")
    for line in lines:
        print_text(line)
    _print_table(table)


def _significant(speed: float) -> str:
    """tok/s with three digits, or all before the point."""
    return f"{speed:.0f}" if speed >= 100 else f"{speed:.1f}" if speed >= 10 else f"{speed:.2f}"
