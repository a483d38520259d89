"""tokenizer.json -> llama.cpp's vocabulary: tokens, types, and what it needs to give the same ids for any text.

It knows the two kinds that Llamas have (the words are tokenizer.ggml.model's):

    gpt2    byte-level BPE: merges by rank, inside the pieces that regular expressions cut. llama.cpp has the expressions
            built in and knows them by a name, tokenizer.ggml.pre: the one with exactly this tokenizer's is looked up.
    llama   SentencePiece's BPE: characters, spaces as ▁, and the neighbours whose joint text is the token of the best
            score are joined. tokenizer.json has merges of two tokens by rank instead. They say the same where every way
            to cut a token into two tokens is a merge, and a token's merges follow each other: then -rank is its score.

A tokenizer that llama.cpp would read otherwise is refused, or, where only rare texts differ, a note says which.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fbiedge.config import ModelConfig
from fbiedge.errors import CheckpointError
from fbiedge.generate import listed_ids
from fbiedge.gguf_tokenizer import CONTRACTIONS, DIGIT, GPT2, IGNORING_MERGES, PRE_TOKENIZERS
from fbiedge.model_file import load_json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type

# Expressions in the order in which they cut, and whether a piece that is a token stays whole -> tokenizer.ggml.pre. Of
# several names for the same, the first of the table.
_PRE = {(cut, name in IGNORING_MERGES): name for name, cut in reversed(PRE_TOKENIZERS.items())}
# Other spellings of the same.
_SAME = (("(?i:'s|'t|'re|'ve|'m|'ll|'d)", CONTRACTIONS), (f"(?:{CONTRACTIONS})", CONTRACTIONS))


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What goes into tokenizer.ggml.*; None where a key is absent."""

    model: str  # gpt2 | llama
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] | None
    scores: list[float] | None
    add_space_prefix: bool | None
    add_bos: bool
    add_eos: bool
    special: Mapping[str, int]  # bos, eos, eot, unknown, padding -> id
    notes: tuple[str, ...]  # what llama.cpp does differently on rare texts


def read_vocabulary(config: ModelConfig, files: Mapping[str, str]) -> Vocabulary:
    """From the files beside a checkpoint. Raises CheckpointError where there is no tokenizer.json or none that can be kept."""
    if "tokenizer.json" not in files:
        raise CheckpointError(
            "there is no tokenizer.json, and a GGUF carries its tokenizer; give one with --tokenizer FILE"
        )
    try:
        return _Reader(config, files).read()
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise CheckpointError(f"tokenizer.json can't be read: {type(error).__name__} {error}") from error


class _Reader:
    def __init__(self, config: ModelConfig, files: Mapping[str, str]) -> None:
        self.config = config
        self.json: dict[str, Any] = load_json(files["tokenizer.json"])
        texts = {name: load_json(files[name]) for name in files if name.endswith(".json") and name != "tokenizer.json"}
        self.tokenizer_config = texts.get("special_tokens_map.json", {}) | texts.get("tokenizer_config.json", {})
        self.generation: dict[str, Any] = texts.get("generation_config.json", {})
        self.model: dict[str, Any] = self.json["model"]
        self.added: dict[int, dict[str, Any]] = {token["id"]: token for token in self.json.get("added_tokens") or []}
        self.ids: dict[str, int] = self.model["vocab"] | {token["content"]: i for i, token in self.added.items()}
        self.merges = [_pair(merge) for merge in self.model["merges"]] if self.model["type"] == "BPE" else []
        self.notes: list[str] = []

    def read(self) -> Vocabulary:
        for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if self.model.get(name):
                raise _refused(f"its model has {name} {self.model[name]!r}")
        if self.model["type"] != "BPE":
            raise _refused(f"its model is {self.model['type']!r}, expected 'BPE'")
        kind = (
            "gpt2"
            if "ByteLevel" in {step["type"] for step in _steps(self.json.get("decoder"), "decoders")}
            else "llama"
        )
        tokens = self.tokens()
        for token in self.added.values():
            if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
                self.notes.append(f"spaces around {token['content']!r} count, which tokenizer.json has taken away")
        prefix, pre, scores = None, "default", None
        if kind == "gpt2":
            pre = self.pre()
        else:
            prefix, scores = self.space_prefix(), self.scores(tokens)
        special = self.special()
        add_bos, add_eos = self.adds(special)
        return Vocabulary(
            model=kind, pre=pre, tokens=tokens, types=self.types(tokens, kind),
            merges=[" ".join(merge) for merge in self.merges] if kind == "gpt2" else None, scores=scores,
            add_space_prefix=prefix, add_bos=add_bos, add_eos=add_eos, special=special,
            notes=tuple(dict.fromkeys(self.notes)),
        )  # fmt: skip

    def tokens(self) -> list[str]:
        """Every id's text; rows of the embedding that have no token get a name nobody writes."""
        size = self.config.vocab_size
        if max(self.ids.values(), default=-1) >= size:
            raise CheckpointError(
                f"tokenizer.json has ids up to {max(self.ids.values())}, but the vocabulary is {size}"
            )
        tokens = [""] * size
        for text, token_id in self.ids.items():
            tokens[token_id] = text
        return [text or f"[UNUSED_{token_id}]" for token_id, text in enumerate(tokens)]

    def types(self, tokens: list[str], kind: str) -> list[int]:
        unknown = self.model.get("unk_token")
        types = [NORMAL if text in self.ids else UNUSED for text in tokens]
        for token_id, text in enumerate(tokens):
            if kind == "llama" and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
                types[token_id] = BYTE
            elif token_id in self.added:
                types[token_id] = CONTROL if self.added[token_id].get("special") else USER_DEFINED
            if kind == "llama" and text == unknown:
                types[token_id] = UNKNOWN
        return types

    def pre(self) -> str:
        """The name that llama.cpp has for this tokenizer's way of cutting."""
        normalizers = [step["type"] for step in _steps(self.json.get("normalizer"), "normalizers")]
        if normalizers == ["NFC"]:
            self.notes.append("characters written in two parts aren't joined first (NFC)")
        elif normalizers:
            raise _refused(f"it changes texts by {', '.join(normalizers)}")
        expressions = tuple(self.expressions())
        if not self.merges:
            return "gpt-2"  # single bytes, however they are cut
        name = _PRE.get((expressions, bool(self.model.get("ignore_merges"))))
        if name is None:
            shown = " then ".join(expressions) or "nothing"
            raise _refused(f"it cuts texts by {shown}, for which llama.cpp has no name that this exporter knows")
        return name

    def expressions(self) -> Iterator[str]:
        for step in _steps(self.json.get("pre_tokenizer"), "pretokenizers"):
            match step["type"]:
                case "ByteLevel":
                    if step.get("add_prefix_space"):
                        raise _refused("it puts a space before every text (ByteLevel's add_prefix_space)")
                    if step.get("use_regex", True):
                        yield GPT2
                case "Digits" if step.get("individual_digits"):
                    yield DIGIT
                case "Split" if step["behavior"] == "Isolated" and not step.get("invert"):
                    expression = step["pattern"].get("Regex") or step["pattern"]["String"]
                    for other, ours in _SAME:
                        expression = expression.replace(other, ours)
                    yield expression
                case other:
                    raise _refused(f"it cuts texts by {other}")

    def space_prefix(self) -> bool:
        """Whether a text begins with a space that nobody wrote."""
        prefixes = []
        for step in _steps(self.json.get("normalizer"), "normalizers"):
            match step["type"]:
                case "Prepend" if step["prepend"] == "▁":
                    prefixes.append(True)
                case "Replace" if step["pattern"] == {"String": " "} and step["content"] == "▁":
                    prefixes.append(False)
                case other:
                    raise _refused(f"it changes texts by {other}")
        for step in _steps(self.json.get("pre_tokenizer"), "pretokenizers"):
            if step["type"] != "Metaspace" or step.get("replacement") != "▁":
                raise _refused(f"it cuts texts by {step['type']}")
            if step.get("split", True) and any("▁" in text[1:] for text in self.model["vocab"]):
                raise _refused("it cuts texts at spaces, but has tokens with spaces inside")
            scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
            prefixes.append(scheme != "never")
            if scheme == "first":
                self.notes.append("text that follows a special token begins with a space there")
        if not prefixes:
            raise _refused("nothing turns its spaces into ▁")
        return any(prefixes)

    def scores(self, tokens: list[str]) -> list[float]:
        """-1, -2, … in the order in which tokens are first merged; those that no merge makes come last."""
        order: dict[str, int] = {}
        last = None
        known = set(self.merges)
        for left, right in self.merges:
            text = left + right
            if text in order and text != last:
                self.notes.append("a few merges of one token don't follow each other")
            order.setdefault(text, len(order))
            last = text
        missing = sum(
            (text[:cut], text[cut:]) not in known
            for text in self.model["vocab"]
            for cut in range(1, len(text))
            if self.ids.get(text) not in self.added and text[:cut] in self.ids and text[cut:] in self.ids
        )
        bytes_missing = [f"<0x{byte:02X}>" for byte in range(256) if f"<0x{byte:02X}>" not in self.ids]
        if not self.model.get("byte_fallback") or bytes_missing:
            raise _refused("it has no byte tokens <0x00> to <0xFF> to fall back on")
        if missing:
            raise _refused(f"{missing} ways to put two tokens together are no merges, which llama.cpp would join")
        return [-1.0 - order.get(text, len(order) + token_id) for token_id, text in enumerate(tokens)]

    def special(self) -> dict[str, int]:
        ends = listed_ids(self.generation, "eos_token_id") or [self.config.eos_token_id]
        found = {"bos": self.config.bos_token_id, "eos": ends[0], "eot": ends[1] if len(ends) > 1 else None}
        for name, key in (("unknown", "unk_token"), ("padding", "pad_token")):
            found[name] = self.ids.get(_text(self.tokenizer_config.get(key)))
        bos, eos = (self.ids.get(_text(self.tokenizer_config.get(f"{name}_token"))) for name in ("bos", "eos"))
        found |= {"bos": found["bos"] if bos is None else bos}
        if len(ends) == 1 and eos is not None and eos != ends[0]:
            found["eot"] = eos
        return {name: token_id for name, token_id in found.items() if token_id is not None}

    def adds(self, special: Mapping[str, int]) -> tuple[bool, bool]:
        """Whether a text gets <s> before it and </s> after it, as fbiedge.tokenizer does it."""
        before: list[int] = []
        after: list[int] = []
        for step in _steps(self.json.get("post_processor"), "processors"):
            if step["type"] == "TemplateProcessing":
                sides = [before]
                for piece in step["single"]:
                    if "Sequence" in piece:
                        sides.append(after)
                    else:
                        sides[-1] += step["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
            elif step["type"] != "ByteLevel":
                raise _refused(f"it adds tokens by {step['type']}")
        if self.tokenizer_config.get("add_bos_token") and before[:1] != [special.get("bos")]:
            before.insert(0, special["bos"])
        if before not in ([], [special.get("bos")]) or after not in ([], [special.get("eos")]):
            raise _refused(f"it puts the tokens {before} before a text and {after} after it")
        return bool(before), bool(after)


def _refused(reason: str) -> CheckpointError:
    return CheckpointError(
        f"llama.cpp can't have this tokenizer: {reason}; give one that it can have with --tokenizer FILE"
    )


def _steps(part: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """A normalizer, pre-tokenizer, decoder or post-processor as the list of its steps."""
    if part is None:
        return []
    return [inner for step in part[name] for inner in _steps(step, name)] if part["type"] == "Sequence" else [part]


def _pair(merge: Any) -> tuple[str, str]:
    """`"a b"` (older) or `["a", "b"]`."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _text(value: Any) -> str:
    return str(value.get("content", "")) if isinstance(value, dict) else value if isinstance(value, str) else ""
