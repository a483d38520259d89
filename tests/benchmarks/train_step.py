"""A training step: how fast, at which share of the machine's matrix speed, and what binary linears cost beside dense ones.

    python tests/benchmarks/train_step.py [--preset small] [--batch 8] [--sequence-length 512] [--threads 1] [--steps 7]
    python tests/benchmarks/train_step.py --preset 130m --batch 16 --sequence-length 2048 --memory chunked,whole

A step is forward, backward, clipping and AdamW, under bf16 autocast, as `fbiedge train` does it. The student, its
full-precision twin (the same but for nn.Linear) and the student with a teacher of its own shape take turns, so that
what else the machine does meets all of them; a ratio is the median of those of neighbouring steps. The peak is a product
of two bf16 matrices, measured here. `--memory` measures instead how far memory rises in one whole step (with
activation checkpointing, as the preset does it), with the loss in chunks and with all logits at once, each in a process
of its own. On a GPU where there is one. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from resident import peak_memory
from torch import Tensor

from fbiedge.config import preset
from fbiedge.training import trainer
from fbiedge.training.config import TrainConfig
from fbiedge.training.flops import step_flops
from fbiedge.training.loss import Losses
from fbiedge.training.model import Llama
from fbiedge.training.parallel import team

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class RandomBatches:
    """What a step reads of data.Batches: random tokens."""

    def __init__(self, batch: int, length: int, vocab: int) -> None:
        self.batch_size, self.shape, self.vocab = batch, (batch, length + 1), vocab

    def batch(self, step: int, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        windows = np.random.default_rng(step).integers(0, self.vocab, self.shape)[rows]
        return windows[:, :-1].copy(), windows[:, 1:].copy()


class Steps:
    """One model and its optimizer."""

    def __init__(self, options: argparse.Namespace, pattern: str, teacher: bool) -> None:
        shape = replace(preset(options.preset), scaling_pattern=pattern)
        self.config = TrainConfig(
            steps=1, batch_size=options.batch, sequence_length=options.sequence_length, compile=options.compile,
            activation_checkpointing=options.recompute,
        )  # fmt: skip
        self.batches = RandomBatches(options.batch, options.sequence_length, shape.vocab_size)
        guide = Llama(replace(shape, scaling_pattern="none")).initialize(2) if teacher else None
        model = Llama(shape).initialize(1)
        self.flops = step_flops(model, guide, options.batch, options.sequence_length)
        self.objective = trainer.Objective(team(), model, guide, self.config)
        self.optimizer = torch.optim.AdamW(self.objective.model.parameters(), lr=1e-3, fused=True)

    def step(self, number: int) -> float:
        """Seconds."""
        synchronize()
        started = time.perf_counter()
        self.objective.backward(self.batches, number)
        torch.nn.utils.clip_grad_norm_(self.objective.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        synchronize()
        return time.perf_counter() - started


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def matmul_peak(size: int, repetitions: int) -> float:
    """FLOP/s of a bf16 product of two square matrices."""
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    seconds = []
    for _ in range(repetitions + 1):
        synchronize()
        started = time.perf_counter()
        a @ b
        synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds[1:])


def speed(options: argparse.Namespace) -> dict[str, object]:
    """Steps of all forms in turn."""
    forms = {
        "binary": Steps(options, "column", teacher=False),
        "dense": Steps(options, "none", teacher=False),
        "binary, with teacher": Steps(options, "column", teacher=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    peaks = [matmul_peak(options.peak_size, 3)]
    for number in range(options.steps + 2):
        for name, form in forms.items():
            took = form.step(number)
            if number >= 2:  # compiled, memory at hand
                seconds[name].append(took)
    peaks.append(matmul_peak(options.peak_size, 3))
    tokens, peak = options.batch * options.sequence_length, max(peaks)
    rows: dict[str, object] = {"peak_tflops": [value / 1e12 for value in peaks]}
    print(f"bf16 product: {peaks[0] / 1e9:.0f} GFLOP/s before, {peaks[1] / 1e9:.0f} after")
    for name, form in forms.items():
        middle = statistics.median(seconds[name])
        rows[name] = {
            "seconds": sorted(seconds[name]),
            "tokens_per_second": tokens / middle,
            "mfu": form.flops / middle / peak,
        }
        print(
            f"{name:22} {middle:7.3f} s ({min(seconds[name]):.3f} to {max(seconds[name]):.3f})  {tokens / middle:8.0f} tok/s  "
            f"{form.flops / middle / peak:6.1%} of that product's speed"
        )
    ratios = sorted(a / b for a, b in zip(seconds["binary"], seconds["dense"], strict=True))
    rows["overhead"] = [ratio - 1 for ratio in ratios]
    print(
        f"BinaryLinear over nn.Linear: {statistics.median(ratios) - 1:+.1%} ({ratios[0] - 1:+.1%} to {ratios[-1] - 1:+.1%})"
    )
    return rows


def whole_losses(
    features: Tensor, head: Tensor, targets: Tensor, *, teacher: tuple[Tensor, Tensor], one_hot_share: float, chunk: int
) -> Losses:
    """The distillation loss as one would write it down, in place of loss.head_losses."""
    target = F.linear(*teacher).float().softmax(-1)
    loss = -(target * F.linear(features, head).float().log_softmax(-1)).sum(-1).mean()
    return Losses(loss, loss.detach(), loss.detach())


def memory(options: argparse.Namespace, loss: str) -> dict[str, float]:
    """Peak of one step, and what models and moments take by themselves."""
    if loss == "whole":
        trainer.head_losses = whole_losses  # type: ignore[assignment]
    form = Steps(options, "column", teacher=True)
    with peak_memory(DEVICE) as peak:
        seconds = form.step(0)
    return {"before_bytes": peak.before, "peak_bytes": peak.most, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small")
    for name, default in (("batch", 8), ("sequence-length", 512), ("threads", 1), ("steps", 7), ("peak-size", 2048)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--memory", help="loss forms, of chunked and whole")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.recompute = bool(options.memory)
    torch.set_num_threads(options.threads)
    if options.one:
        print(json.dumps(memory(options, options.one)))
    elif not options.memory:
        print(json.dumps(speed(options)))
    else:
        results = {}
        for loss in options.memory.split(","):
            done = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--one", loss], capture_output=True, text=True, check=False
            )
            if done.returncode:
                print(
                    f"{loss:8} ended with {done.returncode}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
                )
                continue
            results[loss] = json.loads(done.stdout)
            row = results[loss]
            print(
                f"{loss:8} peak {row['peak_bytes'] / 1e9:6.2f} GB, of which {row['before_bytes'] / 1e9:.2f} before the step "
                f"(models); {row['seconds']:.0f} s"
            )
        print(json.dumps(results))


if __name__ == "__main__":
    main()
