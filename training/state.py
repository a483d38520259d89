"""RUN/state/STEP: what an exact resume needs, in the form of torch.distributed.checkpoint. Each process writes its part.

    model.NAME, exp_avg.NAME, exp_avg_sq.NAME    each parameter once (shared scales by their first name) and its moments
    step, watch                                  optimizer steps done; what LossWatch remembers

A folder is complete when it holds `.metadata`, which is renamed into place after all data is on the disk, so a kill at
any moment leaves the complete folders that were there. The last two stay. The metadata names the place of each piece of
each tensor, whence any number of processes can read what any other number wrote.
"""

from __future__ import annotations

import pickle
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.distributed.tensor import DTensor, distribute_tensor

from fbiedge.errors import CheckpointError, OutputError

from .divergence import LossWatch
from .model import Llama
from .parallel import Team, agreed, is_first, is_lost_connection

KEPT = 2
warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is nothing to warn of
_COMPLETE = ".metadata"
# All that the metadata, a pickle, may name: places of tensors.
_IN_METADATA = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex",
        "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "float32", "float64", "int64", "bfloat16"},
    "pathlib": {"Path", "PosixPath", "WindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "WindowsPath"},
}  # fmt: skip


def saved_states(run: Path) -> list[Path]:
    """The complete states of a run, oldest first."""
    found = (path for path in (run / "state").glob("[0-9]*") if path.name.isdigit() and (path / _COMPLETE).exists())
    return sorted(found, key=lambda path: int(path.name))


def has_state(run: Path) -> bool:
    """Whether there is something to resume from; RUN/state.pt is the form of earlier versions."""
    return bool(saved_states(run)) or (run / "state.pt").exists()


class RunState:
    """Saves and restores one run. Every process calls the same methods at the same steps."""

    def __init__(
        self,
        run: Path,
        model: Llama,
        optimizer: torch.optim.Optimizer,
        watch: LossWatch,
        team: Team,
        in_background: bool = False,
    ) -> None:
        self.run, self.model, self.optimizer, self.watch, self.team = run, model, optimizer, watch, team
        self.in_background = in_background
        self._group = dist.new_group(backend="gloo") if in_background and team.size > 1 else None
        self._pending: tuple[Path, Future[Any]] | None = None

    def save(self, step: int) -> None:
        """Write RUN/state/STEP; in the background, only the copy to memory is waited for. Raises OutputError."""
        self.finish()
        folder = self.run / "state" / f"{step:08}"
        self._as_one(folder, lambda: self._clear(lambda path: not (path / _COMPLETE).exists() or path == folder))
        tensors: dict[str, Any] = {**self._tensors(), "step": torch.tensor(step), "watch": self.watch.state()}
        writer = _Writer(folder)
        if self.in_background:
            future = async_save(tensors, storage_writer=writer, process_group=self._group, no_dist=self.team.size == 1)
            assert isinstance(future, Future)
            self._pending = folder, future
        else:
            self._as_one(folder, lambda: save(tensors, storage_writer=writer, no_dist=self.team.size == 1))
            self._retire()

    def finish(self) -> None:
        """Wait for what is being written in the background. Raises OutputError where that failed."""
        if self._pending is not None:
            folder, future = self._pending
            self._pending = None
            self._as_one(folder, future.result)
            self._retire()

    def drop(self, step: int) -> None:
        """Remove the state of that step, if there is one."""
        self._as_one(self.run / "state", lambda: self._clear(lambda path: int(path.name) == step))

    def forget(self) -> None:
        """Remove all states: the run starts over."""
        self._as_one(self.run / "state", lambda: self._clear(lambda _: True))
        self._drop_old_form()

    def load(self) -> int:
        """Restore from the newest state; returns the steps done, 0 where nothing was saved. Raises CheckpointError."""
        states = saved_states(self.run)
        newest = states[-1] if states else self.run / "state.pt"
        if not newest.exists():
            return 0
        with agreed():
            try:
                step = self._load_folder(newest) if states else self._load_old_form(newest)
            except (Exception, CheckpointException) as error:  # a dozen types for a damaged file; all mean the same
                message = f"{newest} can't be resumed: {_reason(error)}"
                if len(states) > 1:
                    message += f"; remove it to go on from step {int(states[-2].name)}"
                raise CheckpointError(message) from error
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                moments = self.optimizer.state[parameter]
                moments["step"] = torch.tensor(float(step), device=self.team.device)  # fused AdamW keeps it there
        return step

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that training changes, by name; the moments are made where there are none yet."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            tensors[f"model.{name}"] = parameter.detach()
            moments = self.optimizer.state[parameter]
            for kind in ("exp_avg", "exp_avg_sq"):
                if kind not in moments:
                    moments[kind] = torch.zeros_like(parameter.detach())
                tensors[f"{kind}.{name}"] = moments[kind]
        return tensors

    def _load_folder(self, folder: Path) -> int:
        step, watch = torch.tensor(0), self.watch.state()
        tensors = {**self._tensors(), "step": step, "watch": watch}
        load(tensors, storage_reader=_TensorsOnly(folder), no_dist=self.team.size == 1)
        self.watch.restore(watch)
        return int(step)

    def _load_old_form(self, file: Path) -> int:
        """state.pt: the state dictionaries of one process, parameters of the optimizer by number."""
        state: dict[str, Any] = torch.load(file, weights_only=True, map_location="cpu", mmap=True)
        tensors = self._tensors()
        for index, (name, _) in enumerate(self.model.named_parameters()):
            _fill(tensors[f"model.{name}"], state["model"][name])
            for kind in ("exp_avg", "exp_avg_sq"):
                _fill(tensors[f"{kind}.{name}"], state["optimizer"]["state"][index][kind])
        return int(state["step"])

    def _retire(self) -> None:
        """Keep the newest states only."""
        kept = saved_states(self.run)[-KEPT:]
        self._as_one(self.run / "state", lambda: self._clear(lambda path: path not in kept))
        if len(kept) == KEPT:
            self._drop_old_form()

    def _clear(self, unwanted: Callable[[Path], bool]) -> None:
        if is_first() and (self.run / "state").is_dir():
            for path in (self.run / "state").iterdir():
                if path.name.isdigit() and unwanted(path):
                    (path / _COMPLETE).unlink(missing_ok=True)  # first, so that half a folder is known as such
                    shutil.rmtree(path)

    def _drop_old_form(self) -> None:
        if is_first():
            (self.run / "state.pt").unlink(missing_ok=True)

    def _as_one(self, folder: Path, work: Callable[[], object]) -> None:
        """Do `work` in all processes; what goes wrong in one is one OutputError in all, and half a folder goes."""
        with agreed():
            try:
                work()
            except (Exception, CheckpointException) as error:
                reason = _reason(error)
                if is_first() and not (folder / _COMPLETE).exists():
                    shutil.rmtree(folder, ignore_errors=True)
                kept = saved_states(self.run)
                rest = f"the state of step {int(kept[-1].name)} is intact" if kept else "there is no earlier state"
                raise OutputError(f"can't write {folder}: {reason}; {rest}") from error


def _reason(error: BaseException) -> str:
    """One line; of errors collected from all processes the first, and what it was raised from."""
    while True:
        if isinstance(error, CheckpointException) and error.failures:
            error = next(iter(error.failures.values()))[0]
        elif error.__cause__ is not None:
            error = error.__cause__
        else:
            break
    if isinstance(error, RuntimeError) and is_lost_connection(error):
        raise error
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error) or repr(error)).splitlines()[0]


def _fill(target: Tensor, whole: Tensor) -> None:
    if whole.shape != target.shape:
        raise ValueError(f"a tensor of shape {tuple(whole.shape)} where {tuple(target.shape)} is expected")
    if isinstance(target, DTensor):  # each process takes its part from its own copy
        whole = distribute_tensor(whole.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(whole)


class _Writer(FileSystemWriter):
    """Names the operating system's reason, which torch.save buries under its own and no other process would hear of."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            buried = error.__context__
            while buried is not None and not isinstance(buried, OSError):
                buried = buried.__context__
            if buried is None:
                raise
            raise OSError(buried.errno, buried.strerror) from error


class _TensorsOnly(FileSystemReader):
    """Reads states whose metadata, a pickle, names nothing but places of tensors: whoever sends a run sends no code."""

    def read_metadata(self, *_args: Any, **_options: Any) -> Metadata:
        with open(Path(self.path) / _COMPLETE, "rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError("the metadata is of another kind")
        metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _IN_METADATA.get(module, ()):
            raise pickle.UnpicklingError(f"the metadata asks for {module}.{name}")
        return super().find_class(module, name)
