"""The command `fbiedge web`: a chat page whose model runs in the browser."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from .errors import UsageError


def web(
    model: Annotated[
        Path | None,
        typer.Argument(
            help="model.onnx, quickest in browsers when exported with --ops stock --stock-bits 1; default: the bundled one"
        ),
    ] = None,
    port: Annotated[int, typer.Option(help="port to listen on; 0: any free one")] = 8081,
    host: Annotated[
        str, typer.Option(help="address to listen on; 0.0.0.0 lets other devices in, on one thread and no GPU")
    ] = "127.0.0.1",
    open_page: Annotated[bool, typer.Option("--open/--no-open", help="open the page in a browser")] = True,
    assets: Annotated[
        Path | None, typer.Option(help="folder with the page's libraries; default: npm brings them the first time")
    ] = None,
) -> None:
    """Chat in a browser, which runs the model itself: nothing leaves this machine."""
    from . import terminal
    from .cli_support import bundled_model
    from .engines import is_gguf
    from .model_file import ModelFile
    from .web import assets as libraries
    from .web.server import PageServer
    from .web.site import make_site

    path = model or bundled_model()
    if is_gguf(path):
        raise UsageError(
            f"{path} is a GGUF, and browsers run ONNX models: fbiedge export {path} --to onnx --ops stock -o model.onnx"
        )
    if not 0 <= port <= 65535:
        raise UsageError(f"port is {port}, expected a number from 0 to 65535")
    opened = ModelFile.open(path)
    folder = assets or libraries.cached_folder()
    if assets is None and not libraries.is_complete(folder):
        terminal.err.print(f"bringing the page's libraries by npm, this once, to {folder}", style="dim", soft_wrap=True)
        libraries.install(folder)
    with PageServer(host, port, make_site(opened, libraries.library_files(folder))) as server:
        terminal.print_text(f"{server.url}  Ctrl-C ends")
        if open_page:
            _open_browser(server.url)
        server.serve_forever()


def _open_browser(url: str) -> None:
    """Only where there is a screen: without one, Python would start a browser of text in this terminal."""
    import webbrowser

    if sys.platform in ("win32", "darwin") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        webbrowser.open(url)
