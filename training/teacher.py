"""The teacher: a frozen full-precision causal language model, from a folder or by its name on the Hugging Face hub.

A Llama (ours or anybody's, safetensors or .bin, fp32, fp16 or bf16) becomes our own `Llama`, read tensor by tensor. Any
other architecture is run by the `transformers` library, if its logits are its head times its last hidden state, which
is what the loss needs (loss.py); that is tried out when it is loaded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fbiedge.config import ModelConfig
from fbiedge.errors import CheckpointError, FbiEdgeError, UsageError, printable
from fbiedge.huggingface_engine import hushed
from fbiedge.tensor_store import read_json
from fbiedge.weights import open_checkpoint

from .checkpoint import load_model
from .plan import TeacherDtype

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class TeacherFacts:
    """What can be told without reading its weights."""

    vocab_size: int
    positions: int
    bos: int | None
    eos: int | None
    is_llama: bool  # run by our own code


def find_teacher(name: str) -> Path:
    """The folder of a teacher: `name` itself, or where the hub's files for it were stored. Raises UsageError."""
    if Path(name).is_dir() or not _HUB_NAME.fullmatch(name):
        return Path(name)
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UsageError(
            f"no folder {name}; to get it from the Hugging Face hub: pip install 'fbiedge[data]'"
        ) from error
    described = ["*.json", "*.jinja"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=[*described, "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*described, "*.bin"]))
    except Exception as error:  # of the network, the hub and the disk
        raise UsageError(
            f"there is no folder {name}, and the Hugging Face hub didn't give it ({_first_line(error)}); "
            "get the model some other way and name its folder"
        ) from error
    return folder


def teacher_facts(folder: Path) -> TeacherFacts:
    """Raises CheckpointError or UsageError for what can't teach."""
    raw = read_json(folder / "config.json") if folder.is_dir() else {}
    if not raw or _is_llama(raw):
        config = open_checkpoint(folder).config
        config.check_trainable("the teacher")
        return TeacherFacts(
            vocab_size=config.vocab_size, positions=config.max_position_embeddings, bos=config.bos_token_id,
            eos=config.eos_token_id, is_llama=True,
        )  # fmt: skip
    auto = _transformers(folder, raw).AutoConfig
    try:
        config = auto.from_pretrained(folder).get_text_config()
        eos = config.eos_token_id
        return TeacherFacts(
            vocab_size=config.vocab_size, positions=getattr(config, "max_position_embeddings", None) or 1 << 30,
            bos=config.bos_token_id, eos=eos[0] if isinstance(eos, list) else eos, is_llama=False,
        )  # fmt: skip
    except Exception as error:  # of whatever the architecture's own code finds
        raise CheckpointError(f"{folder}: transformers can't read its config.json ({_first_line(error)})") from error


def fitted(model: ModelConfig, teacher: TeacherFacts) -> ModelConfig:
    """A student's config with what it must share with its teacher. Where a teacher has no bos, its eos parts documents."""
    eos = model.eos_token_id if teacher.eos is None else teacher.eos
    bos = eos if teacher.bos is None else teacher.bos
    return replace(model, vocab_size=teacher.vocab_size, bos_token_id=bos, eos_token_id=eos)


def load_teacher(folder: Path, dtype: TeacherDtype, values: bool = True) -> nn.Module:
    """A frozen module with `features(ids)` [B, T, hidden] and `lm_head.weight` [V, hidden].

    Without `values` a Llama is on the meta device, see parallel.py; another architecture isn't, as only its own code knows
    which of its tensors are computed when it is made. Raises CheckpointError or UsageError.
    """
    facts = teacher_facts(folder)
    teacher = load_model(folder, _DTYPES[dtype], values) if facts.is_llama else ForeignTeacher(folder, _DTYPES[dtype])
    return teacher.eval().requires_grad_(False)


class ForeignTeacher(nn.Module):
    """A causal language model of the transformers library."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        super().__init__()
        transformers = _transformers(folder, read_json(folder / "config.json"))
        try:
            with hushed(transformers):
                whole = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        except Exception as error:  # of whatever the architecture's own code finds
            raise CheckpointError(f"{folder}: transformers can't load it ({_first_line(error)})") from error
        self.body: nn.Module = whole.base_model
        self.lm_head: nn.Module = whole.get_output_embeddings()
        with torch.no_grad():
            ids = torch.arange(8)[None]
            expected = whole(input_ids=ids, use_cache=False).logits.float()
            weight = getattr(self.lm_head, "weight", None)
            got = None if weight is None else (self.features(ids) @ weight.T).float()
        if got is None or got.shape != expected.shape or not torch.allclose(got, expected, rtol=2e-2, atol=2e-2):
            raise UsageError(
                f"{folder} ({whole.config.model_type}) computes its logits from more than its last hidden state and its "
                "head; choose a teacher that doesn't (no logit soft-capping or scaling, no bias)"
            )

    def features(self, ids: Tensor) -> Tensor:
        """What the head sees, [B, T, hidden]."""
        out: Tensor = self.body(input_ids=ids, use_cache=False).last_hidden_state
        return out


def _is_llama(raw: dict[str, Any]) -> bool:
    """Whether our own Llama computes it."""
    if raw.get("model_type", "llama") != "llama":
        return False
    try:
        ModelConfig.from_dict(raw).check_trainable("the teacher")
    except FbiEdgeError:
        return False
    return True


def _transformers(folder: Path, raw: dict[str, Any]) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UsageError(
            f"{folder} is a {printable(str(raw.get('model_type')))}; teachers other than Llamas with unscaled RoPE need "
            "transformers: pip install transformers"
        ) from error
    return transformers


def _first_line(error: Exception) -> str:
    return printable(str(error).strip().splitlines()[0]) if str(error).strip() else type(error).__name__
