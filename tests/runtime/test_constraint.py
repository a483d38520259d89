"""Texts that must be of a schema, a grammar or a regular expression: they are, whatever the model would like to say."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from support.bundled import MODEL
from support.errors import raises_line
from support.vocabularies import byte_level_metadata, sentence_piece_metadata

from fbiedge.constraint import Constraint, compile_constraint
from fbiedge.errors import UsageError
from fbiedge.generate import GenerationOptions, GenerationStats, Piece, generate
from fbiedge.gguf_tokenizer import sidecars_from_gguf
from fbiedge.initialize import byte_tokenizer
from fbiedge.model_file import ModelFile
from fbiedge.sampling import SamplingOptions
from fbiedge.tokenizer import Tokenizer

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 120}},
    "required": ["name", "age"],
    "additionalProperties": False,
}  # fmt: skip


def from_gguf(metadata: dict[str, Any]) -> Tokenizer:
    sidecars = sidecars_from_gguf(
        {key: np.array(v) if key.endswith(("_type", "scores")) else v for key, v in metadata.items()}
    )
    return Tokenizer(sidecars["tokenizer.json"], json.loads(sidecars["tokenizer_config.json"]))


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "bundled": lambda: Tokenizer.from_model(ModelFile.open(MODEL)),
    "bytes": lambda: Tokenizer(byte_tokenizer(), {"bos_token": "<s>", "eos_token": "</s>"}),
    "SentencePiece": lambda: from_gguf(sentence_piece_metadata()),
    "byte-level": lambda: from_gguf(byte_level_metadata("qwen2")),
}


class Babble:
    """An engine that says anything: random logits, some of them high for the tokens that end a text or are special."""

    def __init__(self, vocab_size: int, seed: int = 0, ends: Sequence[int] = ()) -> None:
        self.capacity, self.vocab_size, self.position = 10_000, vocab_size, 0
        self._random, self._ends = np.random.default_rng(seed), list(ends)

    def reuse(self, ids: Sequence[int]) -> int:
        return 0

    def truncate(self, length: int) -> None:
        self.position = length

    def forward(self, ids: Sequence[int], *, copy: bool = True) -> np.ndarray:
        return self.all_logits(ids)[-1]

    def all_logits(self, ids: Sequence[int]) -> np.ndarray:
        self.position += len(ids)
        logits = self._random.normal(0, 3, (len(ids), self.vocab_size)).astype(np.float32)
        logits[:, self._ends] += 10
        return logits


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return TOKENIZERS[request.param]()


def babble(
    tokenizer: Tokenizer, constraint: Constraint, seed: int, *, spare: int = 5, max_tokens: int = 2000, **options: Any
) -> tuple[str, GenerationStats]:
    """What comes of random logits; the vocabulary has `spare` more rows than the tokenizer has tokens."""
    end = tokenizer.token_id(tokenizer.eos_token)
    assert end is not None
    engine = Babble(tokenizer.vocab_size + spare, seed, [end])
    text = ""
    events = generate(
        engine, tokenizer, tokenizer.encode("x"),
        GenerationOptions(
            constraint=constraint, max_tokens=max_tokens,
            sampling=SamplingOptions(seed=seed, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0), **options,
        ),
        ends=frozenset({end}),
    )  # fmt: skip
    for event in events:
        if isinstance(event, Piece):
            text += event.text
    assert isinstance(event, GenerationStats)
    return text, event


def compiled(tokenizer: Tokenizer, spare: int = 5, **what: Any) -> Constraint:
    return compile_constraint(tokenizer, tokenizer.vocab_size + spare, **what)


@pytest.mark.parametrize("seed", range(5))
def test_json_of_a_schema(tokenizer: Tokenizer, seed: int) -> None:
    text, stats = babble(tokenizer, compiled(tokenizer, json_schema=PERSON), seed)
    person = json.loads(text)
    assert set(person) == {"name", "age"} and len(person["name"]) <= 12 and 0 <= person["age"] <= 120
    assert stats.finish_reason == "end"


@pytest.mark.parametrize("seed", range(3))
def test_a_regular_expression(tokenizer: Tokenizer, seed: int) -> None:
    expression = r"(red|blue) [a-z]{3,9}: [0-9]+(\.[0-9]+)? €"
    text, stats = babble(tokenizer, compiled(tokenizer, regex=expression), seed)
    assert re.fullmatch(expression, text) and stats.finish_reason == "end"


@pytest.mark.parametrize(
    "grammar",
    [
        'root ::= "(" sum ")"\nsum ::= number ("+" number)*\nnumber ::= [0-9] [0-9]?',  # llama.cpp's notation
        'start: "(" sum ")"\nsum: number ("+" number)*\nnumber: /[0-9][0-9]?/',  # Lark's
    ],
    ids=["gbnf", "lark"],
)
def test_a_grammar(tokenizer: Tokenizer, grammar: str) -> None:
    for seed in range(3):
        text, stats = babble(tokenizer, compiled(tokenizer, grammar=grammar), seed)
        assert re.fullmatch(r"\(\d\d?(\+\d\d?)*\)", text) and stats.finish_reason == "end"


def test_any_json_object(tokenizer: Tokenizer) -> None:
    """As random as it comes, it may be long; what is cut off is the beginning of one."""
    constraint = compiled(tokenizer, json_object=True)
    for seed in range(5):
        text, stats = babble(tokenizer, constraint, seed, max_tokens=300)
        if stats.finish_reason == "end":
            assert isinstance(json.loads(text), dict)
        else:
            assert stats.finish_reason == "length" and text.startswith("{")


def test_an_end_comes_only_where_the_text_is_whole(tokenizer: Tokenizer) -> None:
    """The engine would end at once; a text of which more could follow ends by the model's own token."""
    text, stats = babble(tokenizer, compiled(tokenizer, regex="[ab]{3,}"), 0)
    assert re.fullmatch("[ab]{3,}", text)
    assert stats.ended_by == tokenizer.token_id(tokenizer.eos_token)


def test_an_end_that_the_library_does_not_know(tokenizer: Tokenizer) -> None:
    """Models end their texts by several tokens; those that tokenizer.json says nothing of count too."""
    state = compiled(tokenizer, regex="a?").start(frozenset({7, 10**6}))
    allowed = state.allowed()
    own = tokenizer.token_id(tokenizer.eos_token)
    assert allowed[7] and not allowed[own]
    state.accept(7)


def test_without_any_end_the_text_still_ends(tokenizer: Tokenizer) -> None:
    constraint = compiled(tokenizer, regex="abc")
    engine = Babble(tokenizer.vocab_size + 5)
    *_, stats = generate(
        engine, tokenizer, tokenizer.encode("x"), GenerationOptions(constraint=constraint), ends=frozenset()
    )
    assert isinstance(stats, GenerationStats)
    assert tokenizer.decode(stats.generated_ids).strip() == "abc" and stats.finish_reason == "end"


def test_one_constraint_serves_many_generations(tokenizer: Tokenizer) -> None:
    constraint = compiled(tokenizer, json_schema=PERSON)
    first = [babble(tokenizer, constraint, seed)[0] for seed in range(3)]
    assert [babble(tokenizer, constraint, seed)[0] for seed in range(3)] == first
    states = [constraint.start(frozenset()) for _ in range(2)]
    before = states[0].allowed()
    states[1].accept(int(np.flatnonzero(states[1].allowed())[0]))
    np.testing.assert_array_equal(states[0].allowed(), before)


@pytest.mark.parametrize("options", [{"logit_bias": {0: 100.0, 1: 100.0, 2: 100.0}}, {"lookup_tokens": 16}])
def test_with_other_options(tokenizer: Tokenizer, options: dict[str, Any]) -> None:
    for seed in range(3):
        text, _ = babble(tokenizer, compiled(tokenizer, json_schema=PERSON), seed, **options)
        assert set(json.loads(text)) == {"name", "age"}


def nested(depth: int) -> str:
    return '{"properties":{"a":' * depth + "{}" + "}}" * depth


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"json_schema": "{"}, "the JSON schema is no JSON"),
        ({"json_schema": ""}, "the JSON schema is empty"),
        ({"json_schema": "[]"}, "the JSON schema is [], expected an object"),
        ({"json_schema": "true"}, "the JSON schema is true, expected an object"),
        ({"json_schema": '{"type": "object"}, "lark_grammar": "start: /x/"'}, "the JSON schema is no JSON"),
        ({"json_schema": {"type": "frob"}}, "the JSON schema can't be used"),
        ({"json_schema": {"minimum": float("nan")}}, "the JSON schema is no JSON"),
        ({"json_schema": {"a": {1, 2}}}, "the JSON schema is no JSON"),
        ({"json_schema": {"$ref": "#/nowhere"}}, "the JSON schema can't be used"),
        ({"json_schema": {"$ref": "http://127.0.0.1:9/x.json"}}, "the JSON schema can't be used"),
        ({"json_schema": {"$ref": "file:///etc/passwd"}}, "the JSON schema can't be used"),
        ({"json_schema": {"not": {}}}, "the JSON schema can't be used"),
        ({"json_schema": {"enum": []}}, "the JSON schema can't be used"),
        ({"json_schema": {"type": "string", "minLength": 10**12}}, "the JSON schema can't be used"),
        ({"json_schema": {"properties": {f"k{i}": {"type": "string"} for i in range(20_000)}}}, "schema"),
        ({"json_schema": nested(400)}, "the JSON schema can't be used: recursion limit"),
        ({"json_schema": nested(100_000)}, "the JSON schema"),
        ({"json_schema": " " * (1 << 21)}, "expected at most 1048576"),
        ({"regex": "(a"}, "the regular expression can't be used"),
        ({"regex": ""}, "the regular expression is empty"),
        ({"regex": "(?=a)b"}, "the regular expression can't be used"),
        ({"grammar": "start: nowhere"}, "the grammar can't be used"),
        ({"grammar": "root ::= (((("}, "the grammar can't be used"),
        ({"grammar": "root ::= " + "(" * 100_000}, "the grammar"),
        ({"grammar": "start: " + "(" * 50_000 + '"a"' + ")" * 50_000}, "the grammar can't be used"),
        ({"grammar": "\0\x1b[2J"}, "the grammar can't be used"),
        ({}, "expected exactly one"),
        ({"regex": "a", "json_object": True}, "expected exactly one"),
    ],
)  # fmt: skip
def test_what_can_not_be(what: dict[str, Any], message: str) -> None:
    tokenizer = TOKENIZERS["bundled"]()
    started = time.monotonic()
    with raises_line(UsageError, message):
        compiled(tokenizer, **what)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "what",
    [
        {"regex": "(a+)+b"},  # what brings a backtracking matcher to its knees
        {"regex": "(x+x+)+y"},
        {"regex": "(.*a){20}.*"},
        {"regex": "((a{1,1000}){1,1000}){1,1000}"},
        {"regex": "(.|a|b)*" * 50},
        {"json_schema": {"type": "array", "minItems": 1_000_000, "items": {"type": "string"}}},
        {"json_schema": {"$ref": "#"}},
        {
            "json_schema": {
                "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]}},
                "$ref": "#/$defs/a",
            }
        },
        {"grammar": 'start: a\na: a a | "x" | ""'},  # ambiguous without end
        {"grammar": 'start: a\na: b\nb: a | "x"'},
    ],
)
def test_what_would_take_forever(what: dict[str, Any]) -> None:
    """An answer in bounded time: some tokens, or an error of one line."""
    tokenizer = TOKENIZERS["bundled"]()
    started = time.monotonic()
    try:
        babble(tokenizer, compiled(tokenizer, **what), 0, max_tokens=40)
    except UsageError as error:
        assert "\n" not in str(error)
    assert time.monotonic() - started < 10


def test_a_grammar_that_no_text_satisfies() -> None:
    tokenizer = TOKENIZERS["bundled"]()
    with raises_line(UsageError, "the grammar can't be kept to"):
        babble(tokenizer, compiled(tokenizer, json_schema={"$ref": "#"}), 0)


def test_llguidance_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with raises_line(UsageError, "pip install 'fbiedge[grammar]'"):
        compiled(TOKENIZERS["bytes"](), regex="a")


def test_it_is_loaded_only_where_it_is_asked_for() -> None:
    import subprocess

    code = "import sys, fbiedge.cli, fbiedge.generate, fbiedge.chat; print('llguidance' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"  # noqa: PLW1510
