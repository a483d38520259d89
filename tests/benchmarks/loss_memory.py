"""Peak memory and time of the loss, in chunks of positions and with all logits at once: forward and backward of the head.

    python tests/benchmarks/loss_memory.py [--batch 16] [--sequence-length 2048] [--vocab 32000] [--hidden 768]

Each form runs in a process of its own, which reports how far its resident memory rose above what the inputs take. Under
bfloat16 autocast, as in training. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from resident import peak_memory
from torch import Tensor

from fbiedge.training.loss import head_losses


def whole(features: Tensor, head: Tensor, teacher: tuple[Tensor, Tensor]) -> Tensor:
    """Distillation as one would write it down."""
    target = F.linear(*teacher).float().softmax(-1)
    return -(target * F.linear(features, head).float().log_softmax(-1)).sum(-1).mean()


def measure(form: str, shape: argparse.Namespace) -> dict[str, float]:
    """One forward and backward."""
    positions = shape.batch * shape.sequence_length
    random = torch.Generator().manual_seed(0)
    features, guide = (torch.randn(positions, shape.hidden, generator=random) for _ in range(2))
    head, guide_head = (torch.randn(shape.vocab, shape.hidden, generator=random) * 0.02 for _ in range(2))
    targets = torch.randint(0, shape.vocab, (positions,), generator=random)
    features.requires_grad_(), head.requires_grad_()
    started = time.perf_counter()
    with peak_memory() as peak:
        with torch.autocast("cpu", torch.bfloat16):
            if form == "whole":
                loss = whole(features, head, (guide, guide_head))
            else:
                loss = head_losses(features, head, targets, teacher=(guide, guide_head), chunk=int(form)).loss
        loss.backward()  # type: ignore[no-untyped-call]
    seconds = time.perf_counter() - started
    return {"peak_bytes": peak.most - peak.before, "seconds": seconds, "loss": loss.item()}


def main() -> None:
    """Measure every form, or with --form one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("batch", 16), ("sequence-length", 2048), ("vocab", 32000), ("hidden", 768)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--forms", default="256,1024,4096,whole", help="chunk sizes, and `whole`")
    parser.add_argument("--form", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.form:
        print(json.dumps(measure(arguments.form, arguments)))
        return
    results = {}
    for form in arguments.forms.split(","):
        command = [sys.executable, __file__, *sys.argv[1:], "--form", form]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(
                f"{form:>8}  ended with {done.returncode}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
            )
            continue
        results[form] = json.loads(done.stdout)
        peak, seconds, loss = (results[form][name] for name in ("peak_bytes", "seconds", "loss"))
        print(f"{form:>8}  {peak / 1e9:6.2f} GB above its inputs  {seconds:6.1f} s  loss {loss:.5f}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
