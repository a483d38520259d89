"""Samplers against their definitions, written out token by token, and against Hugging Face's processors."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fbiedge.errors import ModelFileError, UsageError
from fbiedge.sampling import PENALTY_WINDOW, Sampler, SamplingOptions, candidates, penalize

ALL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def by_definition(logits: np.ndarray, options: SamplingOptions) -> dict[int, float]:
    """Token -> probability after temperature, top-k, top-p, min-p, in plain Python."""
    largest = float(max(logits))
    weights = {t: math.exp((float(x) - largest) / options.temperature) for t, x in enumerate(logits)}
    order = sorted(weights, key=lambda t: (-weights[t], t))
    if options.top_k:
        order = order[: options.top_k]
    total = sum(weights[t] for t in order)
    reached, kept = 0.0, []
    for token in order:
        if kept and reached >= options.top_p * total and options.top_p < 1:
            break
        kept.append(token)
        reached += weights[token]
    kept = [token for token in kept if weights[token] >= options.min_p * weights[kept[0]]]
    total = sum(weights[t] for t in kept)
    return {token: weights[token] / total for token in kept}


@pytest.mark.parametrize("vocab", [1, 2, 7, 300, 5000])
@pytest.mark.parametrize("spread", [0.5, 6.0])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 4.0},
        {"top_k": 1},
        {"top_k": 5},
        {"top_k": 10**6},
        {"top_p": 0.0},
        {"top_p": 0.4},
        {"top_p": 0.97},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.05},
    ],
)
def test_candidates_are_those_of_the_definition(vocab: int, spread: float, changes: dict[str, float]) -> None:
    logits = np.random.default_rng(vocab).normal(0, spread, vocab).astype(np.float32)
    options = SamplingOptions(**(ALL | changes))
    expected = by_definition(logits, options)
    tokens, weights = candidates(logits, options)
    got = dict(zip(tokens.tolist(), weights / weights.sum(), strict=True))
    assert got.keys() == expected.keys()
    if 0 < options.top_k < vocab or options.top_p < 1 or options.min_p > 0:
        assert list(got) == list(expected)  # the most likely first
    np.testing.assert_allclose([got[token] for token in expected], list(expected.values()), rtol=1e-9)


def test_equal_logits_are_cut_in_favour_of_lower_ids() -> None:
    logits = np.array([0, 3, 3, 1, 3, 3], np.float32)
    assert candidates(logits, SamplingOptions(**(ALL | {"top_k": 3})))[0].tolist() == [1, 2, 4]
    assert candidates(logits, SamplingOptions(**(ALL | {"top_p": 0.3})))[0].tolist() == [1, 2]
    assert Sampler(SamplingOptions(temperature=0)).sample(logits) == 1


@pytest.mark.parametrize("count", [1, 3, 40, 900])
@pytest.mark.parametrize("distinct", [1, 5, 10**6])
def test_equal_logits_in_a_large_vocabulary(count: int, distinct: int) -> None:
    logits = np.random.default_rng(count).integers(0, distinct, 32_003).astype(np.float32)
    expected = sorted(range(len(logits)), key=lambda token: (-logits[token], token))[:count]
    assert candidates(logits, SamplingOptions(**(ALL | {"top_k": count, "temperature": 1e6})))[0].tolist() == expected


@pytest.mark.parametrize("changes", [{"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.1}, {"temperature": 0.6, "top_p": 0.5}])
def test_the_tokens_left_are_hugging_faces(changes: dict[str, float]) -> None:
    torch = pytest.importorskip("torch")
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = np.random.default_rng(1).normal(0, 2, 400).astype(np.float32)
    options = SamplingOptions(**(ALL | changes))
    scores = torch.from_numpy(logits)[None]
    steps = [TemperatureLogitsWarper(options.temperature)]
    steps += [TopKLogitsWarper(options.top_k)] if options.top_k else []
    steps += [TopPLogitsWarper(options.top_p)] if options.top_p < 1 else []
    steps += [MinPLogitsWarper(options.min_p)] if options.min_p else []
    for step in steps:
        scores = step(None, scores)
    left = torch.isfinite(scores[0]).nonzero().flatten().tolist()
    tokens, weights = candidates(logits, options)
    assert sorted(tokens.tolist()) == left
    np.testing.assert_allclose(weights / weights.sum(), torch.softmax(scores[0], 0).numpy()[tokens], rtol=1e-5)


def test_draws_follow_the_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    sampler = Sampler(SamplingOptions(**ALL, seed=7))
    draws = 20_000
    counts = np.bincount([sampler.sample(logits) for _ in range(draws)], minlength=4)
    # Four standard deviations of a binomial with p = 0.5.
    np.testing.assert_allclose(counts / draws, [0.5, 0.3, 0.15, 0.05], atol=4 * 0.5 / math.sqrt(draws))


def test_a_seed_repeats_its_draws_and_another_does_not() -> None:
    logits = np.random.default_rng(0).normal(0, 1, 100).astype(np.float32)

    def draws(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingOptions(**ALL, seed=seed))
        return [sampler.sample(logits) for _ in range(30)]

    assert draws(3) == draws(3)
    assert draws(3) != draws(4)
    assert draws(None) != draws(None)


def test_temperature_zero_is_the_largest_logit_whatever_else_is_set() -> None:
    generator = np.random.default_rng(5)
    sampler = Sampler(SamplingOptions(temperature=0, top_k=3, top_p=0.1, min_p=0.5))
    for _ in range(20):
        logits = generator.normal(0, 1, 50).astype(np.float32)
        assert sampler.sample(logits) == max(range(50), key=lambda t: logits[t])


def test_tiny_temperature_is_greedy_without_overflow() -> None:
    logits = np.array([-1e4, 1e4, 9e3], np.float32)
    with np.errstate(over="raise", invalid="raise"):
        assert Sampler(SamplingOptions(temperature=1e-30)).sample(logits) == 1


def test_penalty_divides_positive_and_multiplies_negative_logits_once() -> None:
    logits = np.array([2.0, -2.0, 1.0, -1.0], np.float32)
    np.testing.assert_array_equal(penalize(logits, [0, 1, 0, 0], 2.0), [1.0, -4.0, 1.0, -1.0])
    np.testing.assert_array_equal(logits, [2.0, -2.0, 1.0, -1.0])


def test_penalty_is_hugging_faces() -> None:
    torch = pytest.importorskip("torch")
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = np.random.default_rng(2).normal(0, 2, 50).astype(np.float32)
    seen = [3, 3, 49, 0, 17]
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([seen]), torch.from_numpy(logits.copy())[None])[0]
    np.testing.assert_allclose(penalize(logits, seen, 1.3), expected.numpy(), rtol=1e-6)


def test_penalty_forgets_what_is_long_ago() -> None:
    logits = np.array([1.0, 0.9], np.float32)
    sampler = Sampler(SamplingOptions(temperature=0, repetition_penalty=2.0))
    assert sampler.sample(logits, [0]) == 1
    assert sampler.sample(np.append(logits, 0), [0] + [2] * PENALTY_WINDOW) == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("temperature", 1e-310),
        ("temperature", 1e300),
        ("temperature", 10**400),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("top_p", -0.1),
        ("min_p", 2),
        ("min_p", math.nan),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1),
        ("repetition_penalty", 1e-320),
        ("repetition_penalty", 1e300),
        ("repetition_penalty", math.nan),
        ("seed", -1),
        ("seed", True),
    ],
)
def test_unusable_values_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=name):
        SamplingOptions(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_reported(value: float) -> None:
    with pytest.raises(ModelFileError, match="NaN or Inf"):
        Sampler(SamplingOptions(temperature=0)).sample(np.array([1, value, 2], np.float32))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("temperature", [1e-30, 1.0, 1e6])
@pytest.mark.parametrize("penalty", [0.01, 100.0])
def test_the_bounds_themselves_are_quiet(temperature: float, penalty: float) -> None:
    sampler = Sampler(SamplingOptions(temperature=temperature, repetition_penalty=penalty, top_p=1e-320, min_p=1e-320))
    assert 0 <= sampler.sample(np.array([-1e30, 1e30, 0, -math.inf], np.float32), [0, 1, 2]) < 4
    with pytest.raises(ModelFileError, match="NaN or Inf"):
        Sampler(SamplingOptions(repetition_penalty=0.01)).sample(np.array([1, 3e38], np.float32), [1])


def test_generation_config_recommends_and_the_user_decides() -> None:
    raw = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": 2, "do_sample": True}
    assert SamplingOptions.from_generation_config(raw, top_p=0.5, top_k=None) == SamplingOptions(
        temperature=0.6, top_p=0.5
    )
    assert SamplingOptions.from_generation_config({"do_sample": False}).temperature == 0
    assert SamplingOptions.from_generation_config({"do_sample": False}, temperature=1.0).temperature == 1.0


def test_a_bias_is_added_first() -> None:
    logits = np.array([1.0, 2.0, 3.0], np.float32)
    greedy = SamplingOptions(temperature=0)
    assert Sampler(greedy, logit_bias={0: 5.0}).sample(logits) == 0
    assert Sampler(greedy, logit_bias={2: -100.0}).sample(logits) == 1
    assert (logits == [1, 2, 3]).all(), "they are the caller's"
    # 2.0 + 5.0 is divided by the penalty, and not the 2.0 alone.
    assert Sampler(SamplingOptions(temperature=0, repetition_penalty=3.0), logit_bias={1: 5.0}).sample(logits, [1]) == 2


class Allowing:
    """A constraint that allows the same tokens at every step."""

    def __init__(self, size: int, *tokens: int) -> None:
        self.mask = np.zeros(size, bool)
        self.mask[list(tokens)] = True
        self.accepted: list[int] = []

    def allowed(self) -> np.ndarray:
        return self.mask

    def accept(self, token_id: int) -> None:
        self.accepted.append(token_id)


@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(temperature=0),
        SamplingOptions(seed=0),
        SamplingOptions(seed=0, temperature=5.0, top_k=0, top_p=1.0, min_p=0.0),
        SamplingOptions(seed=0, temperature=5.0, top_k=100, top_p=1.0, min_p=0.0),
        SamplingOptions(seed=0, temperature=1.0, top_k=0, top_p=0.99, min_p=0.0, repetition_penalty=2.0),
    ],
)
@pytest.mark.filterwarnings("error")
def test_only_what_is_allowed_is_drawn(options: SamplingOptions) -> None:
    generator = np.random.default_rng(0)
    allowing = Allowing(500, 3, 77, 400)
    sampler = Sampler(options, constraint=allowing)  # type: ignore[arg-type]
    drawn = [sampler.sample(generator.normal(0, 5, 500).astype(np.float32), [3, 5]) for _ in range(300)]
    assert set(drawn) == {3, 77, 400}
    assert allowing.accepted == drawn


def test_a_draw_at_the_very_end_is_a_token_with_weight() -> None:
    """Of tokens without any weight, which a constraint leaves behind, none is drawn even where rounding points at them."""
    sampler = Sampler(SamplingOptions(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0))

    class Last:
        def random(self) -> float:
            return 1.0

    sampler._random = Last()  # type: ignore[assignment]
    assert sampler.sample(np.array([0.0, 1.0, -np.inf, -np.inf], np.float32)) == 1
