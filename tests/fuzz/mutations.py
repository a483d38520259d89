"""Ways to damage a file, all drawn from one random generator: the same seed gives the same damage.

Bytes: single bits, interesting values, lengths and counts set to huge ones, pieces cut, doubled, moved and taken from
another file, and files cut short. JSON, protobuf messages and prompt caches are also damaged as what they mean, so that
the result is still a sound file of its kind with one thing wrong in it: that gets far deeper than bytes do.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Sequence
from copy import deepcopy
from random import Random
from typing import Any

from google.protobuf.message import Message
from onnx import ModelProto

INTEGERS = (
    0,
    1,
    -1,
    2,
    3,
    7,
    127,
    128,
    255,
    256,
    65535,
    65536,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**62,
    2**63 - 1,
    -(2**63),
)
_BYTES = (0, 1, 0x7F, 0x80, 0xFE, 0xFF)
_JSON_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63), 10**400, 1e308, -0.5, float("nan"), float("inf"), "", "a", "\0", "\ud800",
    "../../etc/passwd", "x" * 5000, [], {}, [[]], [1] * 300, {"a": {}}, [None], ["a"],
)  # fmt: skip
_TEXTS = (
    b"",
    b"\0",
    b"\n",
    b"\xff\xfe",
    b"x" * 300,
    b"../data",
    b"/etc/passwd",
    b"fbiedge",
    b"com.microsoft",
    b"Gather",
)


def damage_bytes(content: bytes, random: Random, places: Sequence[tuple[int, int]], other: bytes) -> bytes:
    """1 to 4 changes, most of them in the ranges `places`, where a file says what is where; `other` is for splices."""
    damaged = bytearray(content)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        if not damaged:
            break
        start, end = random.choice(places) if places and random.random() < 0.85 else (0, len(damaged))
        at = min(random.randrange(start, max(end, start + 1)), len(damaged) - 1)
        match random.randrange(10):
            case 0 | 1:
                damaged[at] ^= 1 << random.randrange(8)
            case 2 | 3:
                damaged[at] = random.choice((*_BYTES, random.randrange(256)))
            case 4 | 5:
                width = random.choice((1, 2, 4, 8))
                value = random.choice(INTEGERS) & (1 << 8 * width) - 1
                damaged[at : at + width] = value.to_bytes(width, random.choice(("little", "little", "big")))
            case 6:
                del damaged[at : at + random.choice((1, 2, 8, 64, 1000))]
            case 7:
                piece = damaged[at : at + random.choice((1, 8, 64, 500))]
                to = random.randrange(len(damaged))
                damaged[to:to] = piece
            case 8:
                begin = random.randrange(max(len(other), 1))
                piece = other[begin : begin + random.choice((4, 32, 256))]
                damaged[at : at + random.choice((0, len(piece)))] = piece
            case 9:
                if random.random() < 0.5:
                    del damaged[at:]
                else:
                    damaged[at:at] = random.randbytes(random.choice((1, 4, 16)))
    return bytes(damaged)


def damage_json(text: str, random: Random) -> str:
    """One to three values replaced, removed, renamed or doubled."""
    document = [json.loads(text)]
    for _ in range(random.choice((1, 1, 2, 3))):
        spots = list(_spots(document))
        holder, key = random.choice(spots)
        match random.randrange(6):
            case 0 | 1 | 2:
                holder[key] = deepcopy(random.choice(_JSON_VALUES))  # which a later change must not change
            case 3:
                if holder is not document:
                    del holder[key]
            case 4:
                giver, other_key = random.choice(spots)
                holder[key] = json.loads(json.dumps(giver[other_key]))
            case 5:
                if isinstance(holder, dict):
                    holder[random.choice(("", "type", f"{key}x", "__class__"))] = holder.pop(key)
                else:
                    holder.insert(key, holder[key])
    damaged = json.dumps(document[0], ensure_ascii=random.random() < 0.5)
    return "[" * 20_000 + damaged if random.random() < 0.005 else damaged


def damage_cache(content: bytes, random: Random, other: bytes) -> bytes:
    """A prompt cache with a damaged header, ids or rows under a check sum that is right; see fbiedge/prompt_cache.py."""
    magic, (size,) = content[:8], struct.unpack_from("<I", content, 8)
    header, rest = content[12 : 12 + size], content[12 + size : -4]
    if random.random() < 0.4:
        header = damage_json(header.decode(), random).encode(errors="surrogatepass")
    else:
        tokens = 4 * json.loads(header)["tokens"]
        rest = damage_bytes(rest, random, [(0, tokens), (0, len(rest))], other)
    body = magic + struct.pack("<I", len(header)) + header + rest
    return body + struct.pack("<I", zlib.crc32(body))


def damage_model(content: bytes, random: Random) -> bytes:
    """One to three fields of an ONNX model changed, whatever they are of."""
    model = ModelProto.FromString(content)
    changes = random.choice((1, 1, 1, 2, 3))
    while changes:
        try:
            changes -= _damage_somewhere(model, random)
        except (ValueError, TypeError):
            continue  # a value that protobuf doesn't take there
    return bytes(model.SerializeToString())


def _damage_somewhere(model: ModelProto, random: Random) -> bool:
    """Walks down from the model, most often into its graph, and changes what it comes to; False in an empty message."""
    message: Message = model
    while fields := message.ListFields():
        field, value = random.choice(fields)
        if message is model and model.HasField("graph") and random.random() < 0.6:
            field, value = model.DESCRIPTOR.fields_by_name["graph"], model.graph
        many = isinstance(value, Sequence) and not isinstance(value, (bytes, str))
        if field.message_type is None or random.random() < 0.1:
            _damage_field(message, field, value, many, random)
            return True
        if many and random.random() < 0.15:
            _damage_list(value, random)
            return True
        message = random.choice(value) if many else value
    return False


def _damage_field(message: Any, field: Any, value: Any, many: bool, random: Random) -> None:
    if many:
        if field.message_type is None and random.random() < 0.6:
            value[random.randrange(len(value))] = _other(value[0], random)
        else:
            _damage_list(value, random)
    elif field.message_type is not None or random.random() < 0.1:
        message.ClearField(field.name)
    else:
        setattr(message, field.name, _other(value, random))


def _damage_list(values: Any, random: Random) -> None:
    at = random.randrange(len(values))
    match random.randrange(3):
        case 0:
            del values[at]
        case 1:
            values.append(values[at])
        case 2:
            kept = list(values)
            kept[at], kept[0] = kept[0], kept[at]
            copies = [type(kept[0]).FromString(v.SerializeToString()) if isinstance(v, Message) else v for v in kept]
            del values[:]
            values.extend(copies)


def _other(value: Any, random: Random) -> Any:
    """Another value of the type, within what protobuf takes for an int32 or int64."""
    if isinstance(value, bytes):
        if random.random() < 0.5 and value:
            at = random.randrange(len(value))
            return value[:at] + bytes([random.choice(_BYTES)]) + value[at + 1 :]
        return random.choice((*_TEXTS, value[: len(value) // 2], value * 2))
    if isinstance(value, str):
        choices = [text.decode(errors="ignore") for text in _TEXTS]
        return random.choice((*choices, value[:-1], value + "x", value.upper()))
    if isinstance(value, float):
        return random.choice((0.0, -1.0, 1e30, -1e-30, float("nan"), float("inf")))
    small = [number for number in INTEGERS if -(2**31) <= number < 2**31]
    return random.choice((*small, value + 1, max(value - 1, 0), value * 2 if abs(value) < 2**30 else 0))


def _spots(document: Any) -> Any:
    """Every (holder, key) in nested lists and dicts."""
    waiting = [document]
    while waiting:
        holder = waiting.pop()
        for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
            yield holder, key
            if isinstance(holder[key], (dict, list)) and holder[key]:
                waiting.append(holder[key])
