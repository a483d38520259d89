"""On a GPU, here one that Chromium computes itself: the same text as without, by the same cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.chat_page import SOFTWARE_GPU, ChatPage, serving
from support.tiny_model import CHAT_TEMPLATE, tiny_model


def test_webgpu_writes_what_webassembly_writes(
    chromium: Callable[[list[str]], Any], libraries: dict[str, Path], tmp_path: Path
) -> None:
    model = tiny_model(
        tmp_path, export={"operators": "stock", "stock_bits": 4}, chat_template=CHAT_TEMPLATE, num_hidden_layers=1
    )
    browser = chromium(SOFTWARE_GPU)
    answers = {}
    with serving(model, libraries) as url:
        for engine in ("wasm", "webgpu"):
            page = ChatPage(browser, url, settings={"temperature": 0, "maxTokens": 2, "engine": engine}).ready()
            assert page.page.inner_text("#engine").startswith("WebGPU" if engine == "webgpu" else "WebAssembly")
            answers[engine] = [page.ask("one")]
            page.page.click("text=Regenerate")
            answers[engine].append(page.answer())
            assert "still in the cache" in page.details
            page.close()
        # A GPU that is a program is right and slow: it must be asked for.
        page = ChatPage(browser, url).ready()
        assert page.page.inner_text("#engine").startswith("WebAssembly")
        assert page.page.get_attribute("#engine", "title") == "there is no GPU"
        page.close()
    browser.close()
    assert answers["webgpu"] == answers["wasm"] and answers["wasm"][0] == answers["wasm"][1] != ""
