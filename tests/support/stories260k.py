"""stories260K, a real trained Llama in llama2.c's v0 format, as a checkpoint folder in Hugging Face's form.

The format: 7 int32 (dim, hidden_dim, layers, heads, kv heads, vocabulary (negative: head of its own), context), then
float32 tensors, each stacked over the layers: embedding, attention norm, q, k, v, o, FFN norm, w1 (gate), w2 (down),
w3 (up), final norm, cos and sin tables, and the head where it is not the embedding.
"""

from __future__ import annotations

import json
import lzma
import struct
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from fbiedge.config import ModelConfig
from fbiedge.weights import write_checkpoint

PROMPT = "Once upon a time"
# How llama2.c continues it at temperature 0.
GOLDEN = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball. She wanted to play with it, but it was too high."
)


def convert(source: Path, out: Path) -> None:
    """Write the checkpoint in folder `source` (stories260K.bin.xz, tok512.bin) as a checkpoint folder `out`."""
    config, tensors = read_model(lzma.decompress((source / "stories260K.bin.xz").read_bytes()))
    files = {
        "tokenizer.json": tokenizer_json((source / "tok512.bin").read_bytes()),
        "tokenizer_config.json": json.dumps({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
    }
    write_checkpoint(out, config, tensors.items(), files)


def read_model(data: bytes) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """The config and the tensors, by Hugging Face's names, of a llama2.c v0 checkpoint."""
    dim, hidden_dim, layers, heads, kv_heads, signed_vocab, context = struct.unpack_from("<7i", data)
    vocab, head_dim = abs(signed_vocab), dim // heads
    config = ModelConfig(
        vocab_size=vocab,
        hidden_size=dim,
        intermediate_size=hidden_dim,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=context,
        tie_word_embeddings=signed_vocab > 0,
        scaling_pattern="none",
    )
    values = np.frombuffer(data, "<f4", offset=28)
    position = 0

    def take(*shape: int) -> np.ndarray:
        nonlocal position
        size = int(np.prod(shape))
        position += size
        return values[position - size : position].reshape(shape)

    kv_size = kv_heads * head_dim
    tensors = {"model.embed_tokens.weight": take(vocab, dim)}
    for name, *shape in (
        ("input_layernorm", dim),
        ("self_attn.q_proj", dim, dim),
        ("self_attn.k_proj", kv_size, dim),
        ("self_attn.v_proj", kv_size, dim),
        ("self_attn.o_proj", dim, dim),
        ("post_attention_layernorm", dim),
        ("mlp.gate_proj", hidden_dim, dim),
        ("mlp.down_proj", dim, hidden_dim),
        ("mlp.up_proj", hidden_dim, dim),
    ):
        for layer, tensor in enumerate(take(layers, *shape)):
            if name.endswith(("q_proj", "k_proj")):
                tensor = half_split(tensor, head_dim)
            tensors[f"model.layers.{layer}.{name}.weight"] = tensor
    tensors["model.norm.weight"] = take(dim)
    take(2, context, head_dim // 2)  # cos and sin, which every engine makes itself
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = take(vocab, dim)
    assert position == values.size, f"read {position} of {values.size} numbers"
    return config, tensors


def half_split(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of q or k from llama2.c's RoPE pairs (2i, 2i + 1) to Hugging Face's (i, i + D/2), head by head."""
    n, k = weight.shape
    return weight.reshape(n // head_dim, head_dim // 2, 2, k).transpose(0, 2, 1, 3).reshape(n, k)


def tokenizer_json(data: bytes) -> str:
    """tokenizer.json from a llama2.c tokenizer: int32 longest piece, then per piece float32 score, int32 length, bytes.

    It is a SentencePiece BPE: the adjacent pair whose joined piece scores best is merged first, and a character without
    a piece falls back to its UTF-8 bytes `<0xNN>`.
    """
    pieces: dict[str, int] = {}
    scores: dict[str, float] = {}
    position = 4
    while position < len(data):
        score, length = struct.unpack_from("<fi", data, position)
        position += 8 + length
        piece = data[position - length : position].decode().replace(" ", "▁")
        if len(pieces) in (1, 2):
            piece = piece.strip()  # llama2.c wrote <s> and </s> with line breaks around them
        scores[piece] = score
        pieces[piece] = len(pieces)
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(pieces, key=lambda piece: -scores[piece])
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]
    tokenizer = Tokenizer(models.BPE(pieces, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")]
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer.to_str()
