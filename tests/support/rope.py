"""RoPE scalings of every kind for heads of 16 and θ = 10, where each has pairs of every regime, blends included."""

from __future__ import annotations

from fbiedge.rope import RopeScaling

HEAD_DIM, THETA = 16, 10.0

# Original contexts are below the 64 positions of support.checkpoints, so tests reach beyond them.
SCALINGS = {
    "none": None,
    "linear": RopeScaling(rope_type="linear", factor=4.0),
    "llama3": RopeScaling(rope_type="llama3", factor=8.0, original_max_position_embeddings=32),
    "yarn": RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=16),
    "yarn-all-fields": RopeScaling(
        rope_type="yarn",
        factor=4.0,
        original_max_position_embeddings=16,
        beta_fast=2.0,
        beta_slow=0.5,
        truncate=False,
        attention_factor=1.3,
    ),
    "factors": RopeScaling(rope_type="factors", factors=(1.0, 1.0, 1.25, 1.5, 2.5, 4.0, 8.0, 8.0)),
}
