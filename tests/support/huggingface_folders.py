"""Tiny folders as Hugging Face's own `save_pretrained` leaves them, with tokenizers in which pieces join over a space."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from fbiedge.sample_text import CALIBRATION_TEXT
from fbiedge.training.tokenizer import train_tokenizer

VOCAB_SIZE = 400


def llama_folder(folder: Path, *, tokenizer: str = "bytes", context: int = 64) -> Path:
    """A random full-precision Llama, whose likeliest tokens differ from place to place."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=context, initializer_range=0.4, tie_word_embeddings=False,
    )  # fmt: skip
    return model_folder(folder, LlamaForCausalLM, config, tokenizer=tokenizer)


def model_folder(folder: Path, kind: type[PreTrainedModel], config: Any, *, tokenizer: str = "bytes") -> Path:
    """A random model of any class."""
    disable_progress_bar()
    torch.manual_seed(0)
    config.bos_token_id, config.eos_token_id = 1, 2
    kind(config).save_pretrained(folder)
    made = train_tokenizer([CALIBRATION_TEXT], VOCAB_SIZE) if tokenizer == "bytes" else _sentence_piece()
    (folder / "tokenizer.json").write_text(made.to_str())
    names = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


def teacher_folder(
    path: Path, architecture: str, dtype: torch.dtype = torch.float32, **changes: object
) -> torch.nn.Module:
    """A random Llama, Qwen3 or GPT2 of the vocabulary of tiny_run.py, saved to `path` without a tokenizer."""
    torch.manual_seed(0)
    shape = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {"intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 64, **shape, **changes}
    if architecture == "GPT2":
        config = {"vocab_size": 300, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64, "bos_token_id": 1,
                  "eos_token_id": 2}  # fmt: skip
    elif architecture == "Qwen3":
        config["head_dim"] = 32
    elif architecture == "Llama":
        config |= {"bos_token_id": 1, "eos_token_id": 2}
    suffix = "LMHeadModel" if architecture == "GPT2" else "ForCausalLM"
    model = getattr(transformers, architecture + suffix)(getattr(transformers, f"{architecture}Config")(**config))
    model = model.to(dtype).eval()
    model.save_pretrained(path)
    return model  # type: ignore[no-any-return]


def _sentence_piece() -> Tokenizer:
    """Llama-2's form: a space before every text, spaces as ▁, bytes for what has no piece."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    letters = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=["<unk>", "<s>", "</s>", *letters], show_progress=False
    )
    made.train_from_iterator(CALIBRATION_TEXT.split("\n"), trainer)
    content = json.loads(made.to_str())
    content["added_tokens"] = content["added_tokens"][:3]  # the bytes are plain pieces
    made = Tokenizer.from_str(json.dumps(content))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    return made
