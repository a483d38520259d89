"""Read tensors by name from a checkpoint folder: safetensors (one file or shards) or PyTorch's .bin files.

A store is opened from the headers alone; `read` then brings one tensor into memory. Pickles are only ever read by
torch's weights-only loader, which refuses anything but tensors and plain containers.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .errors import CheckpointError

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")


class TensorStore(Protocol):
    """Tensors by name, read one at a time."""

    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> npt.NDArray[np.float32]:
        """The tensor `name` as float32, in memory of its own. Raises CheckpointError."""
        ...


def open_store(folder: Path) -> TensorStore:
    """The store of `folder`: model.safetensors, else its sharded form, else pytorch_model*.bin. Raises CheckpointError."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        files = _files_of(folder, stem, suffix)
        if files:
            return SafetensorsStore(files) if suffix == "safetensors" else TorchStore(files)
    raise CheckpointError(
        f"{folder} holds no weights; expected model.safetensors, model.safetensors.index.json or pytorch_model.bin"
    )


class SafetensorsStore:
    """Tensors of safetensors files. Each read opens its file anew, so that no mapping keeps read pages resident."""

    def __init__(self, files: dict[Path, set[str] | None]) -> None:
        """`files`: each file with the names the index promises in it (None where there is no index)."""
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._file_of: dict[str, Path] = {}
        for path, promised in files.items():
            with _SafeFile(path) as opened:
                for name in _checked_names(path, list(opened.keys()), promised, self.shapes):
                    header = opened.get_slice(name)
                    if header.get_dtype() not in FLOAT_DTYPES:
                        raise CheckpointError(
                            f"{path.name}: tensor {name} has dtype {header.get_dtype()}, expected one of "
                            f"{', '.join(FLOAT_DTYPES)}"
                        )
                    self.shapes[name] = tuple(header.get_shape())
                    self._file_of[name] = path

    def read(self, name: str) -> npt.NDArray[np.float32]:
        """The tensor `name` as float32. Raises CheckpointError."""
        path = self._file_of[name]
        with _SafeFile(path) as opened:
            try:
                tensor = opened.get_tensor(name)
            except Exception as error:
                raise CheckpointError(f"{path.name}: can't read the tensor {name} ({error})") from error
        return np.asarray(tensor, dtype=np.float32)


class TorchStore:
    """Tensors of PyTorch .bin files, mapped into memory where the file is of the zip form (torch >= 1.6)."""

    def __init__(self, files: dict[Path, set[str] | None]) -> None:
        """`files` as for SafetensorsStore."""
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._tensors: dict[str, Any] = {}
        for path, promised in files.items():
            state = _load_weights_only(path)
            for name in _checked_names(path, list(state), promised, self.shapes):
                self.shapes[name] = tuple(state[name].shape)
                self._tensors[name] = state[name]

    def read(self, name: str) -> npt.NDArray[np.float32]:
        """The tensor `name` as float32. Raises CheckpointError."""
        tensor: npt.NDArray[np.float32] = self._tensors[name].detach().float().clone().numpy()
        return tensor


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises CheckpointError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; expected a checkpoint folder with config.json and weights") from None
    except OSError as error:
        raise CheckpointError(f"can't read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}, expected an object")
    return content


def _files_of(folder: Path, stem: str, suffix: str) -> dict[Path, set[str] | None]:
    """Files of one format, each with the names its index promises. Empty where the folder has none."""
    single, index = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
    if single.exists():
        return {single: None}
    if not index.exists():
        return {}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; expected an object of tensor name -> file name")
    files: dict[Path, set[str] | None] = {}
    promised: dict[str, set[str]] = {}
    for name, file_name in weight_map.items():
        # An index comes from elsewhere: it must not be able to name files outside its folder.
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise CheckpointError(f"{index.name}: {file_name!r} is not a plain file name")
        promised.setdefault(file_name, set()).add(name)
    for file_name in sorted(promised):
        files[folder / file_name] = promised[file_name]
    return files


def _checked_names(
    path: Path, names: list[str], promised: set[str] | None, known: dict[str, tuple[int, ...]]
) -> list[str]:
    """The names in one file, after checking them against its index and against the files before it."""
    if promised is not None and (absent := sorted(promised - set(names))):
        raise CheckpointError(f"{path.name} lacks {len(absent)} tensor(s) that the index places there: {absent[0]}")
    if twice := sorted(known.keys() & set(names)):
        raise CheckpointError(f"{path.name} holds {twice[0]}, which an earlier shard holds too")
    return names


class _SafeFile:
    """`safetensors.safe_open` with this project's errors; the library checks header, shapes, offsets and file size."""

    def __init__(self, path: Path) -> None:
        try:
            import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
            from safetensors import safe_open
        except ImportError as error:
            raise CheckpointError(
                f"reading {path.name} needs {error.name}, which is not installed: pip install 'fbiedge[export]'"
            ) from error
        try:
            self._opened: Any = safe_open(str(path), framework="np")
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing; the index lists it") from None
        except Exception as error:  # SafetensorError derives from Exception alone
            raise CheckpointError(f"{path} is truncated or not safetensors: {error}") from error

    def __enter__(self) -> Any:
        return self._opened.__enter__()

    def __exit__(self, *exception: object) -> None:
        self._opened.__exit__(*exception)


def _load_weights_only(path: Path) -> dict[str, Any]:
    """The state dict in one .bin file. Raises CheckpointError, also where the pickle holds more than tensors."""
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(
            f"reading {path.name} needs torch, which is not installed: pip install 'fbiedge[train]', "
            "or convert the checkpoint to safetensors"
        ) from error
    try:
        # Only the zip form can be mapped; the older one is read whole.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; the index lists it") from None
    except pickle.UnpicklingError as error:
        # torch's own text is left out: it suggests to load the file without the weights-only guard.
        raise CheckpointError(
            f"{path} is refused: it is damaged, or its pickle holds more than tensors; get it as safetensors"
        ) from error
    except Exception as error:
        raise CheckpointError(f"{path} is truncated or not a PyTorch checkpoint; get it again") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, expected a state dict of tensors by name")
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or tensor.layout != torch.strided:
            raise CheckpointError(f"{path.name}: {name!r} is not a dense tensor of floats")
    return state
