"""Text that must be what a JSON schema, a grammar or a regular expression says: which tokens may come next.

    constraint = compile_constraint(tokenizer, vocab_size, json_schema={"type": "object"})
    GenerationOptions(constraint=constraint)

llguidance does the work (extra `grammar`): an Earley parser over lexemes that are regular expressions walks a trie of
the tokens' bytes. It has no backtracking and limits of its own on the size of a grammar and on the work for one token.
A constraint is compiled once and serves many generations, each of which has a state.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import UsageError
from .tokenizer import Tokenizer

# Between the parts of JSON: nothing, a space, or a line break and indentation, as in llama.cpp. llguidance's own default
# is any whitespace, in which a small model loses itself.
_JSON_LAYOUT = {"whitespace_pattern": r"( |\n[ \t]{0,20})"}
_MOST_CHARACTERS = 1 << 20  # of a grammar or schema; llguidance refuses what is too large, but reads it first


class Constraint:
    """What a text must be. Use `compile_constraint`."""

    def __init__(self, matcher: Any, vocab_size: int, own_ends: tuple[int, ...]) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._own_ends = own_ends  # what llguidance takes for the ends of a text

    def start(self, ends: frozenset[int]) -> ConstraintState:
        """For one generation, in which each of `ends` ends the text."""
        return ConstraintState(self._matcher.deep_copy(), self._vocab_size, self._own_ends, ends)


class ConstraintState:
    """How far one text has come."""

    def __init__(self, matcher: Any, vocab_size: int, own_ends: tuple[int, ...], ends: frozenset[int]) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._own_ends = list(own_ends)
        self._ends = [token_id for token_id in ends if token_id < vocab_size]

    @property
    def finished(self) -> bool:
        """The text is whole and nothing can follow it."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    def allowed(self) -> npt.NDArray[np.bool_]:
        """Which tokens may come next [vocab], one at least; the ends may where the text is whole. Raises UsageError."""
        allowed: npt.NDArray[np.bool_] = (
            np.frombuffer(self._matcher.compute_logit_bias(), np.uint8)[: self._vocab_size] != 0
        )
        if self._matcher.is_error():
            raise UsageError(f"the grammar can't be kept to any further: {_first_line(self._matcher.get_error())}")
        allowed[self._own_ends] = False
        allowed[self._ends] = self._matcher.is_accepting()
        if not allowed.any():
            raise UsageError("the grammar can't be kept to any further: no token of this model goes on as it says")
        return allowed

    def accept(self, token_id: int) -> None:
        """The text goes on with `token_id`, which was allowed."""
        if token_id not in self._ends:
            self._matcher.consume_token(token_id)


def compile_constraint(
    tokenizer: Tokenizer,
    vocab_size: int,
    *,
    json_schema: dict[str, Any] | str | None = None,
    json_object: bool = False,
    grammar: str | None = None,
    regex: str | None = None,
) -> Constraint:
    """The constraint that exactly one of these describes.

    vocab_size: tokens that have logits. json_schema: also as its text. json_object: any JSON object.
    grammar: in Lark's or llama.cpp's (GBNF) notation. regex: the whole text matches it.
    Raises UsageError for what can't be compiled, and where llguidance is missing.
    """
    given = [json_schema is not None, json_object, grammar is not None, regex is not None]
    if sum(given) != 1:
        raise UsageError("expected exactly one of a JSON schema, JSON object, grammar and regular expression")
    library = _library()
    if json_object:
        json_schema = {"type": "object"}
    if json_schema is not None:
        kind, source = "JSON schema", _schema_text(json_schema)
        try:
            compiled = library.LLMatcher.grammar_from_json_schema(source, overrides=_JSON_LAYOUT)
        except ValueError as error:
            raise UsageError(f"the JSON schema can't be used: {_first_line(str(error))}") from error
    elif grammar is not None:
        kind = "grammar"
        compiled = library.LLMatcher.grammar_from_lark(_as_lark(grammar))
    else:
        kind = "regular expression"
        compiled = library.LLMatcher.grammar_from_regex(_bounded(kind, regex or ""))
    end = tokenizer.token_id(tokenizer.eos_token) if tokenizer.eos_token else None
    try:
        tokens = library.LLTokenizer(tokenizer.to_json(), n_vocab=max(vocab_size, tokenizer.vocab_size), eos_token=end)
    except Exception as error:  # the library raises nothing narrower
        raise UsageError(f"llguidance can't use this model's tokenizer: {_first_line(str(error))}") from error
    matcher = library.LLMatcher(tokens, compiled, log_level=0, limits=library.LLParserLimits(verbose_errors=False))
    if matcher.is_error():
        raise UsageError(f"the {kind} can't be used: {_first_line(matcher.get_error())}")
    return Constraint(matcher, vocab_size, tuple(tokens.eos_tokens))


def _schema_text(schema: dict[str, Any] | str) -> str:
    """The schema as JSON that is surely one value, because llguidance puts it between other text. Raises UsageError."""
    try:
        parsed = json.loads(_bounded("JSON schema", schema)) if isinstance(schema, str) else schema
        text = json.dumps(parsed, allow_nan=False)
    except (ValueError, TypeError) as error:
        raise UsageError(f"the JSON schema is no JSON: {_first_line(str(error))}") from error
    except RecursionError:
        raise UsageError("the JSON schema is nested too deeply to be read") from None
    if not isinstance(parsed, dict):  # true and false are schemas too, but say nothing, and llguidance refuses them
        raise UsageError(f"the JSON schema is {_shortened(text)}, expected an object")
    return _bounded("JSON schema", text)


def _as_lark(grammar: str) -> str:
    """A grammar in GBNF becomes one in Lark; one in Lark stays. Raises UsageError."""
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return str(any_to_lark(_bounded("grammar", grammar)))
    except UsageError:
        raise
    except RecursionError:
        raise UsageError("the grammar is nested too deeply to be read") from None
    except Exception as error:  # as many kinds as there are mistakes
        raise UsageError(f"the grammar can't be used: {_first_line(str(error))}") from error


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise UsageError(
            f"schemas, grammars and regular expressions need llguidance, which isn't installed ({error}): "
            "pip install 'fbiedge[grammar]'"
        ) from error
    return llguidance


def _bounded(kind: str, text: str) -> str:
    if len(text) > _MOST_CHARACTERS:
        raise UsageError(f"the {kind} has {len(text)} characters, expected at most {_MOST_CHARACTERS}")
    if not text.strip():
        raise UsageError(f"the {kind} is empty")
    return text


def _first_line(text: str) -> str:
    """The reason in one short line; llguidance's messages go on with excerpts."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    reason = next((line for line in lines if line.startswith("error: ")), lines[0] if lines else "it doesn't say why")
    return _shortened(reason.removeprefix("error: "))


def _shortened(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."
