"""The training loop: one generator, one page. It prints nothing; whoever drives it reads StepReports."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fbiedge.errors import DivergedError

from .checkpoint import load_state, save_model, save_state
from .config import TrainConfig
from .data import Batches
from .loss import Losses, head_losses
from .model import Llama


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one optimizer step did. Losses in nats per token; `eval_loss` only on evaluation steps."""

    step: int  # steps done, this one included
    loss: float
    one_hot_loss: float
    distillation_loss: float | None  # None without a teacher
    learning_rate: float
    grad_norm: float  # before clipping
    tokens: int  # seen since the run began
    tokens_per_second: float  # of this step, teacher included, evaluation and saving not
    eval_loss: float | None = None


def train(
    run: Path,
    model: Llama,
    teacher: Llama | None,
    batches: Batches,
    held_out: Batches,
    config: TrainConfig,
    files: Mapping[str, str],
    resume: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[StepReport]:
    """Train `model` against `teacher` (distillation) or against the next token (no teacher), yielding after each step.

    Writes RUN/state.pt and RUN/model every `checkpoint_every` steps, at the end, and when `stop()` ends the run after
    a step. Raises DivergedError.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )
    # Shapes never change during a run, so each graph is compiled once; measured 1.5x on two cores.
    features = torch.compile(model.features) if config.compile else model.features
    guide = None if teacher is None else torch.compile(teacher.features) if config.compile else teacher.features
    first = load_state(run, model, optimizer) if resume else 0
    tokens_per_step = config.batch_size * config.sequence_length
    for step in range(first, config.steps):
        started = time.perf_counter()
        ids, targets = (torch.from_numpy(array) for array in batches.batch(step))
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
            guided = None
            if teacher is not None and guide is not None:
                with torch.no_grad():
                    guided = guide(ids), teacher.lm_head.weight
            losses = head_losses(
                features(ids), model.lm_head.weight, targets, teacher=guided, one_hot_share=config.one_hot_share,
                chunk=config.loss_chunk,
            )  # fmt: skip
        loss = losses.loss
        loss.backward()  # type: ignore[no-untyped-call]
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        if not math.isfinite(loss.item()) or not math.isfinite(grad_norm.item()):
            raise DivergedError(
                f"step {step + 1}: loss {loss.item()}, gradient norm {grad_norm.item()}; "
                f"the last saved state in {run} is intact, start again with a lower learning rate"
            )
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate_at(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - started
        done = step + 1
        last = done == config.steps
        eval_loss = evaluate(features, model, held_out, config) if last or done % config.eval_every == 0 else None
        stopping = stop()
        if last or stopping or done % config.checkpoint_every == 0:
            save_state(run, model, optimizer, done)
            save_model(model, run / "model", files)
        yield StepReport(
            step=done,
            loss=loss.item(),
            one_hot_loss=losses.one_hot.item(),
            distillation_loss=None if losses.distillation is None else losses.distillation.item(),
            learning_rate=config.learning_rate_at(step),
            grad_norm=grad_norm.item(),
            tokens=done * tokens_per_step,
            tokens_per_second=tokens_per_step / seconds,
            eval_loss=eval_loss,
        )
        if stopping:
            return


@torch.no_grad()
def evaluate(features: Callable[[Tensor], Tensor], model: Llama, held_out: Batches, config: TrainConfig) -> float:
    """Mean next-token loss in nats over `eval_sequences` windows of the held-out shard, always the same ones."""
    losses: list[Losses] = []
    for step in range(-(-config.eval_sequences // held_out.batch_size)):
        ids, targets = (torch.from_numpy(array) for array in held_out.batch(step))
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
            losses.append(head_losses(features(ids), model.lm_head.weight, targets, chunk=config.loss_chunk))
    return torch.stack([loss.one_hot for loss in losses]).mean().item()
