"""A real browser, the page's libraries, and the bundled model in the form that is quick there."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support import npm
from support.bundled import MODEL

from fbiedge.errors import OutputError
from fbiedge.web import assets


@pytest.fixture(scope="session")
def libraries() -> dict[str, Path]:
    """The page's libraries, brought by npm once into the git-ignored build folder."""
    npm.require("npm")
    folder = npm.BUILD / assets.cached_folder().name
    if not assets.is_complete(folder):
        try:
            assets.install(folder)
        except OutputError as error:
            npm.unavailable(str(error))
    return assets.library_files(folder)


@pytest.fixture(scope="session")
def light(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model for WebAssembly: stock operators, 1 bit a weight in the file and floats in memory."""
    from fbiedge.exporters.onnx import export_onnx, open_onnx

    path = tmp_path_factory.mktemp("web") / "light.onnx"
    export_onnx(open_onnx(MODEL), path, operators="stock", stock_bits=1)
    return path


@pytest.fixture(scope="module")
def chromium() -> Iterator[Callable[[list[str]], Any]]:
    """Starts a browser with the given switches. For a module: while one runs, the thread has an event loop."""
    from playwright.sync_api import sync_playwright
    from support.chat_page import launch

    npm.require("chromium")
    with sync_playwright() as playwright:
        yield lambda gpu: launch(playwright, str(shutil.which("chromium")), gpu)


@pytest.fixture(scope="module")
def visit(chromium: Callable[[list[str]], Any], libraries: dict[str, Path]) -> Iterator[Callable[..., Any]]:
    """visit(model, settings=…) -> a ChatPage; a browser and a server for each model serve the whole module."""
    from support.chat_page import NO_GPU, ChatPage, serving

    with ExitStack() as stack:
        urls: dict[Path, str] = {}
        browser = chromium(NO_GPU)
        stack.callback(browser.close)

        def open_page(model: Path, **options: Any) -> ChatPage:
            if model not in urls:
                urls[model] = stack.enter_context(serving(model, libraries))
            return ChatPage(browser, urls[model], **options)

        yield open_page
