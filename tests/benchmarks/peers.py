"""Speed of fbiedge beside what a user would pick instead, in one run on one machine: `make bench-peers`.

    python tests/benchmarks/peers.py [--preset 130m] [--head int8] [--depth 0,512,1024] [--threads 1,2] [--repetitions 5]

Engines: fbiedge; stock ONNX Runtime, the same model in MatMulNBits of 2 and of 4 bits; llama.cpp with Q1_0 and with
ternary TQ2_0, built for this machine, and ik_llama.cpp with Q1_0 as its package has it (built for AVX2), when .venv-peers
holds them (`make bench-peers` sees to that). Same shape, random weights, a head of the same
precision everywhere (Q8_0 or Q4_0 in llama.cpp). For each configuration every engine has a process; they take turns,
A B C D A B C D …. Printed are medians, the spread, and how many times as fast as each peer fbiedge is. Ratios below 1 are
printed like the others. The last line is one JSON document. Models go to --folder and are reused.

All compute the logits of a prompt's last token alone. Each holds its KV cache as it does by default: fbiedge int8, ONNX
Runtime fp32, llama.cpp fp16. Against llama.cpp built without AVX-512: `make bench-peers-avx2`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from peer_models import RandomWeights, parameters

from fbiedge.bench import WORKER, BenchOptions, Spread, Worker
from fbiedge.config import ModelConfig, preset
from fbiedge.exporters.onnx import export_onnx
from fbiedge.exporters.onnx.options import Head, StockBits
from fbiedge.machine import describe_machine
from fbiedge.ops_library import active_isa
from fbiedge.read_speed import ReadLoop

LLAMA_CPP_PEER = Path(__file__).with_name("llama_cpp_peer.py")


@dataclass(frozen=True)
class Engine:
    """A model file and the program that runs it."""

    name: str
    file: str
    write: Callable[[ModelConfig, Path], None]
    program: tuple[str, ...] = WORKER


HEADS = {"int8": "q8_0", "int4": "q4_0"}  # and what llama.cpp calls about the same


def engines(scaling_pattern: str, head: Head, llama_python: Path | None) -> list[Engine]:
    """Ours first."""

    def write_ours(config: ModelConfig, out: Path) -> None:
        export_onnx(RandomWeights(config), out, head=head)

    def write_stock(bits: StockBits) -> Callable[[ModelConfig, Path], None]:
        def write(config: ModelConfig, out: Path) -> None:
            weights = RandomWeights(replace(config, scaling_pattern="block"))
            export_onnx(weights, out, head=head, operators="stock", stock_bits=bits)

        return write

    found = [
        Engine("fbiedge", f"fbiedge-{scaling_pattern}-{head}.onnx", write_ours),
        Engine("onnxruntime 2-bit", f"stock-2-{head}.onnx", write_stock(2)),
        Engine("onnxruntime 4-bit", f"stock-4-{head}.onnx", write_stock(4)),
    ]
    if llama_python is None:
        return found

    def write_gguf(linears: str) -> Callable[[ModelConfig, Path], None]:
        def write(config: ModelConfig, out: Path) -> None:
            arguments = ["write", json.dumps(config.to_dict()), str(out), linears, HEADS[head]]
            subprocess.run([str(llama_python), str(LLAMA_CPP_PEER), *arguments], check=True)

        return write

    for name, linears, verb in (
        ("llama.cpp Q1_0", "q1_0", "serve"),
        ("llama.cpp TQ2_0", "tq2_0", "serve"),
        ("ik_llama.cpp Q1_0", "q1_0", "serve-ik"),
    ):
        program = (str(llama_python), str(LLAMA_CPP_PEER), verb)
        found.append(Engine(name, f"{linears}-{HEADS[head]}.gguf", write_gguf(linears), program))
    return found


def measure(config: ModelConfig, found: list[Engine], folder: Path, options: BenchOptions) -> list[dict[str, Any]]:
    """One row for each configuration and engine."""
    depths, threads = options.depths or (), options.threads or ()
    rows = []
    for kind, depth in (("prefill", 0), *(("decode", d) for d in depths)):
        for count in threads:
            tokens = options.prompt_tokens if kind == "prefill" else options.gen_tokens
            seconds: list[list[float]] = [[] for _ in found]
            with ExitStack() as stack:
                workers = []
                for engine in found:
                    settings = {
                        "model": str(folder / engine.file), "accuracy_level": None, "threads": count, "depth": depth,
                        "tokens": tokens, "context": config.max_position_embeddings,
                    }  # fmt: skip
                    workers.append(Worker(settings, engine.program))
                    stack.callback(workers[-1].close)
                for _ in range(options.repetitions):
                    for worker, samples in zip(workers, seconds, strict=True):
                        samples.append(worker.ask(kind)["seconds"])
                peaks = [worker.ask("memory")["peak_rss_bytes"] for worker in workers]
            speeds = [Spread.of([tokens / value for value in samples]) for samples in seconds]
            for engine, worker, speed, peak in zip(found, workers, speeds, peaks, strict=True):
                row = {
                    "engine": engine.name, "kind": kind, "depth": depth, "threads": count, "tokens": tokens,
                    "tokens_per_second": asdict(speed), "ours_is_times_as_fast": speeds[0].median / speed.median,
                    "peak_rss_bytes": peak, "load_seconds": worker.started["load_seconds"],
                }  # fmt: skip
                rows.append(row)
                print(as_line(row), flush=True)
    return rows


HEADINGS = f"{'':26}{'threads':>8}  {'engine':18}{'tok/s':>9}{'spread':>18}{'ours ×':>8}{'RSS MB':>8}{'load s':>8}"


def as_line(row: dict[str, Any]) -> str:
    what = f"{row['kind']} {row['tokens']}" + (f" at depth {row['depth']}" if row["kind"] == "decode" else "")
    speed = row["tokens_per_second"]
    spread = f"{speed['minimum']:.1f}–{speed['maximum']:.1f}"
    return (
        f"{what:26}{row['threads']:>8}  {row['engine']:18}{speed['median']:>9.1f}{spread:>18}"
        f"{row['ours_is_times_as_fast']:>8.2f}{row['peak_rss_bytes'] / 1e6:>8.0f}{row['load_seconds']:>8.3f}"
    )


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--preset", default="130m", help="130m, 1.3b or 7b")
    parser.add_argument(
        "--scaling-pattern", default="column", choices=("column", "row", "single", "block"), help="ours"
    )
    parser.add_argument("--head", default="int8", choices=tuple(HEADS))
    parser.add_argument("--isa", help="our kernels, as FBIEDGE_ISA; for a llama.cpp built for as little")
    parser.add_argument("--only", default="", help="engines whose names hold one of these words: fbiedge,Q1_0")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--gen-tokens", type=int, default=64)
    parser.add_argument("--depth", type=numbers)
    parser.add_argument("--threads", type=numbers)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("runs/peers"), help="where the models go")
    parser.add_argument("--llama-python", type=Path, help="interpreter that has llama-cpp-python and gguf")
    arguments = parser.parse_args()

    config = replace(preset(arguments.preset), scaling_pattern=arguments.scaling_pattern)
    options = BenchOptions(
        prompt_tokens=arguments.prompt_tokens, gen_tokens=arguments.gen_tokens, depths=arguments.depth,
        threads=arguments.threads, repetitions=arguments.repetitions,
    ).for_context(config.max_position_embeddings)  # fmt: skip
    if arguments.isa:
        os.environ["FBIEDGE_ISA"] = arguments.isa
    ours, *others = engines(arguments.scaling_pattern, arguments.head, arguments.llama_python)
    words = arguments.only.split(",")
    found = [ours, *(engine for engine in others if any(word in engine.name for word in words))]
    folder = arguments.folder / arguments.preset
    folder.mkdir(parents=True, exist_ok=True)
    for engine in found:
        if not (folder / engine.file).is_file():
            print(f"writing {folder / engine.file}", flush=True)
            engine.write(config, folder / engine.file)
    machine = describe_machine()
    loop = ReadLoop([])
    threads = options.threads or ()
    reading = {count: Spread.of([loop.memory(count) for _ in range(5)]) for count in threads}
    print(f"{arguments.preset}, {parameters(config) / 1e6:.0f}M parameters, on {machine.cpu}, {machine.cores} cores")
    print(f"head {arguments.head}, kernels {active_isa()}")
    print(f"load average {machine.load_average}, {machine.date}, commit {machine.commit}")
    print(", ".join(f"{count} threads read {speed.median:.1f} GB/s" for count, speed in reading.items()))
    print(HEADINGS)
    rows = measure(config, found, folder, options)
    document = {
        "preset": arguments.preset, "scaling_pattern": arguments.scaling_pattern, "head": arguments.head,
        "isa": active_isa(), "options": asdict(options),
        "machine": asdict(machine), "read_gb_per_second": {count: asdict(speed) for count, speed in reading.items()},
        "rows": rows,
    }  # fmt: skip
    print(json.dumps(document))


if __name__ == "__main__":
    main()
