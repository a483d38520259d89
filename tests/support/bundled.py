"""The bundled model, its golden texts, and a story it was not trained on."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

MODEL = Path(str(importlib.resources.files("fbiedge") / "models" / "default.onnx"))
PROMPT = "One day, a little girl named Lily"
# Written for the tests, so that nothing of it can be in the training data.
UNSEEN_STORY = (
    "One day, a little girl named Mia went to the park with her mom. She saw a big tree and wanted to climb it. "
    'Her mom said, "Be careful, Mia!" Mia climbed up and saw a small bird in a nest. The bird was hungry, so Mia '
    "gave it some bread. The bird was happy and sang a song. Mia smiled and went home with her mom."
)


def golden(level: str) -> str:
    """What the bundled model writes after PROMPT, `fp32` or `int8`."""
    path = Path(__file__).resolve().parents[1] / "golden" / f"{level}.txt"
    return path.read_text(encoding="utf-8").rstrip("\n")
