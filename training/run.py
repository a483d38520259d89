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
from fbiedge.weights import SIDECARS, open_checkpoint

from .checkpoint import load_model
from .config import TrainConfig
from .data import Batches
from .documents import encode, held_out, ids_dtype, read_documents, without_held_out
from .model import Llama, check_trainable
from .shards import Shard, ShardWriter, open_shard, open_shards
from .shared_scales import share_scales
from .start import start_from
from .tokenizer import BOS, EOS, tokenizer_config, train_tokenizer
from .trainer import StepReport, train

COLUMN_SHARED = "column-shared"


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """Everything that decides a run's result; RUN/run.json holds it, so `--resume` needs nothing else."""

    model: ModelConfig
    training: TrainConfig
    teacher: str | None  # checkpoint folder
    init: str | None = None  # checkpoint folder whose weights the run starts from
    shared_scales: bool = False  # of a `column` model, see shared_scales.py

    @property
    def scaling(self) -> str:
        """The scaling form by its full name: the model's pattern, or column-shared."""
        return COLUMN_SHARED if self.shared_scales else self.model.scaling_pattern

    def save(self, run: Path) -> None:
        document = {
            "model": self.model.to_dict(),
            "training": self.training.to_dict(),
            "teacher": self.teacher,
            "init": self.init,
            "shared_scales": self.shared_scales,
        }
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
                init=raw.get("init"),
                shared_scales=raw.get("shared_scales", False),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{run}: no run to resume ({error}); start one without --resume") from error


def prepare_run(
    run: Path,
    plan: RunPlan,
    data: list[Path],
    held_out_data: list[Path],
    tokenizer: Path | None = None,
    special_tokens: tuple[str, ...] = (),
    chat_template: str | None = None,
    generation_config: dict[str, Any] | None = None,
) -> None:
    """Write tokenizer, token shards and run.json into `run`. Without `held_out_data`, every 50th document is held out.

    The tokenizer is the teacher's when there is one, else the starting checkpoint's, else the given tokenizer.json, else
    trained on `data`. A starting checkpoint's chat template and generation settings go on where none are given.
    Raises UsageError for unusable texts, a tokenizer that doesn't fit the model's vocabulary, or a teacher or a starting
    checkpoint that doesn't fit.
    """
    check_trainable(plan.model)
    run.mkdir(parents=True, exist_ok=True)
    inherited: dict[str, str] = {}
    if plan.init is not None:
        start = open_checkpoint(Path(plan.init))
        _check_start(start.config, plan)
        inherited = dict(start.files)
    if plan.teacher is not None:
        _check_teacher(open_checkpoint(Path(plan.teacher)).config, plan)
    trained = _choose_tokenizer(plan, "tokenizer.json" in inherited, tokenizer, data, special_tokens)
    bos, eos = trained.token_to_id(BOS), trained.token_to_id(EOS)
    if bos is None or eos is None or (bos, eos) != (plan.model.bos_token_id, plan.model.eos_token_id):
        raise UsageError(
            f"the tokenizer's {BOS} and {EOS} are {bos} and {eos}, "
            f"the model expects {plan.model.bos_token_id} and {plan.model.eos_token_id}"
        )
    documents = read_documents(data)
    kept = read_documents(held_out_data) if held_out_data else held_out(read_documents(data))
    dtype = ids_dtype(trained, bos, eos)
    for name, texts in (("train", documents if held_out_data else without_held_out(documents)), ("held_out", kept)):
        with ShardWriter(run / name, dtype) as writer:
            for ids in encode(texts, trained, bos, eos):
                writer.add(ids)
    open_batches(run, plan.training)  # too little text is an error now, not when the run starts
    sidecars = {
        "tokenizer.json": trained.to_str(),
        "tokenizer_config.json": json.dumps(tokenizer_config(chat_template), indent=1),
        "generation_config.json": json.dumps(generation_config or {"bos_token_id": bos, "eos_token_id": eos}, indent=1),
    }
    dropped = {"tokenizer.json"}
    if chat_template is not None:
        dropped |= {"tokenizer_config.json", "chat_template.jinja"}
    if generation_config is not None:
        dropped |= {"generation_config.json"}
    sidecars |= {name: text for name, text in inherited.items() if name not in dropped}
    for name, text in sidecars.items():
        with atomic_file(run / name) as temporary:
            temporary.write_text(text)
    plan.save(run)


def execute_run(
    run: Path,
    resume: bool = False,
    on_start: Callable[[Llama, RunPlan], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[StepReport]:
    """Train the run prepared in `run`, from its start or from its last saved state, until its end or until `stop()`."""
    plan = RunPlan.load(run)
    teacher = None
    if plan.teacher is not None:
        teacher = load_model(Path(plan.teacher)).eval().requires_grad_(False)
        _check_teacher(teacher.config, plan)
    training = plan.training
    if plan.init is None or (resume and (run / "state.pt").exists()):
        model = Llama(plan.model).initialize(training.seed)
    else:
        model = start_from(Path(plan.init), plan.model.scaling_pattern)
    if plan.shared_scales:
        share_scales(model)
    if on_start is not None:
        on_start(model, plan)
    batches, held_out_batches = open_batches(run, training)
    files = {name: (run / name).read_text() for name in SIDECARS if (run / name).exists()}
    yield from train(run, model, teacher, batches, held_out_batches, training, files, resume, stop)


def open_batches(run: Path, training: TrainConfig) -> tuple[Batches, Batches]:
    """The run's training and held-out batches. Raises UsageError where a shard is missing, damaged or too short."""
    batches, held_out_batches = (
        Batches(_shards(run, part), training.batch_size, training.sequence_length, training.seed, name)
        for part, name in (("train", "training text"), ("held_out", "held-out text"))
    )
    return batches, held_out_batches


def _shards(run: Path, part: str) -> list[Shard]:
    single = run / f"{part}.tokens"  # of runs begun by fbiedge 0.1
    return [open_shard(single)] if single.exists() else open_shards(run / part)


def _choose_tokenizer(
    plan: RunPlan, start_has_one: bool, given: Path | None, data: list[Path], special_tokens: tuple[str, ...]
) -> Tokenizer:
    """See prepare_run."""
    start = _read_tokenizer(Path(plan.init) / "tokenizer.json") if plan.init and start_has_one else None
    if plan.teacher is not None:
        chosen = _read_tokenizer(Path(plan.teacher) / "tokenizer.json")
        if start is not None and start.get_vocab() != chosen.get_vocab():
            raise UsageError(
                f"{plan.init} and {plan.teacher} have different tokenizers; distillation needs the same one"
            )
    elif start is not None:
        chosen = start
    elif given is not None:
        chosen = _read_tokenizer(given)
    elif plan.init is not None:
        raise UsageError(f"{plan.init} has no tokenizer.json; name its tokenizer with --tokenizer")
    else:
        chosen = train_tokenizer(read_documents(data), plan.model.vocab_size, special_tokens)
    _check_size(chosen, plan)
    return chosen


def _check_size(tokenizer: Tokenizer, plan: RunPlan) -> None:
    """Every id needs a row. A trained model may have rows without a token, as many published ones do; in a new one they
    would be a mistake. Raises UsageError."""
    ids, rows = tokenizer.get_vocab().values(), plan.model.vocab_size
    trained = plan.init is not None or plan.teacher is not None
    if max(ids) >= rows or (len(ids) < rows and not trained):
        raise UsageError(
            f"the tokenizer has {len(ids)} pieces with ids up to {max(ids)}, the model's vocabulary {rows}; "
            + ("bring the tokenizer that it was trained with" if trained else f"add --vocab-size {max(ids) + 1}")
        )


def _read_tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UsageError(f"can't read the tokenizer {path}: {error}") from error


def _check_start(start: ModelConfig, plan: RunPlan) -> None:
    """Everything but the scaling form must be as in the checkpoint that the run starts from."""
    theirs, wanted = start.to_dict(), plan.model.to_dict()
    for name in theirs.keys() - {"scaling_pattern"}:
        if theirs[name] != wanted[name]:
            raise UsageError(
                f"{plan.init} has {name} {theirs[name]}, the model {wanted[name]}; start from the same shape"
            )


def _check_teacher(teacher: ModelConfig, plan: RunPlan) -> None:
    check_trainable(teacher)
    if teacher.vocab_size != plan.model.vocab_size:
        raise UsageError(
            f"the teacher's vocabulary has {teacher.vocab_size} pieces, the student's {plan.model.vocab_size}; "
            "distillation needs the same vocabulary"
        )
    if teacher.max_position_embeddings < plan.training.sequence_length:
        raise UsageError(
            f"sequences of {plan.training.sequence_length} tokens are longer than the teacher's "
            f"{teacher.max_position_embeddings} positions; choose a shorter --sequence-length"
        )
