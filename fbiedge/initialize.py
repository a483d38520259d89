"""A random checkpoint of a given shape in the official form, for tests and benchmarks: `fbiedge init --preset NAME -o DIR`.

Latent weights, embeddings and head are normal(0, 0.02) and norms are 1. Scales are initialised as FBI-LLM does ("xnor"):

    beta  = mean of W over the axes that share it            alpha = mean of |W - beta| over the same axes
    block has no beta: alpha = mean of |W| over each group of 128 inputs of an output row

Each tensor depends on (seed, its name) alone, so any of them can be made again without the others. One tensor is made
at a time; the peak is one shard of the writer plus the largest tensor and its bits of workspace.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from .config import BLOCK_SIZE, ModelConfig, ScalingPattern
from .errors import UsageError
from .weights import expected_shapes, write_checkpoint

STANDARD_DEVIATION = 0.02
BYTE_TOKENIZER_SIZE = 259  # <unk>, <s>, </s> and the 256 bytes
Dtype = Literal["float32", "bfloat16"]


def init_checkpoint(
    config: ModelConfig,
    out: Path,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    *,
    dtype: Dtype | None = None,
) -> None:
    """Write a random checkpoint of `config` to the folder `out`.

    `progress(done, total)` is called after each tensor. `dtype` is how matrices are stored: by default float32 up to
    hidden size 1024 and bfloat16 above, which halves the 27 GB of a 7B; scales and norms are always float32. A byte-level
    tokenizer comes along where the vocabulary has room for it. Raises OutputError and, for an unknown dtype, UsageError.
    """
    dtype = dtype or ("float32" if config.hidden_size <= 1024 else "bfloat16")
    if dtype not in ("float32", "bfloat16"):
        raise UsageError(f"unknown dtype {dtype!r}; expected float32 or bfloat16")
    write_checkpoint(out, config, _tensors(config, seed, dtype, progress), _files(config))


def xnor_scales(
    weight: npt.NDArray[np.float32], pattern: ScalingPattern
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32] | None]:
    """Initial (wscale, wbias) of a latent weight [N, K] in their official shapes; no wbias for `block`."""
    n, k = weight.shape
    if pattern == "block":
        starts = np.arange(0, k, BLOCK_SIZE)
        sizes = np.diff(starts, append=k)
        return (np.add.reduceat(np.abs(weight), starts, axis=1) / sizes).astype(np.float32), None
    axis = {"column": 0, "row": 1, "single": None}[pattern]
    shape = {"column": (1, k), "row": (n, 1), "single": (1,)}[pattern]
    beta = weight.mean(axis=axis, keepdims=True, dtype=np.float32)
    deviation = weight - beta
    alpha = np.abs(deviation, out=deviation).mean(axis=axis, dtype=np.float32)
    return alpha.reshape(shape), beta.reshape(shape)


def _tensors(
    config: ModelConfig, seed: int, dtype: Dtype, progress: Callable[[int, int], None] | None
) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    shapes = expected_shapes(config)
    scales: dict[str, npt.NDArray[np.float32] | None] = {}
    for done, (name, shape) in enumerate(shapes.items(), start=1):
        if name in scales:
            yield name, cast(npt.NDArray[np.float32], scales.pop(name))
        elif len(shape) == 1:
            yield name, np.ones(shape, np.float32)
        else:
            weight = _stored(_normal(shape, seed, name), dtype)
            stem = name.removesuffix("weight")
            if f"{stem}wscale" in shapes:  # the scales follow their weight and must fit what is stored
                values = weight.astype(np.float32, copy=False)
                scales[f"{stem}wscale"], scales[f"{stem}wbias"] = xnor_scales(values, config.scaling_pattern)
                del values
            yield name, weight
        if progress is not None:
            progress(done, len(shapes))


def _normal(shape: tuple[int, ...], seed: int, name: str) -> npt.NDArray[np.float32]:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = np.random.Generator(np.random.SFC64(int.from_bytes(digest[:16], "little")))
    values = generator.standard_normal(shape, dtype=np.float32)
    values *= np.float32(STANDARD_DEVIATION)
    return values


def _stored(values: npt.NDArray[np.float32], dtype: Dtype) -> npt.NDArray[Any]:
    if dtype == "float32":
        return values
    try:
        import ml_dtypes
    except ImportError as error:
        raise UsageError("bfloat16 needs ml_dtypes, which is not installed: pip install 'fbiedge[export]'") from error
    return values.astype(ml_dtypes.bfloat16)


def _files(config: ModelConfig) -> dict[str, str]:
    specials = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    files = {"generation_config.json": json.dumps(specials, indent=2)}
    if config.vocab_size >= BYTE_TOKENIZER_SIZE:
        files["tokenizer.json"] = byte_tokenizer()
        files["tokenizer_config.json"] = json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "unk_token": "<unk>",
                "bos_token": "<s>",
                "eos_token": "</s>",
                "model_max_length": config.max_position_embeddings,
            },
            indent=2,
        )
    return files


def byte_tokenizer() -> str:
    """tokenizer.json of the plainest tokenizer: <unk> 0, <s> 1, </s> 2, then one token a byte; <s> opens a text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    symbols = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, [], unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken(symbol, special=True, normalized=False) for symbol in symbols[:3]])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    text: str = tokenizer.to_str(pretty=True)
    return text
