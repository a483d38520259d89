"""The training loop: one generator, one page. It prints nothing; whoever drives it reads StepReports."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fbiedge.errors import DivergedError

from .checkpoint import save_model
from .config import TrainConfig
from .data import Batches
from .divergence import LossWatch
from .flops import peak_flops, step_flops
from .layers import LayerReport, LayerWatch
from .loss import Losses, head_losses
from .model import DecoderLayer, Llama
from .parallel import Model, Team, decoder_layers, freeze, place, spoken_by_first, spread, team
from .quantized_head import quantized
from .state import RunState
from .teacher_cache import CachedTeacher, forget_answers

LOG_EVERY = 10  # steps


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
    mfu: float | None = None  # model FLOPs by the peak of all devices, see flops.py; None where that isn't known
    layers: tuple[LayerReport, ...] | None = None  # on logged steps of a binary model

    @property
    def flip_flop(self) -> float | None:
        """The share of all binary weights whose sign the step changed: layers have equally many."""
        return None if not self.layers else sum(layer.flip_flop for layer in self.layers) / len(self.layers)


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
    log_every: int = LOG_EVERY,
    peak_tflops: float | None = None,
) -> Iterator[StepReport]:
    """Train `model` against `teacher` (distillation) or against the next token (no teacher), yielding after each step.

    log_every: on these steps, and where it evaluates, layers are looked at. peak_tflops: of one device, for `mfu`.

    Writes RUN/state and RUN/model every `checkpoint_every` steps, at the end, and when `stop()` ends the run after a
    step. Of several processes (see parallel.py) each calls this with the same arguments and gets the same reports.
    Raises DivergedError, OutputError.
    """
    here = team()
    tokens_per_step = config.batch_size * config.sequence_length
    taught = None if config.cache_teacher else teacher  # a cached one works in the first epoch alone
    flops = step_flops(model, taught, config.batch_size, config.sequence_length)
    peak = peak_flops(here.device, config.bf16, peak_tflops)
    objective = Objective(here, model, teacher, config)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )
    watch = LossWatch(config.loss_jump, config.loss_jump_steps)
    state = RunState(run, model, optimizer, watch, here, config.async_checkpoint)
    layers = LayerWatch(model, here)
    if not resume:
        state.forget()
    first = state.load()
    if not resume or first >= config.steps:
        forget_answers(run / "teacher", here)
    if first >= config.steps:  # all done, but perhaps it was killed between the last state and its model
        save_model(model, run / "model", files)
    elif config.cache_teacher:
        objective.cache_teacher(run / "teacher", min(batches.windows, config.steps * config.batch_size))
    for step in range(first, config.steps):
        done = step + 1
        evaluating = done == config.steps or done % config.eval_every == 0
        watching = layers.is_binary and (evaluating or done % log_every == 0)
        started = time.perf_counter()
        parts = objective.backward(batches, step)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        norm = float(grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm)
        loss, one_hot, distillation, stops = here.mean(torch.cat((parts, parts.new_tensor([stop()]))))
        if problem := watch.see(done, loss, norm):
            state.finish()
            if not math.isfinite(loss + norm):
                state.drop(step)  # the loss of that step was a number, what it made of the weights gives none
            if good := state.load():
                save_model(model, run / "model", files)
                advice = f"the state of step {good} is good; go on from it with --resume and a lower --learning-rate"
            else:
                advice = "nothing was saved before; start again with a lower learning rate"
                if here.rank == 0:
                    shutil.rmtree(run / "model", ignore_errors=True)
            raise spoken_by_first(DivergedError(f"{problem}; {advice}"))
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate_at(step)
        if watching:
            layers.before()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if here.device.type == "cuda":
            torch.cuda.synchronize()  # else the clock stops before the optimizer
        seconds = time.perf_counter() - started
        seen = layers.after() if watching else None
        stopping = stops > 0  # anywhere: all stop after the same step
        last = done == config.steps or stopping
        eval_loss = objective.evaluate(held_out) if evaluating else None
        if last or (done % config.checkpoint_every == 0 and watch.is_calm):
            state.save(done)
            if last:
                state.finish()
            if last or not config.async_checkpoint:
                save_model(model, run / "model", files)
        if done == config.steps:
            forget_answers(run / "teacher", here)
        yield StepReport(
            step=done,
            loss=loss,
            one_hot_loss=one_hot,
            distillation_loss=distillation if teacher is not None else None,
            learning_rate=config.learning_rate_at(step),
            grad_norm=norm,
            tokens=done * tokens_per_step,
            tokens_per_second=tokens_per_step / seconds,
            eval_loss=eval_loss,
            mfu=None if peak is None else flops / seconds / (peak * here.size),
            layers=seen,
        )
        if stopping:
            return


class Objective:
    """The loss of a batch whose rows all processes share, and its gradients. Prepares both models for it, in place."""

    def __init__(self, here: Team, model: Llama, teacher: Llama | None, config: TrainConfig) -> None:
        self.here, self.config = here, config
        self.rows = here.rows(config.batch_size)
        model.model.embed_tokens.precision = config.embedding
        self.model = place(ready(model, config), here)
        self.teacher: nn.Module | CachedTeacher | None = None
        if teacher is not None:
            self.teacher = place(ready(freeze(teacher, config.bf16), config), here)

    def cache_teacher(self, folder: Path, windows: int) -> None:
        """Ask the teacher, if there is one, about each of `windows` once, and keep its answers in `folder`."""
        length, bf16 = self.config.sequence_length, self.config.bf16
        if self.teacher is not None:
            self.teacher = CachedTeacher(self.teacher, folder, self.here, length=length, windows=windows, bf16=bf16)

    def backward(self, batches: Batches, step: int) -> Tensor:
        """Add up the gradients of one batch; returns this process's share of loss, one-hot and distillation, fp64 [3].

        Shares and micro batches are means over equally long sequences, so that their means weighted by their rows, and
        the mean over processes that gradients get from FSDP, are those of the whole batch. Each micro batch's gradients
        are reduced at once: kept until the last, they would take the memory of a whole model, which is what's short.
        """
        total = torch.zeros(3, dtype=torch.float64, device=self.here.device)
        for share, ids, targets in self._micro_batches(batches, step):
            losses = self._losses(ids, targets, self.teacher)
            (losses.loss * share).backward()  # type: ignore[no-untyped-call]
            distillation = losses.one_hot if losses.distillation is None else losses.distillation
            total += share * torch.stack((losses.loss, losses.one_hot, distillation)).detach()
        return total

    @torch.no_grad()
    def evaluate(self, held_out: Batches) -> float:
        """Mean next-token loss in nats over `eval_sequences` windows of the held-out shard, always the same ones."""
        steps = -(-self.config.eval_sequences // held_out.batch_size)
        losses = [
            share * self._losses(ids, targets, None).one_hot
            for step in range(steps)
            for share, ids, targets in self._micro_batches(held_out, step)
        ]
        spread(self.model)
        return self.here.mean((torch.stack(losses).double().sum() / steps)[None])[0]

    def _losses(self, ids: Tensor, targets: Tensor, teacher: Any) -> Losses:
        with torch.autocast(self.here.device.type, torch.bfloat16, enabled=self.config.bf16):
            guided = None
            if teacher is not None:
                with torch.no_grad():
                    guided = teacher.features(ids), teacher.lm_head.weight
            features = self.model.features(ids)  # gathers the head too
            return head_losses(
                features, quantized(self.model.lm_head.weight, self.config.head), targets, teacher=guided,
                one_hot_share=self.config.one_hot_share, chunk=self.config.loss_chunk,
            )  # fmt: skip

    def _micro_batches(self, batches: Batches, step: int) -> Iterator[tuple[float, Tensor, Tensor]]:
        """This process's rows of a batch in parts, each with its share of those rows."""
        ids, targets = (torch.from_numpy(rows).to(self.here.device) for rows in batches.batch(step, self.rows))
        size = self.config.micro_batch_size or len(ids)
        for part in range(0, len(ids), size):
            rows = slice(part, part + size)
            yield len(ids[rows]) / len(ids), ids[rows], targets[rows]


def ready(model: Model, config: TrainConfig) -> Model:
    """Set how `model`'s layers compute. Compiled one by one, they are one graph that all of them use."""
    for layer in decoder_layers(model):
        if isinstance(layer, DecoderLayer):
            layer.recompute = config.activation_checkpointing
        if config.compile:
            computed = "compute" if isinstance(layer, DecoderLayer) else "forward"
            setattr(layer, computed, torch.compile(getattr(layer, computed)))
    return model
