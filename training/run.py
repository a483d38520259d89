"""Prepare a run's folder (tokenizer, shards, run.json) and execute it. What `fbiedge train` and the recipes call."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from fbiedge.config import ModelConfig
from fbiedge.errors import CheckpointError, UsageError
from fbiedge.files import atomic_file

from .checkpoint import load_model
from .config import TrainConfig
from .data import Batches, open_shard, read_documents, write_shard
from .model import Llama
from .tokenizer import BOS, EOS, tokenizer_config, train_tokenizer
from .trainer import StepReport, train

HELD_OUT_EVERY = 50  # without a held-out file, every 50th document is held out


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """Everything that decides a run's result; RUN/run.json holds it, so `--resume` needs nothing else."""

    model: ModelConfig
    training: TrainConfig
    teacher: str | None  # checkpoint folder

    def save(self, run: Path) -> None:
        document = {"model": self.model.to_dict(), "training": self.training.to_dict(), "teacher": self.teacher}
        with atomic_file(run / "run.json") as temporary:
            temporary.write_text(json.dumps(document, indent=1))

    @classmethod
    def load(cls, run: Path) -> RunPlan:
        try:
            raw: dict[str, Any] = json.loads((run / "run.json").read_text())
            return cls(
                model=ModelConfig.from_dict(raw["model"]),
                training=TrainConfig(**raw["training"]),
                teacher=raw["teacher"],
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{run}: no run to resume ({error}); start one without --resume") from error


def prepare_run(
    run: Path,
    plan: RunPlan,
    data: list[Path],
    held_out: list[Path],
    tokenizer: Path | None = None,
    special_tokens: tuple[str, ...] = (),
    chat_template: str | None = None,
    generation_config: dict[str, Any] | None = None,
) -> None:
    """Write tokenizer, token shards and run.json into `run`. Without `held_out`, every 50th document is held out.

    The tokenizer is the teacher's when there is one, else the given tokenizer.json, else trained on `data`.
    Raises UsageError for unusable texts or a tokenizer whose size is not the model's vocabulary.
    """
    run.mkdir(parents=True, exist_ok=True)
    if plan.teacher is not None:
        tokenizer = Path(plan.teacher) / "tokenizer.json"
    if tokenizer is not None:
        try:
            trained = Tokenizer.from_file(str(tokenizer))
        except Exception as error:  # the library raises bare Exception
            raise UsageError(f"can't read the tokenizer {tokenizer}: {error}") from error
    else:
        trained = train_tokenizer(read_documents(data), plan.model.vocab_size, special_tokens)
    if trained.get_vocab_size() != plan.model.vocab_size:
        raise UsageError(
            f"the tokenizer has {trained.get_vocab_size()} pieces, the model's vocabulary {plan.model.vocab_size}"
        )
    bos, eos = trained.token_to_id(BOS), trained.token_to_id(EOS)
    if bos is None or eos is None or (bos, eos) != (plan.model.bos_token_id, plan.model.eos_token_id):
        raise UsageError(
            f"the tokenizer's {BOS} and {EOS} are {bos} and {eos}, "
            f"the model expects {plan.model.bos_token_id} and {plan.model.eos_token_id}"
        )
    if held_out:
        write_shard(read_documents(data), trained, bos, eos, run / "train.tokens")
        write_shard(read_documents(held_out), trained, bos, eos, run / "held_out.tokens")
    else:
        for name, keep in (("train.tokens", False), ("held_out.tokens", True)):
            chosen = (d for i, d in enumerate(read_documents(data)) if (i % HELD_OUT_EVERY == 0) == keep)
            write_shard(chosen, trained, bos, eos, run / name)
    sidecars = {
        "tokenizer.json": trained.to_str(),
        "tokenizer_config.json": json.dumps(tokenizer_config(chat_template), indent=1),
        "generation_config.json": json.dumps(generation_config or {"bos_token_id": bos, "eos_token_id": eos}, indent=1),
    }
    for name, text in sidecars.items():
        with atomic_file(run / name) as temporary:
            temporary.write_text(text)
    plan.save(run)


def execute_run(
    run: Path, resume: bool = False, on_start: Callable[[Llama, RunPlan], None] | None = None
) -> Iterator[StepReport]:
    """Train the run prepared in `run`, from its start or from its last saved state."""
    plan = RunPlan.load(run)
    teacher = None
    if plan.teacher is not None:
        teacher = load_model(Path(plan.teacher)).eval().requires_grad_(False)
        if teacher.config.vocab_size != plan.model.vocab_size:
            raise UsageError(
                f"the teacher's vocabulary has {teacher.config.vocab_size} pieces, the student's {plan.model.vocab_size}; "
                "distillation needs the same vocabulary"
            )
    training = plan.training
    model = Llama(plan.model).initialize(training.seed)
    if on_start is not None:
        on_start(model, plan)
    shards = [open_shard(run / name) for name in ("train.tokens", "held_out.tokens")]
    batches, held_out = (
        Batches(shard, training.batch_size, training.sequence_length, training.seed) for shard in shards
    )
    names = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    files = {name: (run / name).read_text() for name in names}
    yield from train(run, model, teacher, batches, held_out, training, files, resume)
