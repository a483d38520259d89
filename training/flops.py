"""Model FLOPs utilisation: the arithmetic that a step's models need, by what the hardware could do in the same time.

Model FLOPs of a step of S sequences of T tokens, a multiplication and an addition being two:

    matrices      2 · N·K for each weight [N, K] and token, the head's included, the embedding's look-up not
    attention     4 · D for each query, each head (of size D) and each key it sees: q·k and the sum of v. Attention is
                  causal, so a query sees (T + 1) / 2 keys on average.
    student       3 times the sum of both: forward, and two products backward for each one forward
    teacher       once the sum of both, by its own shape: forward only; not counted where it is asked in the first epoch
                  alone (--cache-teacher)

What else a step does is not counted, but takes time: recomputing activations, building W_eff, norms, softmax, the loss, the
optimizer. So --activation-checkpointing lowers the number, as the same model is trained no faster.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from .model import Llama

# Dense TFLOP/s in (bf16 with fp32 sums, fp32 without tensor cores, which is PyTorch's default), by the names that drivers
# give: the figures of the vendors' datasheets, half of it where only the one with sparsity is printed. A MIG slice, a
# laptop's or a special market's version has another name and other figures.
PEAKS: dict[str, tuple[float, float]] = {
    r"NVIDIA H200": (989.4, 66.9),  # NVIDIA H200 datasheet, SXM
    r"NVIDIA GH200 \w+( HBM3e)?": (989.4, 66.9),  # NVIDIA GH200 datasheet
    r"NVIDIA H100 80GB HBM3": (989.4, 66.9),  # NVIDIA H100 datasheet: SXM, PCIe
    r"NVIDIA H100 PCIe": (756.0, 51.0),
    r"NVIDIA A100-(SXM4|PCIE|PG509)-[48]0GB|NVIDIA A100 80GB PCIe": (312.0, 19.5),  # NVIDIA A100 datasheet
    r"NVIDIA A30": (165.0, 10.3),  # NVIDIA A30 datasheet
    r"NVIDIA A10": (125.0, 31.2),  # NVIDIA A10 datasheet
    r"NVIDIA A40": (149.7, 37.4),  # NVIDIA A40 datasheet
    r"NVIDIA L40S": (362.0, 91.6),  # NVIDIA L40S datasheet
    r"NVIDIA L4": (121.0, 30.3),  # NVIDIA L4 datasheet
    r"NVIDIA GeForce RTX 3090": (71.0, 35.6),  # NVIDIA GA102 whitepaper, appendix
    r"NVIDIA GeForce RTX 4090": (165.2, 82.6),  # NVIDIA Ada whitepaper, appendix
    r"AMD Instinct MI300X( OAM)?": (1307.4, 163.4),  # AMD MI300X datasheet
}


def step_flops(student: Llama, teacher: nn.Module | None, sequences: int, tokens: int) -> float:
    """Model FLOPs of an optimizer step on `sequences` of `tokens` each: the formula above."""
    each = 3 * _forward(student, tokens) + (0 if teacher is None else _forward(teacher, tokens))
    return each * sequences * tokens


def peak_flops(device: torch.device, bf16: bool, given: float | None) -> float | None:
    """FLOP/s that one device can do: `given` in TFLOP/s, else what is known of it; None for a device not in PEAKS."""
    if given is not None:
        return given * 1e12
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    for pattern, (in_bf16, in_fp32) in PEAKS.items():
        if re.fullmatch(pattern, name):
            return (in_bf16 if bf16 else in_fp32) * 1e12
    return None


def _forward(model: nn.Module, tokens: int) -> float:
    """FLOPs of one token's way through `model`, on average over a sequence of `tokens`."""
    config: Any
    if isinstance(model, Llama):
        config = model.config
        matrices = config.num_hidden_layers * sum(n * k for n, k in config.linear_shapes().values())
        matrices += config.vocab_size * config.hidden_size
        head_dim = config.head_dim
    else:  # a teacher of the transformers library: all its matrices but those that are only looked up
        foreign: Any = model
        config = foreign.body.config.get_text_config()
        looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        looked_up.discard(id(foreign.lm_head.weight))  # where the two are tied
        matrices = sum(p.numel() for p in model.parameters() if p.ndim > 1 and id(p) not in looked_up)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = (tokens + 1) / 2
    attention = config.num_hidden_layers * config.num_attention_heads * head_dim * keys
    return float(2 * matrices + 4 * attention)
