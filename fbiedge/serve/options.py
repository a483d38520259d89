"""What a server can be told."""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass, field

from ..errors import UsageError

BODY_LIMIT = 1 << 20  # a megabyte of English is a quarter of a million tokens


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Where to listen, whom to answer, and the limits. Raises UsageError."""

    host: str = "127.0.0.1"
    port: int = 8080  # 0: any free one
    name: str | None = None  # of the model; by default its file's
    slots: int = 4  # answers that are generated at a time, each with a KV cache
    queue: int = 64  # answers that may wait for a slot
    api_key: str | None = field(default=None, repr=False)
    max_prompt_tokens: int | None = None  # None: what the context holds
    max_tokens: int | None = None  # of an answer; None: what the context holds
    request_timeout: float = 600.0  # seconds from a question to the end of its answer
    client_timeout: float = 30.0  # seconds a client may take to send a question, or to take what was sent to it
    max_body_bytes: int = BODY_LIMIT
    max_connections: int = 256
    cors_origins: tuple[str, ...] = ()  # web pages that may ask; `*`: all
    allowed_hosts: tuple[str, ...] = ()  # names of this server, besides `host` and those of loopback

    def __post_init__(self) -> None:
        for name, low, high in (
            ("port", 0, 65535),
            ("slots", 1, 256),
            ("queue", 0, 1_000_000),
            ("max_prompt_tokens", 1, None),
            ("max_tokens", 1, None),
            ("max_body_bytes", 1, 1 << 30),
            ("max_connections", 1, 100_000),
        ):
            value = getattr(self, name)
            if value is not None and not (low <= value and (high is None or value <= high)):
                wants = f"at least {low}" if high is None else f"from {low} to {high}"
                raise UsageError(f"{name.replace('_', '-')} is {value}, expected a number {wants}")
        for name in ("request_timeout", "client_timeout"):
            value = getattr(self, name)
            if not (0 < value < math.inf):  # also false for NaN
                raise UsageError(f"{name.replace('_', '-')} is {value}, expected seconds above 0")
        if self.api_key is not None and (
            not self.api_key or not self.api_key.isascii() or self.api_key.strip() != self.api_key
        ):
            raise UsageError("the API key is empty, has spaces around it or is not ASCII; choose another")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"
