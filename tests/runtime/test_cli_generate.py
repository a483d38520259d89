"""`chat` and `generate` by their options: what is typed does what it says, and what can't be is one line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.bundled import MODEL

from .conftest import Run, one_error_line

GREEDY = ["--temperature", 0]
AGE = '{"type":"integer","minimum":0,"maximum":120}'  # without bounds a number may fill all tokens that there are
SCHEMA = f'{{"type":"object","properties":{{"age":{AGE}}},"required":["age"],"additionalProperties":false}}'


def test_a_prompt_from_a_file(fbiedge: Run, tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("Once upon a time\n", encoding="utf-8")
    arguments = ["generate", "--max-tokens", 10, *GREEDY]
    expected = fbiedge(*arguments, "-p", "Once upon a time")[1]
    assert expected.strip()
    for option in ("--file", "-f"):
        assert fbiedge(*arguments, option, path)[:2] == (0, expected)
    assert fbiedge(*arguments, "-f", "-", stdin="Once upon a time\n")[:2] == (0, expected)


def test_a_first_turn_from_a_file(fbiedge: Run, tmp_path: Path) -> None:
    path = tmp_path / "turn.txt"
    path.write_text("Tell me a story\nabout a dog.\n", encoding="utf-8")
    arguments = ["chat", "--max-tokens", 10, *GREEDY]
    code, out, err = fbiedge(*arguments, "--file", path, stdin="Thank you\n")
    assert (code, err) == (0, "")
    assert out.startswith(fbiedge(*arguments, "--file", path)[1])
    assert fbiedge(*arguments, "--file", path, stdin="/exit\n")[1] != out


def test_a_system_prompt_asks_by_the_template(fbiedge: Run, chat_model: Path) -> None:
    arguments = [chat_model, "--max-tokens", 10, *GREEDY, "--system", "Be brief."]
    code, out, err = fbiedge("generate", *arguments, "-p", "Hello")
    assert code == 0 and out == fbiedge("chat", *arguments, stdin="Hello\n")[1]
    assert "prefill 42 tokens" in err  # <s>[system]Be brief.</s>[user]Hello</s>[assistant]


def test_a_system_prompt_without_a_template(fbiedge: Run, plain_model: Path) -> None:
    message = one_error_line(fbiedge("generate", plain_model, "--system", "Be brief.", "-p", "Hello"))
    assert "no chat template" in message


def test_json_of_a_schema(fbiedge: Run, tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text(SCHEMA, encoding="utf-8")
    arguments = ["generate", "-p", "Lily is", "--seed", 1, "--max-tokens", 60]
    code, out, _ = fbiedge(*arguments, "--json-schema", SCHEMA)
    assert code == 0 and isinstance(json.loads(out)["age"], int)
    assert fbiedge(*arguments, "--json-schema-file", path)[1] == out
    assert fbiedge("chat", "--seed", 1, "--max-tokens", 60, "--json-schema", SCHEMA, stdin="Hello\n")[1].startswith("{")


def test_any_object(fbiedge: Run) -> None:
    """As --help says; without a type, it is any value."""
    arguments = ["generate", "-p", "Lily", *GREEDY, "--max-tokens", 40, "--json-schema"]
    assert fbiedge(*arguments, '{"type":"object"}')[1].startswith("{")
    assert isinstance(json.loads(fbiedge(*arguments, "{}")[1]), str)


def test_grammars_and_regular_expressions(fbiedge: Run, tmp_path: Path) -> None:
    path = tmp_path / "words.gbnf"
    path.write_text('root ::= " " ("yes" | "no") "!"', encoding="utf-8")
    for option, value in (("--grammar-file", path), ("--grammar", path.read_text()), ("--regex", " (yes|no)!")):
        code, out, err = fbiedge("generate", "-p", "Lily said", option, value)
        assert code == 0 and out in (" yes!\n", " no!\n")
        assert "ended by the model" in err


def test_a_biased_token(fbiedge: Run) -> None:
    arguments = ["generate", "-p", "Once upon a time", "--max-tokens", 3, *GREEDY]
    code, out, _ = fbiedge(*arguments, "--logit-bias", "500+100", "--logit-bias", "501-1e2")
    assert code == 0 and out != fbiedge(*arguments)[1]


def test_lookup_says_what_it_guessed(fbiedge: Run) -> None:
    arguments = ["generate", "-p", "Lily said", "--max-tokens", 100, *GREEDY]
    code, out, err = fbiedge(*arguments, "--lookup-tokens", 8)
    assert code == 0 and out == fbiedge(*arguments)[1]
    assert re.search(r"decode 100 tokens, [\d.]+ tok/s \(\d+ of \d+ guesses right\) · ", err)


def test_a_shift_is_said(fbiedge: Run) -> None:
    arguments = ["generate", "-p", "Lily said", "--max-tokens", 100, *GREEDY, "--context", 50]
    code, _, err = fbiedge(*arguments, "--context-shift", "--keep", 3)
    assert code == 0 and re.search(r"decode 100 tokens, .* · context \d+/50 \(\d+ tokens forgotten\) · ", err)
    assert "ended by the end of the context" in fbiedge(*arguments)[2]


def test_a_prompt_cache(fbiedge: Run, tmp_path: Path) -> None:
    path = tmp_path / "story.cache"
    arguments = ["generate", "-p", "Once upon a time", "--max-tokens", 10, *GREEDY, "--prompt-cache", path]
    code, out, err = fbiedge(*arguments)
    assert code == 0 and "cached" not in err
    code, again, err = fbiedge(*arguments)
    assert (code, again) == (0, out) and re.match(r"prefill 1 tokens \(\d+ cached\)", err)
    assert "of another engine" in one_error_line(fbiedge(*arguments, "--accuracy-level", "fp32"))
    chat = ["chat", "--max-tokens", 5, *GREEDY, "--prompt-cache", tmp_path / "chat.cache"]
    assert fbiedge(*chat, stdin="Hello\n") == fbiedge(*chat, stdin="Hello\n")


@pytest.mark.parametrize("how", [GREEDY, ["--seed", 4], ["--seed", 5, "--repetition-penalty", 1.2]])
def test_all_at_once(fbiedge: Run, tmp_path: Path, how: list[object]) -> None:
    """A constraint, a bias, a full context, guesses and a cache: none changes what the others do."""
    arguments = ["generate", "-p", "Lily", "--regex", "[a-z ]{200}", "--logit-bias", "264+1.5", "--context", 30, *how]
    arguments += ["--context-shift", "--stop", "zzz"]
    code, plain, err = fbiedge(*arguments)
    assert code == 0 and re.fullmatch("[a-z ]{200}\n", plain) and "tokens forgotten" in err
    for _ in range(2):  # the second from the file
        code, out, err = fbiedge(*arguments, "--lookup-tokens", 9, "--prompt-cache", tmp_path / "cache")
        assert (code, out) == (0, plain) and "tokens forgotten" in err
    assert "(1 cached)" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "a", "-f", "b"], "the prompt is given twice, expected one of --prompt and --file"),
        (["-f", "/nonexistent/prompt.txt"], "can't read the text /nonexistent/prompt.txt"),
        (["-f", str(MODEL)], "can't read the text"),
        (["-f", "/"], "can't read the text /: Is a directory"),
        (["-p", "a", "--json-schema", "{}", "--regex", "a"], "at most one of --json-schema, --grammar and --regex"),
        (["-p", "a", "--json-schema", "{}", "--json-schema-file", "x"], "one of --json-schema and --json-schema-file"),
        (["-p", "a", "--json-schema-file", "/nonexistent"], "can't read the text /nonexistent"),
        (["-p", "a", "--json-schema", "{"], "the JSON schema is no JSON"),
        (["-p", "a", "--regex", "("], "the regular expression can't be used"),
        (["-p", "a", "--grammar", "start: x"], "the grammar can't be used"),
        (["-p", "a", "--logit-bias", "5"], "--logit-bias is '5', expected a token id, + or -, and a number"),
        (["-p", "a", "--logit-bias", "x+1"], "--logit-bias is 'x+1'"),
        (["-p", "a", "--logit-bias", "-5+1"], "--logit-bias is '-5+1'"),
        (["-p", "a", "--logit-bias", "5+nan"], "logit_bias of token 5 is nan"),
        (["-p", "a", "--logit-bias", "5-inf"], "logit_bias of token 5 is -inf"),
        (["-p", "a", "--logit-bias", "5+1e9"], "expected a number from -100 to 100"),
        (["-p", "a", "--logit-bias", "2048+1"], "logit_bias names token 2048, expected an id from 0 to 2047"),
        (["-p", "a", "--logit-bias", "٣+1"], "--logit-bias is '٣+1'"),
        (["-p", "a", "--lookup-tokens", "-1"], "lookup_tokens is -1, expected a whole number from 0 to 127"),
        (["-p", "a", "--lookup-tokens", "1000"], "lookup_tokens is 1000"),
        (["-p", "a", "--keep", "-1", "--context-shift"], "keep_tokens is -1"),
        (["-p", "a", "--keep", "1"], "--keep has no effect without --context-shift; leave it out"),
        (["-p", "a", "--keep", "1", "--context-shift", "--system", "x"], "--keep has no effect with --system"),
    ],
)
def test_what_can_not_be(fbiedge: Run, arguments: list[str], message: str) -> None:
    assert message in one_error_line(fbiedge("generate", *arguments))


@pytest.mark.parametrize(
    "option", ["--max-tokens=0", "--temperature=nan", "--top-k=-1", "--lookup-tokens=-1", "--stop="]
)
def test_options_are_checked_before_a_model_is_opened(fbiedge: Run, option: str) -> None:
    """Opening a large one takes seconds."""
    for command in (["generate", "-p", "a"], ["chat"]):
        assert "expected" in one_error_line(fbiedge(*command, "/nonexistent/model.onnx", option))


def test_a_text_that_is_too_long_is_not_read_whole(
    fbiedge: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "large.txt"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    for option in ("--file", "--json-schema-file", "--grammar-file"):
        given = [] if option == "--file" else ["-p", "a"]
        line = one_error_line(fbiedge("generate", *given, option, path))
        assert line == f"error: {path} is too long, expected at most 64,000,000 characters\n"
    monkeypatch.setattr("fbiedge.cli_generate._MOST_CHARACTERS", 5)
    for arguments in ([], ["-p", "-"], ["-f", "-"]):
        line = one_error_line(fbiedge("generate", *arguments, stdin="123456"))
        assert line == "error: the prompt is too long, expected at most 5 characters\n"


def test_without_these_options_their_modules_are_not_loaded() -> None:
    """So that a chat starts as quickly and in as little memory as without them."""
    code = (
        "import sys; from fbiedge.cli import run; run(['generate', '-p', 'a', '--max-tokens', '2']);"
        "print([name for name in ('llguidance', 'fbiedge.constraint', 'fbiedge.prompt_cache') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
