"""The Hugging Face hub where it can be reached, its cache where it can't, and no minutes of waiting to find out."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from .cli_support import extra
from .errors import UsageError, printable

_SECONDS = 5  # to connect; the hub's library would try six times, with pauses, for each file


def open_datasets() -> Any:
    """The library `datasets`, which keeps to its cache where the hub can't be reached. Raises UsageError."""
    offline_if_unreachable()
    with extra("eval"):
        import datasets
    datasets.disable_progress_bars()
    for library in ("datasets", "huggingface_hub"):  # what they retry or take from the cache is no news to a user
        logging.getLogger(library).setLevel(logging.ERROR)
    return datasets


def offline_if_unreachable() -> None:
    """Tell the hub's libraries to stay offline where they would only wait; must come before they are imported.

    Behind a proxy they find out themselves.
    """
    if "huggingface_hub" in sys.modules or "HF_HUB_OFFLINE" in os.environ or urllib.request.getproxies():
        return
    answered = threading.Event()

    def call() -> None:
        with contextlib.suppress(OSError, ValueError):
            endpoint = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
            port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
            socket.create_connection((endpoint.hostname or "", port), timeout=_SECONDS).close()
            answered.set()

    caller = threading.Thread(target=call, daemon=True)  # a name may be looked up for longer than any timeout says
    caller.start()
    caller.join(_SECONDS)
    if not answered.is_set():
        stay_offline()


def stay_offline() -> None:
    """Have the hub's libraries ask it for nothing; must come before they are imported."""
    if "huggingface_hub" not in sys.modules:
        os.environ["HF_HUB_OFFLINE"] = "1"


def unreachable(what: str, error: Exception, instead: str) -> UsageError:
    """The error for `what` that the hub didn't give, with what to do `instead`."""
    why = printable(next(iter(str(error).strip().splitlines()), type(error).__name__))
    return UsageError(f"can't get {what} from the Hugging Face hub or its cache ({why}); {instead}")
