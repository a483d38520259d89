"""A text, a model and a schedule with which a whole training takes a second."""

from __future__ import annotations

from fbiedge.config import ModelConfig
from fbiedge.training.config import TrainConfig

ANIMALS, PLACES = ("cat", "dog", "owl", "fox", "hen"), ("barn", "park", "tree", "lake")
DOCUMENTS = [
    f"The {a} went to the {p}. The {b} was in the {p} too. The {a} and the {b} played by the {p}."
    for a in ANIMALS for b in ANIMALS for p in PLACES
]  # fmt: skip


def model_config(pattern: str, **changes: object) -> ModelConfig:
    values: dict[str, object] = {
        "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 64,
        "scaling_pattern": pattern,
    }  # fmt: skip
    return ModelConfig(**{**values, **changes})  # type: ignore[arg-type]


def training_config(**changes: object) -> TrainConfig:
    values: dict[str, object] = {
        "steps": 60, "batch_size": 4, "sequence_length": 32, "learning_rate": 3e-3, "warmup_steps": 5,
        "checkpoint_every": 10, "eval_every": 30, "eval_sequences": 8,
    }  # fmt: skip
    return TrainConfig(**{**values, **changes})  # type: ignore[arg-type]
