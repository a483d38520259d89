"""Text to ids and back, and ids to text while they are being generated.

One character may take several tokens (an emoji is four bytes), so a token's text is not known until the character is
whole. Decoding ever longer prefixes and printing the difference would be right but quadratic; `DetokenizeStream` keeps
a few bytes instead. Tokenizers spell bytes in two ways:

    byte-level (GPT-2)     every token is a string of stand-in characters, one a byte
    byte fallback (Llama)  tokens are text, and rare characters come as tokens <0x00> ... <0xFF>

In both, bytes go through an incremental UTF-8 decoder that emits whole characters and replaces what can't be one.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import tokenizers

from .errors import ModelFileError
from .model_file import ModelFile

# What separates the documents of a text file.
DOCUMENT_END = re.compile(r"<\|endoftext\|>|<\|endofdoc\|>")


class Tokenizer:
    """The tokenizer that travels in a model. Special tokens in text count as such; decoding leaves them out."""

    def __init__(self, tokenizer_json: str, tokenizer_config: dict[str, Any] | None = None) -> None:
        """From the texts of tokenizer.json and tokenizer_config.json. Raises ModelFileError."""
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # the library raises nothing narrower
            raise ModelFileError(f"the tokenizer can't be read ({error}); export the model again") from error
        self.config = tokenizer_config or {}
        decoder = json.loads(tokenizer_json).get("decoder") or {}
        decoders = {step["type"] for step in decoder.get("decoders", [decoder]) if step}
        self.byte_level = bool(decoders) and decoders <= {"ByteLevel", "Fuse"}
        self.byte_fallback = "ByteFallback" in decoders
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {token_id for token_id, token in added.items() if token.special}
        self.bos_token = self._special_text("bos_token")
        self.eos_token = self._special_text("eos_token")

    @classmethod
    def from_model(cls, model: ModelFile) -> Tokenizer:
        """The tokenizer inside `model`. Raises ModelFileError."""
        if "tokenizer" not in model.metadata:
            raise ModelFileError(
                f"{model.path} has no tokenizer; put a tokenizer.json beside the checkpoint and export it again"
            )
        return cls(
            model.metadata["tokenizer"],
            model.json_object("special_tokens_map") | model.json_object("tokenizer_config"),
        )

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return int(self._tokenizer.get_vocab_size())

    def to_json(self) -> str:
        """The text of tokenizer.json."""
        return str(self._tokenizer.to_str())

    def token_id(self, token: str) -> int | None:
        """The id of exactly this token, None where there is none."""
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def encode(self, text: str) -> list[int]:
        """Ids of a whole prompt, with the beginning-of-text token where the model was trained with one."""
        ids = self._ids(text, add_special_tokens=True)
        bos = self.token_id(self.bos_token) if self.bos_token else None
        if bos is not None and (self.config.get("add_bos_token") or not ids) and ids[:1] != [bos]:
            ids = [bos, *ids]
        return ids

    def encode_rendered(self, text: str, *, continues: bool = False) -> list[int]:
        """Ids of text that spells out its own special tokens, as chat templates do; `continues`: other ids go before."""
        ids = self._ids(text, add_special_tokens=False)
        if continues and ids and self._tokenizer.id_to_token(ids[0]) == "▁" and not text.startswith(" "):
            return ids[1:]  # Llama's tokenizer puts a space before every text; in the middle of one it doesn't belong
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        """What a token spells, in UTF-8 that may be part of a character: a special one its name, one without text b""."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""  # an embedding may be padded to more rows than there are tokens
        if token_id not in self._special:
            if self.byte_level:
                return _byte_level_bytes(token)
            if self.byte_fallback and _BYTE_TOKEN.fullmatch(token):
                return bytes([int(token[3:5], 16)])
        return str(token).replace("▁", " ").encode()

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`."""
        stream = DetokenizeStream(self)
        return "".join([stream.push(token_id) for token_id in ids]) + stream.flush()

    def _ids(self, text: str, *, add_special_tokens: bool) -> list[int]:
        # As a batch, because the library's encode() lets no other thread run: a server would stand still for seconds.
        ids: list[int] = self._tokenizer.encode_batch([_valid(text)], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def _special_text(self, name: str) -> str:
        """`bos_token` and the like are either the text or an object with the text as `content`."""
        value = self.config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        return _valid(value) if isinstance(value, str) else ""


class DetokenizeStream:
    """Turns ids into text one at a time: the pieces joined are the text of all ids, each character in one piece.

    `context` are the ids before the first: where Llama's decoder drops the space that starts a text, it must know that
    the text doesn't start here.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self._library = tokenizer._tokenizer
        self._special = tokenizer._special
        self._byte_level, self._byte_fallback = tokenizer.byte_level, tokenizer.byte_fallback
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        # The last ids whose text is out, as context for the next, and those whose text is held back.
        self._before: list[int] = [token_id for token_id in context[-8:] if not self._is_byte(token_id)][-1:]
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes, often that of this token, empty in the middle of a character."""
        if token_id in self._special:
            return ""
        token = self._library.id_to_token(token_id)
        if token is None:
            return ""  # an embedding may be padded to more rows than there are tokens
        if self._byte_level:
            return self._utf8.decode(_byte_level_bytes(token))
        if self._is_byte(token_id):
            return self._held_text() + self._utf8.decode(bytes([int(token[3:5], 16)]))
        text = self._utf8.decode(b"", True)
        self._utf8.reset()
        self._held.append(token_id)
        new = self._new_text()
        if new.endswith("\ufffd") and not self._byte_fallback:
            return text  # some other spelling of bytes, in the middle of a character
        return text + self._held_text(new)

    def flush(self) -> str:
        """What is still held back at the end: an unfinished character becomes U+FFFD."""
        text = self._held_text() + self._utf8.decode(b"", True)
        self._utf8.reset()
        return text

    def _is_byte(self, token_id: int) -> bool:
        token = self._library.id_to_token(token_id) if self._byte_fallback else None
        return token is not None and _BYTE_TOKEN.fullmatch(token) is not None

    def _new_text(self) -> str:
        known = self._library.decode(self._before) if self._before else ""
        return str(self._library.decode(self._before + self._held))[len(known) :]

    def _held_text(self, text: str | None = None) -> str:
        if not self._held:
            return ""
        text = self._new_text() if text is None else text
        self._before, self._held = self._held[-1:], []
        return text


def _valid(text: str) -> str:
    """Without lone surrogates, which Python makes of undecodable bytes in arguments and which UTF-8 has no form for."""
    return text.encode("utf-8", "replace").decode()


_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def _stand_ins() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes in order for the characters from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _stand_ins()


def _byte_level_bytes(token: str) -> bytes:
    """The bytes that a byte-level token stands for; an added token, which may hold anything, stands for itself."""
    try:
        return bytes([_BYTE_OF[character] for character in token])
    except KeyError:
        return token.encode()
