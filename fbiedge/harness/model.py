"""Our runtime as a model of lm-evaluation-harness: whatever `fbiedge eval` opens, by the name `fbiedge`.

    python -m fbiedge.harness run --model fbiedge --model_args path=model.onnx --tasks piqa

is the harness's own command line with this model known to it; `import fbiedge.harness.model` makes it known anywhere.
Arguments: path; max_length (tokens of the window, by default 2048 and at most the model's context); threads.

It gives what the harness's own model of Hugging Face gives for the same weights: the same splits of context and
continuation, the same token in front of an empty context, the same cut from the left. Requests are taken in the order of
their tokens, and the cache is kept up to where the next one differs, so that what the options of a question share, and
the examples that many questions begin with, is read once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from ..engines import LogitEngine, open_logits
from ..errors import UsageError
from ..evaluation import CHUNK, WINDOW, Progress, finite_logits
from ..metrics import token_losses
from ..sampling import Sampler, SamplingOptions
from ..stop_strings import StopMatcher
from ..tokenizer import DetokenizeStream

_NEW_TOKENS = 256  # the harness's default

Request = tuple[Any, list[int], list[int]]  # what it is called, tokens of the context and of the continuation


@register_model("fbiedge")
class FbiEdgeLM(TemplateLM):  # type: ignore[misc, unused-ignore]
    """One model at a time, one request at a time."""

    def __init__(
        self,
        path: str | Path | LogitEngine,
        *,
        max_length: int | None = None,
        threads: int | None = None,
        progress: Progress | None = None,
        batch_size: object = None,
        max_batch_size: object = None,
        device: object = None,
    ) -> None:
        """`path` may also be an engine that is open. `progress` is told how many requests are done, instead of tqdm.

        What the harness gives every model and has no meaning here is ignored: batch_size, max_batch_size, device.
        Raises UsageError for a model without a tokenizer, and what `open_logits` raises.
        """
        super().__init__()
        if isinstance(path, (str, Path)):
            path = open_logits(Path(path), tokens=max_length or WINDOW, threads=threads)
        if path.tokenizer is None:
            raise UsageError(f"{path.path} has no tokenizer; put a tokenizer.json into its folder")
        self.engine = path
        self.max_length = min(max_length or WINDOW, path.capacity)
        self._tokenizer = path.tokenizer
        self._progress = progress
        self._cached: list[int] = []  # tokens that the engine holds
        bos, eos = (
            self._tokenizer.token_id(text) if text else None
            for text in (self._tokenizer.bos_token, self._tokenizer.eos_token)
        )
        self._prefix, self._eos = (eos if bos is None else bos), eos
        self._prefix_text = self._tokenizer.bos_token or self._tokenizer.eos_token
        self.engine.reset()

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text. Raises UsageError where there is none."""
        return self._special(self._eos)

    @property
    def prefix_token_id(self) -> int:
        """The token in front of what has no context. Raises UsageError where there is none."""
        return self._special(self._prefix)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Tokens of `string`, by default with the one that begins a text where the tokenizer puts one and it has none."""
        has_prefix = bool(self._prefix_text) and string.startswith(self._prefix_text)
        if add_special_tokens is False or (add_special_tokens is None and has_prefix):
            return self._tokenizer.encode_rendered(string)
        return self._tokenizer.encode(string)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """See LM."""
        quiet = disable_tqdm or self._progress is not None
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=quiet)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """See LM."""
        sums, windows = [0.0] * len(requests), []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                windows.append((number, *make_disjoint_window(window)))
        answers = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm, are_answers=False)
        for (number, *_), (loglikelihood, _) in zip(windows, answers, strict=True):
            sums[number] += loglikelihood
        for request, loglikelihood in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, loglikelihood)
        return sums

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, are_answers: bool = True
    ) -> list[tuple[float, bool]]:
        """`are_answers`: for the harness's cache, under the texts they are called."""
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        order = sorted(range(len(requests)), key=lambda index: requests[index][1] + requests[index][2])
        with self._bar(len(requests), disable_tqdm) as step:
            for index in order:
                name, context, continuation = requests[index]
                answers[index] = self._score(context, continuation)
                if are_answers:
                    self.cache_hook.add_partial("loglikelihood", name, answers[index])
                step()
        return answers

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """See LM."""
        texts = []
        with self._bar(len(requests), disable_tqdm) as step:
            for request in requests:
                texts.append(self._generate(*request.args))
                self.cache_hook.add_partial("generate_until", request.args, texts[-1])
                step()
        return texts

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Log-likelihood of `continuation` after `context` -> and whether each of its tokens is the most likely one."""
        if not 0 < len(continuation) <= self.max_length:
            raise UsageError(
                f"an answer has {len(continuation)} tokens of its own, expected 1 to {self.max_length}, which is the "
                "window; choose another with --window, or leave the question out"
            )
        # The last token is not read: nothing follows. The first of the continuation is predicted by the one before it.
        tokens = (context + continuation)[-(self.max_length + 1) :]
        first = len(tokens) - 1 - len(continuation)
        self._go_to(tokens[:first])
        loglikelihood, greedy = 0.0, True
        for start in range(first, len(tokens) - 1, CHUNK):
            targets = tokens[start + 1 : start + 1 + CHUNK]
            rows = self._logits(tokens[start : start + len(targets)])
            loglikelihood -= float(token_losses(rows, targets).sum())
            greedy = greedy and rows.argmax(axis=-1).tolist() == targets
        return loglikelihood, greedy

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        new = int(options.get("max_gen_toks") or options.get("max_new_tokens") or _NEW_TOKENS)
        if not 0 < new < self.max_length:
            raise UsageError(
                f"{new} new tokens are asked for, expected 1 to {self.max_length - 1}, less than the window"
            )
        until = options.get("until") or []
        stops = StopMatcher([stop for stop in ([until] if isinstance(until, str) else until) if stop])
        temperature = float(options.get("temperature") or 0.0)
        sampler = Sampler(
            SamplingOptions(
                temperature=(temperature or 1.0) if options.get("do_sample", temperature > 0) else 0.0,
                top_k=int(options.get("top_k") or 0), top_p=float(options.get("top_p") or 1.0), min_p=0.0, seed=0,
            )
        )  # fmt: skip
        ids = self.tok_encode(context)[-(self.max_length - new) :] or [self.prefix_token_id]
        self._go_to(ids[:-1])
        stream, text = DetokenizeStream(self._tokenizer), ""
        for _ in range(new):
            ids.append(sampler.sample(self._logits(ids[-1:])[-1], ids))
            if ids[-1] == self._eos:
                break
            text += stops.push(stream.push(ids[-1]))
            if stops.stopped:
                return text
        return text + stops.push(stream.flush()) + stops.flush()

    def _go_to(self, ids: list[int]) -> None:
        """Have exactly `ids` in the cache, of which what it holds already is not read again."""
        known = next(
            (at for at, pair in enumerate(zip(ids, self._cached, strict=False)) if pair[0] != pair[1]),
            min(len(ids), len(self._cached)),
        )
        self.engine.truncate(known)
        del self._cached[known:]
        if rest := ids[known:]:
            self.engine.feed(rest)
            self._cached += rest

    def _logits(self, ids: list[int]) -> Any:
        rows = finite_logits(self.engine, ids)
        self._cached += ids
        return rows

    def _special(self, token_id: int | None) -> int:
        if token_id is None:
            raise UsageError(
                f"the tokenizer of {self.engine.path} has no token that begins or ends a text; name it as bos_token or "
                "eos_token in tokenizer_config.json"
            )
        return token_id

    @contextmanager
    def _bar(self, total: int, disable_tqdm: bool) -> Iterator[Any]:
        """Yields what to call after each request."""
        if self._progress is None:
            with tqdm(total=total, disable=disable_tqdm, desc="fbiedge") as bar:
                yield lambda: bar.update(1)
            return
        progress, done = self._progress, 0

        def step() -> None:
            nonlocal done
            done += 1
            progress(done, total)

        yield step
