"""Recipes: the hyperparameters that `--preset` chooses, each of which an option overrides.

Published (FBI-LLM, arXiv 2407.07093, and the authors' code, LiqunMa/FBI-LLM at ec98ddd) are 130m, 1.3b and 7b: AdamW with
betas 0.9 and 0.95, weight decay 0.1 on every parameter, peak 3e-4 after 2000 steps of warm-up, cosine to 3e-5, gradient
norm clipped at 1, bf16 autocast over fp32 latents, sequences of 2048, seed 11111, distillation alone, `column` scales,
teacher meta-llama/Llama-2-7b-hf for every size. Their launch lines give the batches:

           nodes x GPUs x sequences x accumulated    sequences a step    steps
    130m       1 x    4 x        32 x           8                1024   600075
    1.3b       4 x    4 x        18 x           4                1152   533430
    7b         8 x    4 x         6 x          10                1920   320040

Steps are the length of their schedule: 360 chunks of 1,706,976 samples, each chunk cut to whole batches over all GPUs. From
1.3b on they leave chunks 7, 12, 20, 24 and 26 out, and keep that schedule, which the run then ends before.

Not fixed by paper or code, so ours: 13b is a shape without a launch line, here with the batch of 7b; the teacher is held in
bf16 (theirs in fp32, its products in bf16 all the same); the permutation within a chunk comes from (seed, chunk) instead of
numpy's global state; step 1 has a 2000th of the peak, theirs 3/4 to 9/10 of one; saves come every 500 steps instead of once a chunk, and a
batch or so is held out to be watched.

`tiny` is for tests and a first try, `small` is the body of the bundled model (default_model.py): both for one machine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fbiedge.config import PRESETS

from .config import TrainConfig
from .plan import TeacherDtype

# Where neither a preset nor an option says; others are the same for both.
FROM_SCRATCH = TrainConfig(steps=1000)
FINE_TUNE = TrainConfig(steps=500, learning_rate=1e-4, warmup_steps=20)  # with --init


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a preset means beside its shape."""

    training: TrainConfig
    teacher_dtype: TeacherDtype = "fp32"
    skip_chunks: tuple[int, ...] = ()  # of Amber


_PUBLISHED = TrainConfig(
    steps=1, batch_size=1024, micro_batch_size=32, sequence_length=2048, learning_rate=3e-4, min_learning_rate_ratio=0.1,
    warmup_steps=2000, weight_decay=0.1, beta1=0.9, beta2=0.95, grad_clip=1.0, one_hot_share=0.0, seed=11111, bf16=True,
    activation_checkpointing=True, checkpoint_every=500, eval_every=500, eval_sequences=1024,
)  # fmt: skip
_SKIPPED = (7, 12, 20, 24, 26)

RECIPES: dict[str, Recipe] = {
    "tiny": Recipe(training=FROM_SCRATCH),
    "small": Recipe(
        training=TrainConfig(
            steps=3600, batch_size=8, sequence_length=512, learning_rate=2e-3, warmup_steps=100, checkpoint_every=100
        )
    ),
    "130m": Recipe(training=replace(_PUBLISHED, steps=600_075), teacher_dtype="bf16"),
    "1.3b": Recipe(
        training=replace(_PUBLISHED, steps=533_430, batch_size=1152, micro_batch_size=18),
        teacher_dtype="bf16",
        skip_chunks=_SKIPPED,
    ),
    "7b": Recipe(
        training=replace(_PUBLISHED, steps=320_040, batch_size=1920, micro_batch_size=6),
        teacher_dtype="bf16",
        skip_chunks=_SKIPPED,
    ),
}
RECIPES["13b"] = RECIPES["7b"]
assert RECIPES.keys() == PRESETS.keys()


def resolved(preset: str | None, init: bool, given: dict[str, Any]) -> tuple[Recipe, TrainConfig]:
    """The recipe, and its hyperparameters with those of `given` that are not None in their place.

    Without a preset: FINE_TUNE where a run starts from a checkpoint, else FROM_SCRATCH. Raises UsageError.
    """
    recipe = RECIPES[preset] if preset is not None else Recipe(training=FINE_TUNE if init else FROM_SCRATCH)
    chosen = {name: value for name, value in given.items() if value is not None}
    return recipe, replace(recipe.training, **chosen)
