"""The page of `fbiedge web` in a real browser, and a server of it in this process."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Browser, BrowserContext, Page, Playwright

from fbiedge.model_file import ModelFile
from fbiedge.web.server import PageServer
from fbiedge.web.site import make_site

READY = 60_000  # milliseconds in which everything happens, on a busy machine too
_CALM = [
    "--headless=new", "--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--no-first-run", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]  # fmt: skip
NO_GPU = ["--disable-gpu"]
SOFTWARE_GPU = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"]


def launch(playwright: Playwright, chromium: str, gpu: list[str]) -> Browser:
    """The system's Chromium, which can reach nothing but this machine."""
    return playwright.chromium.launch(executable_path=chromium, args=[*_CALM, *gpu])


@contextmanager
def serving(model: Path, libraries: dict[str, Path], host: str = "127.0.0.1") -> Iterator[str]:
    """The address of a server of `model`."""
    with PageServer(host, 0, make_site(ModelFile.open(model), libraries)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.url
        finally:
            server.shutdown()
            thread.join()


class ChatPage:
    """One visit. What the page asks of any network, and what it complains about, is kept for `close` to check."""

    def __init__(self, browser: Browser, url: str, *, settings: dict[str, Any] | None = None, **context: Any) -> None:
        self.url = url
        self.context: BrowserContext = browser.new_context(**context)
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.context.on("request", lambda request: self.requests.append(request.url))
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(READY)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda line: line.type == "error" and self.errors.append(line.text))
        kept = json.dumps(json.dumps(settings or {}))
        self.page.add_init_script(f"localStorage.fbiedge ||= localStorage['fbiedge.settings'] = {kept}")
        self.page.goto(url)

    def ready(self) -> ChatPage:
        """Wait until a conversation can begin."""
        self.page.wait_for_selector("#ideas:not([hidden]) button")
        return self

    def send(self, text: str) -> None:
        self.page.fill("#input", text)
        self.page.click("#send")

    def ask(self, text: str) -> str:
        """The whole answer to `text`."""
        self.send(text)
        return self.answer()

    def answer(self) -> str:
        """The last answer, when it is done."""
        self.page.wait_for_selector("#send:not([hidden])")
        return self.page.locator(".assistant .text").last.text_content() or ""

    def set(self, **settings: float) -> None:
        """Fields of the settings by their names."""
        self.page.click("#open-settings")
        for name, value in settings.items():
            self.page.get_by_role("spinbutton", name=name).fill(str(value))
        self.page.get_by_role("button", name="Done").click()

    @property
    def about(self) -> str:
        """The line under the last answer."""
        return self.page.locator(".assistant .about").last.inner_text()

    @property
    def details(self) -> str:
        """What pointing at that line shows."""
        return self.page.locator(".assistant .about").last.get_attribute("title") or ""

    def run(self, script: str, argument: Any = None) -> Any:
        """The result of a function in the page."""
        return self.page.evaluate(script, argument)

    def wait(self, script: str, argument: Any = None) -> None:
        """Until it is true; the library's own way needs `eval`, which the page forbids."""
        end = time.monotonic() + READY / 1000
        while not self.run(script, argument):
            assert time.monotonic() < end, script
            time.sleep(0.005)

    def close(self) -> None:
        """End the visit. Fails where anything was asked of another origin, or went wrong unseen."""
        self.context.close()
        strangers = [url for url in self.requests if urlsplit(url)[:2] != urlsplit(self.url)[:2]]
        assert not strangers and not self.errors, (strangers, self.errors)
