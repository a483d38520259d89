"""Every error a user can cause, as one tree.

    FbiEdgeError                 base; the CLI prints `error: <message>` and exits with 2
    ├── UsageError               an option or argument that can't be used (unknown preset, prompt longer than the context)
    ├── CheckpointError          a checkpoint that is missing, truncated, or has missing, extra or wrongly shaped tensors
    ├── ModelFileError           a model.onnx that is missing, not ONNX, truncated, or not written by fbiedge
    ├── OpLibraryError           the op library is missing or can't be loaded
    ├── DivergedError            a training whose loss is no number or rose and stays high; its last saved state is good
    ├── ElsewhereError           an error of a training on several processes, which the first of them explains
    └── OutputError              the output can't be written (disk full, no permission) or came out wrong

A message is one line: what was got, what was expected, what to do.
"""

from __future__ import annotations


def printable(text: str) -> str:
    """With escapes for what would end a line or talk to a terminal: names in files come from strangers."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class FbiEdgeError(Exception):
    """Base of all errors caused by input; its text is one line meant for a user."""

    exit_code = 2


class UsageError(FbiEdgeError):
    """An option or argument that can't be used."""


class CheckpointError(FbiEdgeError):
    """A checkpoint that can't be read as a Llama or FBI-LLM checkpoint."""


class ModelFileError(FbiEdgeError):
    """A model file that can't be opened or was not written by fbiedge."""


class OpLibraryError(FbiEdgeError):
    """The op library is missing or can't be loaded."""


class DivergedError(FbiEdgeError):
    """The loss of a training is no number, or rose and stays high; the last saved state is good."""


class ElsewhereError(FbiEdgeError):
    """Another process of this training prints the message; this one ends in silence."""


class OutputError(FbiEdgeError):
    """An output that can't be written, or that came out wrong and was dropped."""
