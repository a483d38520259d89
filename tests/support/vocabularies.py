"""Small vocabularies of both kinds as a GGUF file's metadata, and texts on which tokenizers go wrong."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6

PROSE = """The quick brown fox jumps over the lazy dog, and the other 1,234 foxes didn't; they'd rather sleep until 10:30.
"Isn't it strange?" she said. "It's 3.14159 of what I've got, and we'll see." He'd HAVE'D them, I'M sure they're right.
Über den Wolken muß die Freiheit wohl grenzenlos sein: naïve façade, œuvre, Ærøskøbing, İstanbul, ſtrange.
Слишком много слов; 日本語のテキストと中文文本, 한국어도 있어요. ١٢٣٤ and ½ and ² are numbers to some. हिन्दी में कुछ शब्द।

    def quick(brown, *fox):\n\treturn [jump ** 2 for jump in fox if jump != brown]  # 100000 foxes\n
"""

_GENERATOR = random.Random(0)
_ANYTHING = "".join(
    chr(_GENERATOR.choice([*(_GENERATOR.randrange(*span) for span in ((32, 127), (160, 0x3000), (0x1F300, 0x1F700))),
                           10, 13, 9, 32, 32, 0x3000, 0xA0, 0x85, 0x2028, ord("'"), _GENERATOR.randrange(0x4E00, 0x9FFF)]))
    for _ in range(3000)
)  # fmt: skip

TEXTS = [
    "",
    " ",
    "   ",
    "\t",
    "\n\n",
    "a",
    " a",
    "  leading and   inner    runs \n \n\n  of\t\tspace  ",
    "Hello, world! Hello world",
    "▁already ▁escaped▁",
    "🚀 (normal) 😶‍🌫️ (several code points) ✅🦙🦙 \U0001f9d1\U0001f3fd‍💻",
    "'s 'S I'll I'LL 'ſ 12345 3.3.3 ----=====----",
    "<0x0A> <unk> <s> </s> <|end|>",
    "<|user|>Hi there<|end|> <|user|>  <|end|><|end|>\n<think>what</think>done",
    PROSE,
    _ANYTHING,
]


def sentence_piece_metadata(extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A vocabulary of SentencePiece's form, trained on PROSE: characters and pieces with scores of their own.

    As in Llama's, a line break is a byte and no character.
    """
    learnt = Tokenizer(models.BPE())
    learnt.pre_tokenizer = pre_tokenizers.Metaspace()
    learnt.train_from_iterator([PROSE], trainers.BpeTrainer(vocab_size=500, show_progress=False))
    pieces = sorted(learnt.get_vocab().items(), key=lambda entry: (len(entry[0]) == 1, entry[1]))
    runs = ["▁▁", "▁▁▁▁", "▁▁▁"]  # as Llama's vocabulary has them
    texts = [*runs, *(text for text, _ in pieces if "\n" not in text and text not in runs)]
    head = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL}
    head |= {f"<0x{byte:02X}>": BYTE for byte in range(256)}
    tail = {"<|user|>": CONTROL, "<|end|>": NORMAL, "<think>": USER_DEFINED, "</think>": USER_DEFINED}
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [*head, *texts, *tail],
        "tokenizer.ggml.scores": [0.0] * len(head) + [-float(i) for i in range(len(texts))] + [-1000.0] * len(tail),
        "tokenizer.ggml.token_type": [*head.values(), *[NORMAL] * len(texts), *tail.values()],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **(extra or {}),
    }


def byte_level_metadata(pre: str, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A byte-level vocabulary, trained on PROSE; control tokens last."""
    learnt = Tokenizer(models.BPE())
    learnt.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    learnt.train_from_iterator([PROSE], trainer)
    texts = sorted(learnt.get_vocab(), key=learnt.get_vocab().__getitem__)
    merges = [" ".join(merge) for merge in json.loads(learnt.to_str())["model"]["merges"]]
    texts += ["Ġdidn't", "<|begin|>"]  # the first is reached by no merges, only where they are ignored
    tail = {"<s>": CONTROL, "</s>": CONTROL, "<|user|>": CONTROL, "<|end|>": NORMAL, "<think>": USER_DEFINED}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*texts, *tail],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [NORMAL] * len(texts) + [*tail.values()],
        "tokenizer.ggml.bos_token_id": len(texts),
        "tokenizer.ggml.eos_token_id": len(texts) + 1,
        **(extra or {}),
    }
