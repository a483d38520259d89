"""Any other causal language model of Hugging Face, through transformers in float32: for measuring it beside ours.

What the numpy reference knows (Llama, Qwen3) it runs itself, so that transformers is needed for the rest only. Code that
a folder brings along is never run.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from .config import ModelType
from .errors import CheckpointError, UsageError, printable
from .tensor_store import read_json
from .tokenizer import Tokenizer


def unknown_architecture(path: Path) -> str | None:
    """The model type of the checkpoint folder `path` where the numpy reference has no formulas for it.

    Raises CheckpointError.
    """
    raw = read_json(path / "config.json")
    model_type = raw.get("model_type", "llama")
    biased = raw.get("attention_bias") or raw.get("mlp_bias") or raw.get("use_sliding_window")
    if model_type not in get_args(ModelType) or biased or raw.get("hidden_act", "silu") != "silu":
        return str(model_type)
    return None


class HuggingFaceLogits:
    """LogitEngine of a folder that AutoModelForCausalLM opens."""

    warning = None

    def __init__(self, path: Path, model_type: str, *, tokens: int, threads: int | None) -> None:
        """Raises CheckpointError, ModelFileError for an unusable tokenizer, UsageError where transformers is missing."""
        try:
            import torch
            import transformers
        except ModuleNotFoundError as error:
            raise UsageError(
                f"{path} is of the type {printable(model_type)}, which needs transformers and torch to run; {error.name} "
                "isn't installed: pip install transformers torch"
            ) from error
        self._torch = torch
        if threads is not None:
            torch.set_num_threads(threads)
        auto: Any = transformers.AutoModelForCausalLM
        with hushed(transformers), _as_checkpoint_error(path):
            self._model, loading = auto.from_pretrained(
                path, dtype=torch.float32, local_files_only=True, trust_remote_code=False, output_loading_info=True
            )
        wrong = [*loading["missing_keys"], *(name for name in loading["unexpected_keys"] if name.endswith("wscale"))]
        if wrong:  # transformers would compute with random weights, or with latent ones
            raise CheckpointError(
                f"{path}: {printable(min(map(str, wrong)))} is no tensor that a {printable(model_type)} in this "
                "folder can do with or without; only Llama and Qwen3 may be binary"
            )
        self._model.eval()
        with _as_checkpoint_error(path):
            config = self._model.config.get_text_config()
            self.vocab_size = int(config.vocab_size)
            self.capacity = min(tokens, int(getattr(config, "max_position_embeddings", None) or tokens))
        self.path = path
        self.description = f"transformers {transformers.__version__}, {model_type}, fp32"
        self.tokenizer = _tokenizer(path, transformers)
        self._refuse_foresight()

    def reset(self) -> None:
        """See LogitEngine."""
        self._cache: Any = None  # stays None for a kind of model that shows none: it reads all its tokens each time
        self._tokens: list[int] = []

    def _refuse_foresight(self) -> None:
        """Raises CheckpointError for a model whose logits depend on what follows, as BERT's do: they predict nothing."""
        with _as_checkpoint_error(self.path):
            self.reset()
            alone = self.logits([0])[0]
            self.reset()
            followed = self.logits([0, 1])[0]
            self.reset()
        if np.abs(alone - followed).max() > 1e-3 * np.abs(alone).max():
            raise CheckpointError(f"{self.path} looks at what follows a token; expected a causal language model")

    def truncate(self, length: int) -> None:
        """See LogitEngine."""
        if length == len(self._tokens):
            return
        del self._tokens[length:]
        try:
            self._cache.crop(length)
            cropped = length > 0 and self._cache.get_seq_length() == length  # crop(0) leaves all
        except (AttributeError, NotImplementedError, RuntimeError, ValueError):
            cropped = False  # there is no cache, or one that can't go back, or a window that slid
        if not cropped:
            self._cache = None  # the next call reads all tokens again

    def feed(self, ids: Sequence[int]) -> None:
        """See LogitEngine."""
        self.logits(ids)

    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """See LogitEngine."""
        self._tokens.extend(ids)
        fed = self._tokens if self._cache is None else list(ids)
        past = {} if self._cache is None else {"past_key_values": self._cache}
        with self._torch.no_grad():
            output = self._model(self._torch.tensor([fed]), use_cache=True, **past)
        self._cache = getattr(output, "past_key_values", None)
        rows: npt.NDArray[np.float32] = output.logits[0, -len(ids) :].float().numpy()
        return rows


def _tokenizer(path: Path, transformers: Any) -> Tokenizer | None:
    """That of tokenizer.json, else what transformers makes of other files; None where there are none."""
    from .engines import tokenizer_of
    from .weights import read_sidecars

    if (found := tokenizer_of(read_sidecars(path))) is not None:
        return found
    try:
        with hushed(transformers):
            other = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        if set(other.get_vocab()) <= set(other.all_special_tokens):
            return None  # what transformers makes where there are no files at all
        special = {name: getattr(other, name) for name in ("bos_token", "eos_token")}
        return Tokenizer(other.backend_tokenizer.to_str(), {name: text for name, text in special.items() if text})
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        ImportError,
    ):  # the caller says that there is none
        return None


@contextlib.contextmanager
def _as_checkpoint_error(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of a dozen libraries below
        why = printable(next(iter(str(error).strip().splitlines()), type(error).__name__))
        raise CheckpointError(f"transformers can't open {path}: {why}") from error


@contextlib.contextmanager
def hushed(transformers: Any) -> Iterator[None]:
    """Without the bars, reports and warnings that transformers and torch print; what matters in them is checked here."""
    logging_ = transformers.utils.logging
    before = logging_.get_verbosity(), logging_.is_progress_bar_enabled()
    logging_.set_verbosity(logging.CRITICAL)
    logging_.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging_.set_verbosity(before[0])
        if before[1]:
            logging_.enable_progress_bar()
