"""The tokenizer in a GGUF file's metadata -> the files that travel with a checkpoint: tokenizer.json and the like.

The ids are llama.cpp's. It knows two kinds that Llamas and Qwens use (tokenizer.ggml.model):

    llama  SentencePiece's BPE. Text becomes characters, spaces are ▁; of all neighbours whose joint text is a token, the
           pair of the highest score is joined, the leftmost among equals; characters that are no token become bytes.
    gpt2   byte-level BPE with ranked merges, inside the pieces that regular expressions cut (tokenizer.ggml.pre).

`tokenizers` has no scores but ranked merges of two tokens, so every way to cut a token into two tokens becomes a merge,
ranked by the token's score. That is the same as long as no two tokens have one score, and none has a character that is
no token by itself; SentencePiece sees to both.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from .errors import ModelFileError
from .gguf_file import metadata_value

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # of tokenizer.ggml.token_type
_AGAIN = "convert the model again"

# Tokens that end a text or a turn, whatever their type says: llama.cpp goes by their names, too.
_ENDS = (
    "</s> <|endoftext|> <|end_of_text|> <|im_end|> <|eot_id|> <|eom_id|> <|end|> <end_of_turn> <EOT> [EOT] [EOS] <eos> "
    "<|return|> <|call|> <end_of_utterance> <｜end▁of▁sentence｜>"
).split()

# Pieces of text, as llama.cpp cuts them: each expression in turn cuts what those before it left, matches and the rest.
# The exporter finds the name of a tokenizer's expressions in the same table, so one means the same in both directions.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
CONTRACTIONS = "'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
_QWEN2 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
_QWEN35 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + _SPACES
_THREE_DIGITS = "[0-9][0-9][0-9]"
PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    name: expressions
    for names, expressions in (
        ("default", (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", _THREE_DIGITS)),
        ("falcon", (r"[\p{P}\$\+<=>\^~\|`]+", GPT2, _THREE_DIGITS)),
        ("gpt-2 mpt olmo jais trillion exaone4 gigachat mellum a.x-4.0 granite-docling phi-2", (GPT2,)),
        ("smollm starcoder refact command-r codeshell exaone minerva-7b mellum2", (DIGIT, GPT2)),
        (
            "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 dbrx smaug-bpe chatglm-bpe glm4",
            (_LLAMA3,),
        ),
        ("qwen2 deepseek-r1-qwen stablelm2 hunyuan megrez kormo solar-open", (_QWEN2,)),
        ("qwen35", (_QWEN35,)),
    )
    for name in names.split()
}
# Of these, a piece that is a token stays whole, whatever the merges would make of it.
IGNORING_MERGES = "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 glm4".split()
_ADDING_BOS = "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2".split()

_SAMPLING = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
             "penalty_repeat": "repetition_penalty"}  # fmt: skip


def sidecars_from_gguf(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Texts by file name: tokenizer.json, tokenizer_config.json, generation_config.json, chat_template.jinja.

    Without the first two where the file says that it has no tokenizer. Raises ModelFileError.
    """
    files = {}
    bos, eos = bos_and_eos(metadata)
    generation: dict[str, Any] = {"bos_token_id": bos, "eos_token_id": [eos]}
    if has_tokenizer(metadata):
        vocabulary = _Vocabulary(metadata)
        files["tokenizer.json"] = json.dumps(vocabulary.tokenizer(), ensure_ascii=False)
        files["tokenizer_config.json"] = json.dumps(vocabulary.config(), ensure_ascii=False, indent=2)
        generation["eos_token_id"] = vocabulary.ends()
    for key, name in _SAMPLING.items():
        value = metadata_value(metadata, f"general.sampling.{key}", int if key == "top_k" else float)
        if value is not None:
            generation |= {"do_sample": True, name: value}
    files["generation_config.json"] = json.dumps(generation, indent=2)
    template = metadata_value(metadata, "tokenizer.chat_template", str)
    if template:
        files["chat_template.jinja"] = template
    return files


def has_tokenizer(metadata: Mapping[str, Any]) -> bool:
    """False where the file says that it has none. Raises ModelFileError where it says nothing."""
    kind = metadata_value(metadata, "tokenizer.ggml.model", str)
    if kind is None:
        raise ModelFileError(
            f"the file has no tokenizer (tokenizer.ggml.model is missing); {_AGAIN} with its tokenizer"
        )
    if kind not in ("llama", "gpt2", "no_vocab", "none"):
        raise ModelFileError(f"the tokenizer is of kind {kind!r}, expected 'llama' or 'gpt2'")
    return kind in ("llama", "gpt2")


def bos_and_eos(metadata: Mapping[str, Any]) -> tuple[int, int]:
    """Ids of the tokens that begin and end a text; llama.cpp's where the file has none. Raises ModelFileError."""
    default = (11, 11) if metadata_value(metadata, "tokenizer.ggml.model", str) == "gpt2" else (1, 2)
    bos = metadata_value(metadata, "tokenizer.ggml.bos_token_id", int, default[0])
    eos = metadata_value(metadata, "tokenizer.ggml.eos_token_id", int, default[1])
    assert bos is not None and eos is not None
    return bos, eos


class _Vocabulary:
    """What the metadata says of the tokens, checked."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.metadata = metadata
        self.kind: str = metadata["tokenizer.ggml.model"]
        tokens = metadata_value(metadata, "tokenizer.ggml.tokens", list)
        if not tokens:
            raise ModelFileError(f"the tokenizer has no tokenizer.ggml.tokens; {_AGAIN}")
        # Empty texts get the names that llama.cpp gives them.
        self.tokens: list[str] = [text or f"[EMPTY_{token_id}]" for token_id, text in enumerate(tokens)]
        self.ids = {text: token_id for token_id, text in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            twice = next(text for token_id, text in enumerate(self.tokens) if self.ids[text] != token_id)
            raise ModelFileError(f"tokenizer.ggml.tokens holds {twice!r} twice; {_AGAIN}")
        types = self.numbers("token_type")
        self.types = np.ones(len(tokens), np.int32) if types is None else types
        self.pre = metadata_value(metadata, "tokenizer.ggml.pre", str, "default") or "default"
        if self.kind == "gpt2" and self.pre not in PRE_TOKENIZERS:
            known = ", ".join(sorted(PRE_TOKENIZERS))
            raise ModelFileError(
                f"the pre-tokenizer {self.pre!r} (tokenizer.ggml.pre) is not supported, expected {known}"
            )
        bos, eos, unknown = (1, 2, 0) if self.kind == "llama" else (None, None, None)
        self.bos, self.eos = self.special("bos", bos), self.special("eos", eos)
        self.unknown = self.special("unknown", unknown)
        adds_bos = self.kind == "llama" or self.pre in _ADDING_BOS
        self.adds_bos = self.flag("add_bos_token", adds_bos) and self.bos is not None
        self.adds_eos = self.flag("add_eos_token", False) and self.eos is not None
        self.space_prefix = self.flag("add_space_prefix", self.kind == "llama")

    def tokenizer(self) -> dict[str, Any]:
        """tokenizer.json."""
        parts = self.sentence_piece() if self.kind == "llama" else self.byte_level()
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [*self.added_tokens()],
            "normalizer": None,
            "pre_tokenizer": None,
            "post_processor": self.post_processor(),
            **parts,
        }

    def sentence_piece(self) -> dict[str, Any]:
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        prepend = [{"type": "Prepend", "prepend": "▁"}] if self.space_prefix else []
        strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if self.space_prefix else []
        back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
        model = {
            "byte_fallback": True,
            "fuse_unk": True,
            "unk_token": None if self.unknown is None else self.tokens[self.unknown],
        }
        return {
            "normalizer": {"type": "Sequence", "normalizers": [*prepend, replace]},
            "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
            "model": self.bpe(self.merges_from_scores(), **model),
        }

    def byte_level(self) -> dict[str, Any]:
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        splits = [
            {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
            for expression in PRE_TOKENIZERS[self.pre]
        ]
        return {
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
            "decoder": {**byte_level, "add_prefix_space": True, "use_regex": True},
            "model": self.bpe(self.ranked_merges(), ignore_merges=self.pre in IGNORING_MERGES),
        }

    def bpe(self, merges: list[tuple[str, str]], **options: Any) -> dict[str, Any]:
        return {"type": "BPE", "dropout": None, "vocab": self.ids, "merges": merges, **options}

    def merges_from_scores(self) -> list[tuple[str, str]]:
        scores = self.numbers("scores")
        if scores is None:
            raise ModelFileError(f"the tokenizer has no tokenizer.ggml.scores; {_AGAIN}")
        merges = []
        for token_id in np.argsort(-scores[: len(self.tokens)], kind="stable"):
            token = self.tokens[token_id]
            cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
            cuts = [cut for cut in cuts if cut[0] in self.ids and cut[1] in self.ids]
            # In x y z both x y and y z may be the token; the left one wins, and it is the cut whose end begins the token.
            merges += sorted(cuts, key=lambda cut: not token.startswith(cut[1])) if len(cuts) > 1 else cuts
        return merges

    def ranked_merges(self) -> list[tuple[str, str]]:
        texts = metadata_value(self.metadata, "tokenizer.ggml.merges", list)
        if texts is None:
            raise ModelFileError(f"the tokenizer has no tokenizer.ggml.merges; {_AGAIN}")
        ids, merges = self.ids, dict[tuple[str, str], None]()  # where one is there twice, the first counts
        for text in texts:
            at = text.find(" ", 1)
            left, right = text[:at], text[at + 1 :]
            if left not in ids or right not in ids or left + right not in ids:
                raise ModelFileError(f"tokenizer.ggml.merges holds {text!r}, whose parts are not all tokens; {_AGAIN}")
            merges[left, right] = None
        return [*merges]

    def added_tokens(self) -> Iterator[dict[str, Any]]:
        """Tokens that count as such wherever they are in a text; of the special ones nothing is printed."""
        ends = {self.ids[text] for text in _ENDS if text in self.ids}
        for token_id, kind in enumerate(self.types[: len(self.tokens)].tolist()):
            special = kind in (_UNKNOWN, _CONTROL) or token_id in ends
            if special or kind == _USER_DEFINED:
                options = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
                yield {"id": token_id, "content": self.tokens[token_id], "special": special, **options}

    def post_processor(self) -> dict[str, Any] | None:
        begins = [self.tokens[self.bos]] if self.adds_bos and self.bos is not None else []
        ends = [self.tokens[self.eos]] if self.adds_eos and self.eos is not None else []
        if not begins and not ends:
            return None

        def around(name: str) -> list[dict[str, Any]]:
            text = {"Sequence": {"id": name, "type_id": 0}}
            before, after = (
                [{"SpecialToken": {"id": token, "type_id": 0}} for token in side] for side in (begins, ends)
            )
            return [*before, text, *after]

        specials = {token: {"id": token, "ids": [self.ids[token]], "tokens": [token]} for token in begins + ends}
        pair = [*around("A"), *around("B")]
        return {"type": "TemplateProcessing", "single": around("A"), "pair": pair, "special_tokens": specials}

    def config(self) -> dict[str, Any]:
        """tokenizer_config.json."""
        named = {"bos": self.bos, "eos": self.eos, "unk": self.unknown, "pad": self.special("padding", None)}
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{f"{name}_token": self.tokens[token_id] for name, token_id in named.items() if token_id is not None},
            "add_bos_token": self.adds_bos,
            "add_eos_token": self.adds_eos,
            "clean_up_tokenization_spaces": False,
        }

    def ends(self) -> list[int]:
        """Ids that end a text or a turn, the end of text first."""
        found = [self.eos, self.special("eot", None), self.special("eom", None)]
        found += [self.ids[text] for text in _ENDS if text in self.ids]
        return [*dict.fromkeys(token_id for token_id in found if token_id is not None)]

    def special(self, name: str, default: int | None) -> int | None:
        """The id of a special token, None where there is none. Raises ModelFileError for an id of no token."""
        key = f"tokenizer.ggml.{name}_token_id"
        token_id = metadata_value(self.metadata, key, int)
        if token_id is None:
            return default if default is not None and default < len(self.tokens) else None
        if not 0 <= token_id < len(self.tokens):
            raise ModelFileError(f"{key} is {token_id}, expected an id below {len(self.tokens)}; {_AGAIN}")
        return token_id

    def flag(self, name: str, default: bool) -> bool:
        return bool(metadata_value(self.metadata, f"tokenizer.ggml.{name}", bool, default))

    def numbers(self, name: str) -> Any:
        """One number a token, None where there are none. Raises ModelFileError."""
        key = f"tokenizer.ggml.{name}"
        values = metadata_value(self.metadata, key, np.ndarray)
        if values is not None and (len(values) < len(self.tokens) or values.dtype.kind not in "if"):
            got = f"{len(values)} numbers of type {values.dtype}"
            raise ModelFileError(f"{key} holds {got} for {len(self.tokens)} tokens, expected one each; {_AGAIN}")
        return values
