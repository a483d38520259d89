"""One training on many processes: who they are, how they share a model, and how they agree.

A process learns its place from the environment that torchrun or Slurm sets (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR,
MASTER_PORT). Without WORLD_SIZE there is one process, nothing here communicates, and a model stays an ordinary module.
Otherwise each decoder layer's parameters are spread over all processes (FSDP2) and gathered only while it computes. Only
process 0 makes or reads a Llama; the others have one on the meta device, whose parts get their values when it is placed.

Processes wait for each other at every step, so none may leave alone: what fails in one is raised in all (`agreed`).
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from fbiedge.errors import ElsewhereError, FbiEdgeError, UsageError

from .model import BinaryLinear, Llama

# Tokenising a corpus takes one process hours, while the others wait; should it die, they hear of it at once.
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True, kw_only=True)
class Team:
    """The processes of this training, seen from one of them."""

    rank: int
    size: int
    device: torch.device

    def rows(self, batch_size: int) -> slice:
        """This process's rows of a batch. Raises UsageError where they can't be shared out evenly."""
        if batch_size % self.size:
            raise UsageError(
                f"a batch of {batch_size} sequences can't be shared by {self.size} processes; make it a multiple of that"
            )
        share = batch_size // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def mean(self, values: Tensor) -> list[float]:
        """The mean over all processes of each entry of fp64 `values`, the same everywhere."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return [float(value) for value in values.tolist()]

    def wait(self) -> None:
        """Until all processes are here."""
        self.mean(torch.zeros(1, dtype=torch.float64, device=self.device))


def team() -> Team:
    """The processes that `joined` brought together; else this process alone, on an accelerator where there is one."""
    cuda = torch.cuda.is_available()
    if not dist.is_initialized():
        return Team(rank=0, size=1, device=torch.device("cuda" if cuda else "cpu"))
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    return Team(rank=dist.get_rank(), size=dist.get_world_size(), device=device)


def is_first() -> bool:
    """Whether this process prints and writes what is written once."""
    return not dist.is_initialized() or dist.get_rank() == 0


def _is_alone() -> bool:
    """Whether the launch has one process."""
    return int(os.environ.get("WORLD_SIZE", "1")) == 1


@contextmanager
def joined() -> Iterator[None]:
    """Meet the other processes of the launch, and part from them; nothing to do for one process.

    Inside, an error that process 0 reports ends this one silently, and a connection that breaks becomes a FbiEdgeError.
    """
    if _is_alone():
        yield
        return
    if cuda := torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        # gloo beside nccl: errors, stops and checkpoints are agreed between the hosts.
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        yield
        team().wait()
        # The first process to exit with a code of its own makes torchrun end the others, who are about to do the same.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        dist.destroy_process_group()
    except ElsewhereError as error:
        raise SystemExit(error.exit_code) from error
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        raise lost_connection(error) from error


def leave(code: int) -> NoReturn:
    """End this process with `code`; where it was one of many, without taking the interpreter apart.

    gloo's threads outlive their groups, and no call ends them. One that lets go of a tensor while the interpreter is taken
    apart aborts the process, with SIGABRT's exit code (PyTorch 2.13; 6 of 180 launches on a busy machine, made likely by a
    main thread that doesn't give way). What must be closed at the end is closed before this.
    """
    if _is_alone():
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # the reader has gone
            stream.flush()
    os._exit(code)


def lost_connection(error: BaseException) -> FbiEdgeError:
    """What this process can say when another one is gone."""
    place = f"process {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')}"
    reason = str(error).splitlines()[0].rpartition("] ")[2].rstrip(". ")
    return FbiEdgeError(
        f"{place} ends, because another one ended or can't be reached ({reason}); see that one's message, then add "
        "--resume to go on from the last checkpoint"
    )


def is_lost_connection(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def spoken_by_first(error: FbiEdgeError) -> FbiEdgeError:
    """`error`, which all processes are about to raise, in the form in which one line is printed."""
    return error if is_first() else ElsewhereError(str(error))


@contextmanager
def agreed(hours: bool = False) -> Iterator[None]:
    """All processes leave the block together; a FbiEdgeError in any of them is raised in all.

    hours: one of them may be at work that long, such as process 0 preparing a run (`if is_first()`).
    """
    if not dist.is_initialized():
        yield
        return
    group = dist.new_group(backend="gloo", timeout=_PATIENCE) if hours else None
    mine: FbiEdgeError | None = None
    try:
        yield
    except FbiEdgeError as error:
        mine = error
    errors: list[FbiEdgeError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, mine, group=group)
    if hours:
        dist.destroy_process_group(group)
    for theirs in errors:
        if theirs is not None:
            raise spoken_by_first(theirs) from mine


Model = TypeVar("Model", bound=nn.Module)


def place(model: Model, where: Team) -> Model:
    """Move `model` to the team's devices, in place: whole for one process, else spread over all, layer by layer.

    Of a Llama, the values of process 0 are spread; in the others one layer at a time is whole.

    Gathered parameters and reduced gradients are fp32; autocast rounds operands to bf16 in each product, just as in one
    process. A gather in bf16 would halve the traffic, but round scales and embeddings that one process doesn't round.
    """
    if where.size == 1:
        return model.to(where.device)
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(where.device.type, (where.size,))
    # What remains after the layers, embedding, last norm and head, is gathered by `features` and stays for the loss.
    for part in (*decoder_layers(model), model):
        if isinstance(model, Llama):
            _bring_values(part)
        fully_shard(part, mesh=mesh)
    register_fsdp_forward_method(model, "features")
    return model


@torch.no_grad()
def _bring_values(module: nn.Module) -> None:
    """Give all of `module` that isn't spread yet the values of process 0; what is one parameter stays one."""
    brought: dict[Tensor, Tensor] = {}
    for part in module.modules():
        held: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
        for tensors in held:
            for name, tensor in tensors.items():
                if tensor is None or isinstance(tensor, DTensor):
                    continue
                if tensor not in brought:
                    values = torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor.detach()
                    dist.broadcast(values, src=0)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    brought[tensor] = nn.Parameter(values, tensor.requires_grad) if is_parameter else values
                if tensor.is_meta:
                    tensors[name] = brought[tensor]


def spread(model: nn.Module) -> None:
    """Undo what a forward without a backward leaves gathered: only spread parameters are those the optimizer knows."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule):
        model.reshard()


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The longest list of modules in it, which of a causal language model are its layers."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=nn.ModuleList())


def freeze(teacher: Model, bf16: bool) -> Model:
    """Make `teacher` as small as it computes, in place: no gradients, and our own's products' weights in bf16 already.

    Autocast would round the same weights at every step, so nothing changes but time and memory. A binary teacher's
    linears become ordinary ones with its W_eff, once.
    """
    teacher.eval().requires_grad_(False)
    if not isinstance(teacher, Llama):
        return teacher
    for module in list(teacher.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, BinaryLinear):
                dense = child.effective_weight()  # [N, K]
                child = nn.Linear(dense.shape[1], dense.shape[0], bias=False, device="meta")
                child.weight = nn.Parameter(dense, requires_grad=False)
                setattr(module, name, child)
            tied = child is teacher.lm_head and teacher.config.tie_word_embeddings
            if bf16 and isinstance(child, nn.Linear) and not tied:
                child.to(torch.bfloat16)
    return teacher


def whole(tensor: Tensor) -> Tensor:
    """`tensor` with all its parts, on the CPU; all processes must call this together."""
    full = tensor.detach()
    return (full.full_tensor() if isinstance(full, DTensor) else full).cpu()
