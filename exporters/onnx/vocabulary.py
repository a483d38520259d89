"""The two ends of a model, one row a token: how embedding and head are stored, and that of weights which hold them.

1 bit, as GGUF files may hold either: signs with a scale a row and 128 inputs, in the tiles of all binary matrices. The
head is then a BinaryMatMul like the layers'; the embedding looks its rows up in the tiles (embedding.py).

int8 and int4: blocks of 32 inputs with an fp16 scale (head.py), of both ends in one arithmetic. A tied embedding that is
held as the head is, in 1, 4 or 8 bits, is the head, stored once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fbiedge.bits import TILE_ROWS
from fbiedge.config import BLOCK_SIZE, ModelConfig
from fbiedge.errors import CheckpointError, UsageError
from fbiedge.weights import BinaryLinear, HasBinaryRows, Weights

from .head import BLOCK as HEAD_BLOCK
from .head import GROUP as HEAD_GROUP
from .head import HasQuantizedRows, QuantizedRows, quantize_rows, rows_from_binary, tile_group_bytes
from .options import CODE_BITS, Embedding, ExportOptions, Head
from .sources import DTYPES, Source, TensorSpec, binary_source, plain_source, shaped
from .stock import stock_source

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


def choose_head(weights: Weights, wanted: Head | None) -> Head:
    """`wanted`, or what suits the weights: 1 bit where they are, else int8. Raises UsageError for 1 bit that can't be.

    A node without a bias, or in another form, would need a function of its own beside the layers'. ONNX can tell two of
    a name apart, but ONNX Runtime 1.22 can't: so the head has a bias of zeros, and 1 bit is for models of form `block`.
    """
    if wanted not in ("1bit", None):
        return wanted
    pattern = weights.config.scaling_pattern
    fits = pattern == "block" and _binary_head(weights) is not None
    if wanted is None:
        return "1bit" if fits else "int8"
    if not fits:
        why = "this model's isn't" if pattern == "block" else f"a model of scale form {pattern!r} can't have it"
        raise UsageError(f"head is '1bit', but {why}; choose int8, int4 or fp32")
    return wanted


def choose_embedding(weights: Weights, wanted: Embedding | None) -> Embedding:
    """`wanted`, or what suits the weights: 1 bit where they are, else fp32. Raises UsageError for 1 bit that can't be."""
    if wanted not in ("1bit", None):
        return wanted
    fits = weights.config.hidden_size % BLOCK_SIZE == 0 and _binary_embedding(weights) is not None
    if wanted == "1bit" and not fits:
        raise UsageError("embedding is '1bit', but this model's isn't; choose fp32, fp16, int8 or int4")
    return "1bit" if fits else "fp32"


def rows_are_shared(config: ModelConfig, options: ExportOptions) -> bool:
    """Whether the embedding looks its rows up in the head; MatMulNBits' codes of signs are more than the rows' own."""
    if not config.tie_word_embeddings or options.head != options.embedding:
        return False
    return options.head in CODE_BITS or (options.head == "1bit" and (options.ours(config) or options.unfolded))


def embedding_source(weights: Weights, options: ExportOptions) -> Iterator[Source]:
    """Nothing where the rows are shared."""
    config = weights.config
    shape = (config.vocab_size, config.hidden_size)
    if rows_are_shared(config, options):
        return
    match options.embedding:
        case "1bit":
            yield _binary_rows(weights, EMBEDDING, options)
        case "int8" | "int4":
            yield _packed_rows(weights, CODE_BITS[options.embedding])
        case storage:
            yield plain_source(weights, f"{EMBEDDING}.weight", shape, "embedding", DTYPES[storage], storage)


def head_source(weights: Weights, options: ExportOptions) -> Iterator[Source]:
    """All of the head, in the form that `options` say."""
    vocab, hidden = weights.config.vocab_size, weights.config.hidden_size

    def spec(part: str, dtype: str, shape: tuple[int, ...], form: str, parameters: int) -> TensorSpec:
        name = f"{HEAD}.{part}"
        return TensorSpec(name=name, dtype=dtype, shape=shape, group="head", form=form, parameters=parameters)

    if options.head == "1bit":
        yield _binary_rows(weights, HEAD, options)
        if not options.ours(weights.config):
            return
        bias = spec("bias", "float32", (vocab,), "fp32", 0)
        yield Source(specs=(bias,), read=lambda: [np.zeros(vocab, np.float32)])
    elif options.head == "fp32":
        weight = spec("weight", "float32", (hidden, vocab), "fp32", vocab * hidden)
        yield Source(specs=(weight,), read=lambda: [np.ascontiguousarray(_full_rows(weights, HEAD).T)])
    else:
        bits, form = CODE_BITS[options.head], f"{options.head} block {HEAD_BLOCK}"
        name = HEAD
        if rows_are_shared(weights.config, options):
            name, form = EMBEDDING, f"{form}, and the embedding"

        def quantized() -> QuantizedRows:
            return _quantized(weights, name, bits)

        if options.ours(weights.config):
            shape = (-(-vocab // TILE_ROWS), -(-hidden // HEAD_GROUP), tile_group_bytes(bits))
            tiles = spec("tiles", "uint8", shape, form, vocab * hidden)
            yield Source(specs=(tiles,), read=lambda: [quantized().tiles()])
        else:
            blocks = -(-hidden // HEAD_BLOCK)
            codes = spec("codes", "uint8", (vocab, blocks, HEAD_BLOCK * bits // 8), form, vocab * hidden)
            scales = spec("scales", "float32", (vocab * blocks,), form, 0)
            yield Source(specs=(codes, scales), read=lambda: quantized().stock())


def _packed_rows(weights: Weights, bits: int) -> Source:
    """Codes and fp16 scales of the embedding."""
    vocab, hidden = weights.config.vocab_size, weights.config.hidden_size
    blocks, form = -(-hidden // HEAD_BLOCK), f"int{bits} block {HEAD_BLOCK}"

    def spec(part: str, dtype: str, shape: tuple[int, ...], parameters: int) -> TensorSpec:
        name = f"{EMBEDDING}.{part}"
        return TensorSpec(name=name, dtype=dtype, shape=shape, group="embedding", form=form, parameters=parameters)

    def read() -> list[npt.NDArray[Any]]:
        rows = _quantized(weights, EMBEDDING, bits)
        return [rows.packed(), rows.scales]

    codes = spec("codes", "uint8", (vocab, blocks, HEAD_BLOCK * bits // 8), vocab * hidden)
    return Source(specs=(codes, spec("scales", "float16", (vocab, blocks), 0)), read=read)


def _quantized(weights: Weights, name: str, bits: int) -> QuantizedRows:
    """Head or embedding in so many bits: as the weights hold it where they do, else from 1 bit or full precision."""
    of_head = name == HEAD
    stored, binary = None, _binary_head(weights) if of_head else _binary_embedding(weights)
    if isinstance(weights, HasQuantizedRows):
        stored = weights.quantized_head(bits) if of_head else weights.quantized_embedding(bits)
    if stored is None and binary is not None:
        stored = rows_from_binary(binary, bits, f"{name}.weight")
    return stored or quantize_rows(_full_rows(weights, name), bits, f"{name}.weight")


def _full_rows(weights: Weights, name: str) -> npt.NDArray[np.float32]:
    shape = weights.config.vocab_size, weights.config.hidden_size
    return shaped(f"{name}.weight", weights.tensor(f"{name}.weight"), shape)


def _binary_rows(weights: Weights, name: str, options: ExportOptions) -> Source:
    config = weights.config

    def read() -> BinaryLinear:
        rows = _binary_head(weights) if name == HEAD else _binary_embedding(weights)
        if rows is None:
            raise CheckpointError(f"{name} is not 1 bit any more")
        return rows

    n, k = config.vocab_size, config.hidden_size
    if name == HEAD and not (options.ours(config) or options.unfolded):
        return stock_source(name, n, k, "block", read, group="head", bits=options.stock_bits)
    source = binary_source(
        name,
        n,
        k,
        "block",
        read,
        group="head" if name == HEAD else "embedding",
        block_scales=options.block_scales,
    )
    if not rows_are_shared(config, options):
        return source
    form = f"{source.specs[0].form}, and the embedding"
    return replace(source, specs=tuple(replace(spec, form=form) for spec in source.specs))


def _binary_head(weights: Weights) -> BinaryLinear | None:
    return weights.binary_head() if isinstance(weights, HasBinaryRows) else None


def _binary_embedding(weights: Weights) -> BinaryLinear | None:
    return weights.binary_embedding() if isinstance(weights, HasBinaryRows) else None
