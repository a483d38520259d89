"""The page's JavaScript computes what the Python of the same name does: ids, text, prompts, candidates."""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.bundled import MODEL, UNSEEN_STORY
from support.tiny_model import CHAT_TEMPLATE, tiny_model

from fbiedge.chat_template import ChatTemplate, Message
from fbiedge.model_file import ModelFile
from fbiedge.sampling import SamplingOptions, candidates, penalize
from fbiedge.tokenizer import Tokenizer
from fbiedge.web.description import describe

TEXTS = [
    UNSEEN_STORY,
    "",
    " ",
    "  two  spaces   three ",
    "line\nbreaks\n\n\nand\ttabs\r\n mixed \n",
    "It's we've I'LL don't 12345 3.14 a1b2 $5 #x @y 50%",
    "Ünïcödé naïve Straße ﬁ Å café",
    "日本語のテキスト 中文 한국어 العربية עברית हिन्दी ไทย",
    "🐶👩‍👩‍👧‍👦🏳️‍🌈 👍🏽 mid🎉word",
    "control \x00\x01\x1f characters \x7f \x85 next line",
    "\ufeffbyte order mark and \u200b zero width \u00a0 no-break \u2003 em \u3000 ideographic",
    "<|user|>special<|end|><|assistant|> tokens </s> in text <s>",
    "<|user |> almost <|us",
    "\ue000private\ue001 use \U000f0000",
    "a" * 300,
    "é" * 99 + "🐶" * 33,
]
TEMPLATES = {
    "tiny": CHAT_TEMPLATE,
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] | trim + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "loops": "{%- for m in messages -%}\n  {%- if loop.first and m.role == 'system' -%}{%- continue -%}{%- endif %}\n"
    "{{ loop.index0 }}:{{ m.role | upper }}={{ m.content | tojson }}{% if not loop.last %}, {% endif %}\n{%- endfor %}"
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "generation": "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}[{{ m.content }}]{% endif %}{% endfor %}{% if tools is not none %}tools{% endif %}",
}
MESSAGES: list[Message] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": ' Say "hi" <b> & \\ 🐶 '},
    {"role": "assistant", "content": "hi\n"},
    {"role": "user", "content": "Again?"},
]

Visit = Callable[..., Any]


@pytest.fixture(scope="module")
def page(visit: Visit, light: Path) -> Iterator[Any]:
    found = visit(light)
    yield found
    found.close()


def in_page(page: Any, tokenizer: dict[str, Any], texts: list[str]) -> list[dict[str, Any]]:
    """Ids and texts as the page's tokenizer makes them."""
    found: list[dict[str, Any]] = page.run(
        """async ([description, texts]) => {
            const { DetokenizeStream, Tokenizer } = await import("/tokenizer.js");
            const tokenizer = new Tokenizer(description);
            return texts.map((text) => {
                const ids = tokenizer.encode(text);
                const stream = new DetokenizeStream(tokenizer, ids);
                return {
                    ids,
                    rendered: tokenizer.encodeRendered(text),
                    continued: tokenizer.encodeRendered(text, true),
                    text: tokenizer.decode(ids),
                    pieces: [...ids.map((id) => stream.push(id)), stream.flush()],
                };
            });
        }""",
        [{key: tokenizer[key] for key in ("tokenizer", "bos", "addBos")}, texts],
    )
    return found


def in_python(tokenizer: Tokenizer, texts: list[str]) -> list[dict[str, Any]]:
    from fbiedge.tokenizer import DetokenizeStream

    expected = []
    for text in texts:
        ids = tokenizer.encode(text)
        stream = DetokenizeStream(tokenizer, ids)
        expected.append(
            {
                "ids": ids,
                "rendered": tokenizer.encode_rendered(text),
                "continued": tokenizer.encode_rendered(text, continues=True),
                "text": tokenizer.decode(ids),
                "pieces": [*(stream.push(token_id) for token_id in ids), stream.flush()],
            }
        )
    return expected


def test_the_bundled_tokenizer(page: Any) -> None:
    model = ModelFile.open(MODEL)
    assert in_page(page, describe(model), TEXTS) == in_python(Tokenizer.from_model(model), TEXTS)


def test_a_tokenizer_of_bytes(page: Any, tmp_path: Path) -> None:
    model = ModelFile.open(tiny_model(tmp_path, chat_template=CHAT_TEMPLATE))
    assert in_page(page, describe(model), TEXTS) == in_python(Tokenizer.from_model(model), TEXTS)


def test_llamas_tokenizer(page: Any, shared_data: Path) -> None:
    """SentencePiece as BPE with byte fallback: what official checkpoints have."""
    source = lzma.decompress((shared_data / "tokenizers/llama2/tokenizer.json.xz").read_bytes()).decode()
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    described = {"tokenizer": json.loads(source), "bos": 1, "addBos": True}
    assert in_page(page, described, TEXTS) == in_python(Tokenizer(source, config), TEXTS)


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates(name: str, page: Any) -> None:
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    shown = page.run(
        """async ([source, special, messages]) => {
            const { ChatTemplate } = await import("/template.js");
            const template = new ChatTemplate(source, special);
            return [template.render(messages), template.takesSystem];
        }""",
        [TEMPLATES[name], special, MESSAGES],
    )
    assert shown == [ChatTemplate(TEMPLATES[name], special).render(MESSAGES), name != "loops"]


def test_a_template_that_refuses_says_why(page: Any) -> None:
    said = page.run(
        """async () => {
            const { ChatTemplate } = await import("/template.js");
            const template = new ChatTemplate("{{ raise_exception('no ' ~ messages[0].role) }}", {});
            try { return template.render([{ role: "user", content: "?" }]); } catch (error) { return error.message; }
        }"""
    )
    assert said == "The model's chat template failed: no user"


OPTIONS = [
    {"top_k": 40}, {"top_k": 1}, {"top_k": 300}, {"top_k": 0, "top_p": 0.5}, {"top_k": 0, "min_p": 0.1},
    {"top_k": 7, "top_p": 0.3, "min_p": 0.2}, {"top_k": 0, "top_p": 0.0}, {"temperature": 0.01}, {"temperature": 100.0},
    {"top_k": 0}, {"top_k": 50, "top_p": 0.99, "temperature": 1.7, "min_p": 0.01},
]  # fmt: skip


@pytest.mark.parametrize("changes", OPTIONS, ids=str)
def test_candidates(changes: dict[str, Any], page: Any) -> None:
    """On logits with ties, too: rounded to quarters, hundreds of them are equal."""
    options = SamplingOptions(**({"temperature": 0.8, "top_p": 1.0, "min_p": 0.0} | changes))
    random = np.random.default_rng(7)
    for logits in (random.normal(0, 3, 2000), np.round(random.normal(0, 3, 2000) * 4) / 4):
        values = logits.astype(np.float32)
        found = page.run(
            """async ([logits, options]) => {
                const { candidates } = await import("/sampling.js");
                return candidates(Float32Array.from(logits), options);
            }""",
            [values.tolist(), {name: getattr(options, name) for name in ("temperature", "top_k", "top_p", "min_p")}],
        )
        tokens, weights = candidates(values, options)
        assert found["tokens"] == tokens.tolist()
        np.testing.assert_allclose(found["weights"], weights, rtol=1e-12)


def test_the_repetition_penalty_and_the_draw(page: Any) -> None:
    logits = np.random.default_rng(3).normal(0, 3, 50).astype(np.float32)
    recent = [3, 3, 7, 49, 0]
    penalized, drawn, greedy = page.run(
        """async ([logits, recent]) => {
            const { penalize, sample } = await import("/sampling.js");
            const values = Float32Array.from(logits);
            const options = { temperature: 1, top_k: 0, top_p: 1, min_p: 0, repetition_penalty: 1 };
            const draws = [0, 0.25, 0.5, 0.75, 0.999999].map((draw) => sample(values, recent, options, () => draw));
            const greedy = sample(Float32Array.of(1, 5, 5, -2), [1], { ...options, temperature: 0, repetition_penalty: 2 });
            return [[...penalize(values, recent, 1.3)], draws, greedy];
        }""",
        [logits.tolist(), recent],
    )
    np.testing.assert_array_equal(np.float32(penalized), penalize(logits, recent, 1.3))
    cumulative = np.exp(logits.astype(np.float64)).cumsum()
    wanted = [
        int(cumulative.searchsorted(draw * cumulative[-1], side="right")) for draw in (0, 0.25, 0.5, 0.75, 0.999999)
    ]
    assert drawn == wanted
    assert greedy == 2


def test_nan_is_an_error(page: Any) -> None:
    said = page.run(
        """async () => {
            const { sample } = await import("/sampling.js");
            const options = { temperature: 0, top_k: 0, top_p: 1, min_p: 0, repetition_penalty: 1 };
            const said = [];
            for (const bad of [NaN, Infinity]) {
                try { said.push(sample(Float32Array.of(1, bad, 2), [], options)); } catch (error) { said.push(error.message); }
            }
            return said;
        }"""
    )
    assert all("computes NaN or Inf" in text for text in said)
