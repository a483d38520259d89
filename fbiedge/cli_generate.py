"""The commands `fbiedge chat` and `fbiedge generate`: the same options over the same loop. Their names are llama.cpp's
where it has them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_support import open_model, read_text
from .errors import UsageError

if TYPE_CHECKING:
    from .cached_session import CachedSession
    from .generate import GenerationOptions
    from .prompt_cache import PromptCache
    from .tokenizer import Tokenizer

_MOST_CHARACTERS = 64_000_000  # of a prompt, schema or grammar: more is a mistake, and takes minutes to be found one

Model = Annotated[Path | None, typer.Argument(help="model.onnx or model.gguf; default: the bundled model")]
Threads = Annotated[int | None, typer.Option(help="threads; by default and at most one for each core")]
AccuracyLevel = Annotated[str | None, typer.Option(help="activations: int8 or fp32; default: the model's")]
Context = Annotated[
    int | None, typer.Option(help="tokens the KV cache holds; default: the model's most (a GGUF: in 2 GiB)")
]
MaxTokens = Annotated[int | None, typer.Option(help="stop after this many tokens")]
Temperature = Annotated[float | None, typer.Option(help="0 always picks the most likely token")]
TopK = Annotated[int | None, typer.Option(help="keep the k most likely tokens; 0 keeps all")]
TopP = Annotated[float | None, typer.Option(help="keep the most likely tokens up to this probability; 1 keeps all")]
MinP = Annotated[float | None, typer.Option(help="keep tokens with this share of the best's probability")]
Penalty = Annotated[float | None, typer.Option(help="above 1 makes recent tokens less likely")]
Seed = Annotated[int | None, typer.Option(help="the same seed gives the same text")]
Stop = Annotated[list[str] | None, typer.Option(help="end the text before this string; may be given again")]
LogitBias = Annotated[
    list[str] | None,
    typer.Option(metavar="ID(+|-)BIAS", help="make a token likelier, 15+1, or never, 15-100; may be given again"),
]
JsonSchema = Annotated[str | None, typer.Option(help='the text is JSON of this schema; {"type":"object"}: any object')]
JsonSchemaFile = Annotated[Path | None, typer.Option(help="the same, from a file")]
Grammar = Annotated[str | None, typer.Option(help="the text is of this grammar, in GBNF or Lark notation")]
GrammarFile = Annotated[Path | None, typer.Option(help="the same, from a file")]
Regex = Annotated[str | None, typer.Option(help="the text matches this regular expression")]
LookupTokens = Annotated[
    int,
    typer.Option(
        help="guess so many tokens ahead from the text so far, and check them at once: quicker where it repeats"
    ),
]
Cache = Annotated[Path | None, typer.Option(help="file that keeps the prompt's KV cache, for the next start")]


def chat(
    model: Model = None,
    system: Annotated[str | None, typer.Option(help="system prompt")] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="the first turn, from a file")] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    seed: Seed = None,
    stop: Stop = None,
    logit_bias: LogitBias = None,
    json_schema: JsonSchema = None,
    json_schema_file: JsonSchemaFile = None,
    grammar: Grammar = None,
    grammar_file: GrammarFile = None,
    regex: Regex = None,
    lookup_tokens: LookupTokens = 0,
    context_shift: Annotated[
        bool,
        typer.Option("--context-shift/--no-context-shift", help="forget the oldest turns when the context is full"),
    ] = True,
    prompt_cache: Cache = None,
    threads: Threads = None,
    accuracy_level: AccuracyLevel = None,
    context: Context = None,
) -> None:
    """Chat with a model. In a pipe, every line is a turn."""
    from . import terminal
    from .chat import Chat

    first = None if file is None else _prompt_file(file)
    settings = _Settings(
        json_schema=json_schema, json_schema_file=json_schema_file, grammar=grammar, grammar_file=grammar_file,
        regex=regex, logit_bias=logit_bias, max_tokens=max_tokens, stop=stop, lookup_tokens=lookup_tokens,
        context_shift=context_shift, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, seed=seed,
    )  # fmt: skip
    session = open_model(model, threads, accuracy_level, context)
    options = settings.options(session)
    conversation = Chat(session, options, system=system, prompt_cache=_open_cache(prompt_cache, session))
    terminal.run_chat(conversation, first=first)


def generate(
    model: Model = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="text to continue; absent or -: read it from a pipe"),
    ] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="text to continue, from a file")] = None,
    system: Annotated[
        str | None, typer.Option(help="system prompt; the text is then a question, by the model's chat template")
    ] = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    seed: Seed = None,
    stop: Stop = None,
    logit_bias: LogitBias = None,
    json_schema: JsonSchema = None,
    json_schema_file: JsonSchemaFile = None,
    grammar: Grammar = None,
    grammar_file: GrammarFile = None,
    regex: Regex = None,
    lookup_tokens: LookupTokens = 0,
    context_shift: Annotated[
        bool,
        typer.Option(
            "--context-shift/--no-context-shift", help="forget the oldest text when the context is full, and go on"
        ),
    ] = False,
    keep: Annotated[
        int | None, typer.Option(help="tokens of the prompt's start that a shift never forgets; 1 if not given")
    ] = None,
    prompt_cache: Cache = None,
    threads: Threads = None,
    accuracy_level: AccuracyLevel = None,
    context: Context = None,
) -> None:
    """Continue a text on stdout; speed goes to stderr."""
    from . import terminal
    from .chat import Chat
    from .generate import end_tokens
    from .generate import generate as run
    from .tokenizer import Tokenizer

    if file is not None:
        if prompt is not None:
            raise UsageError("the prompt is given twice, expected one of --prompt and --file")
        prompt = _prompt_file(file)
    elif prompt is None or prompt == "-":
        prompt = terminal.read_prompt(_MOST_CHARACTERS)
    if keep is not None and (system is not None or not context_shift):
        why = "without --context-shift" if system is None else "with --system, all of which is kept"
        raise UsageError(f"--keep has no effect {why}; leave it out")
    settings = _Settings(
        json_schema=json_schema, json_schema_file=json_schema_file, grammar=grammar, grammar_file=grammar_file,
        regex=regex, logit_bias=logit_bias, max_tokens=max_tokens, stop=stop, lookup_tokens=lookup_tokens,
        context_shift=context_shift, keep_tokens=1 if keep is None else keep, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, seed=seed,
    )  # fmt: skip
    session = open_model(model, threads, accuracy_level, context)
    tokenizer = Tokenizer.from_model(session.model)
    options = settings.options(session, tokenizer)
    cache = _open_cache(prompt_cache, session)
    with terminal.interruptible() as cancelled:
        if system is None:
            ends = end_tokens(session.model, tokenizer)
            events = run(session, tokenizer, tokenizer.encode(prompt), options, ends=ends, cancelled=cancelled)
            events = cache.keep(events) if cache else events
        else:
            events = Chat(session, options, system=system, prompt_cache=cache).ask(prompt, cancelled)
        stats = terminal.stream_answer(events)
    terminal.print_stats(stats, session, engine=True)
    if stats.finish_reason == "cancelled":
        raise typer.Exit(130)


class _Settings:
    """Options as they were typed; what needs no model is checked at once, before one is opened. Raises UsageError."""

    def __init__(
        self,
        *,
        json_schema: str | None,
        json_schema_file: Path | None,
        grammar: str | None,
        grammar_file: Path | None,
        regex: str | None,
        logit_bias: list[str] | None,
        max_tokens: int | None,
        stop: list[str] | None,
        lookup_tokens: int,
        context_shift: bool,
        keep_tokens: int = 1,
        **sampling: Any,
    ) -> None:
        from .generate import GenerationOptions
        from .sampling import SamplingOptions

        texts = {
            "json_schema": _either("--json-schema", json_schema, json_schema_file),
            "grammar": _either("--grammar", grammar, grammar_file),
            "regex": regex,
        }
        self._constraint: dict[str, Any] = {name: text for name, text in texts.items() if text is not None}
        if len(self._constraint) > 1:
            raise UsageError("expected at most one of --json-schema, --grammar and --regex")
        self._sampling = {name: value for name, value in sampling.items() if value is not None}
        self._options = GenerationOptions(
            max_tokens=max_tokens,
            stop=tuple(stop or ()),
            sampling=SamplingOptions(**self._sampling),
            logit_bias=dict(_bias(text) for text in logit_bias or ()),
            lookup_tokens=lookup_tokens,
            context_shift=context_shift,
            keep_tokens=keep_tokens,
        )

    def options(self, session: CachedSession, tokenizer: Tokenizer | None = None) -> GenerationOptions:
        """For the model of `session`. Raises UsageError."""
        from .sampling import SamplingOptions

        recommended = session.model.json_object("generation_config")
        options = replace(self._options, sampling=SamplingOptions.from_generation_config(recommended, **self._sampling))
        if not self._constraint:
            return options
        from .constraint import compile_constraint
        from .tokenizer import Tokenizer

        tokenizer = tokenizer or Tokenizer.from_model(session.model)
        return replace(options, constraint=compile_constraint(tokenizer, session.vocab_size, **self._constraint))


def _open_cache(path: Path | None, session: CachedSession) -> PromptCache | None:
    if path is None:
        return None
    from .prompt_cache import PromptCache

    return PromptCache(path, session)


def _prompt_file(path: Path) -> str:
    """Its text without its last line break, which editors add."""
    if str(path) == "-":
        from . import terminal

        return terminal.read_prompt(_MOST_CHARACTERS)
    return read_text(path, _MOST_CHARACTERS).removesuffix("\n")


def _either(option: str, text: str | None, path: Path | None) -> str | None:
    if text is not None and path is not None:
        raise UsageError(f"expected one of {option} and {option}-file")
    return text if path is None else read_text(path, _MOST_CHARACTERS)


def _bias(text: str) -> tuple[int, float]:
    """`15043+1` or `15043-0.5`."""
    found = re.fullmatch(r"([0-9]{1,9})([+-].+)", text)
    try:
        if found:
            return int(found[1]), float(found[2])
    except ValueError:
        pass
    raise UsageError(f"--logit-bias is {text!r}, expected a token id, + or -, and a number, such as 15043+1")
