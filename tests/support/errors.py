"""What every error shown to a user must be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from fbiedge.errors import FbiEdgeError


@contextmanager
def raises_line(kind: type[FbiEdgeError], *parts: str) -> Iterator[None]:
    """The block raises exactly `kind`, its text is one line, and it contains all `parts`."""
    with pytest.raises(kind) as caught:
        yield
    message = str(caught.value)
    assert type(caught.value) is kind
    assert message and "\n" not in message, repr(message)
    for part in parts:
        assert part in message, f"{part!r} is not in {message!r}"
