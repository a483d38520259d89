"""Prepare a run's folder: its tokenizer, its token shards, the files that its model will carry, and run.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from fbiedge.config import ModelConfig
from fbiedge.errors import UsageError
from fbiedge.files import atomic_file
from fbiedge.weights import open_checkpoint

from .corpus import PARTS, DataOptions, Vocabulary, check_ids, open_part, summary, write_corpus
from .data import Batches
from .documents import split_held_out
from .plan import RunPlan
from .records import Corrupt
from .sources import Sources
from .teacher import TeacherFacts, teacher_facts
from .tokenizer import BOS, EOS, UNK, read_tokenizer, tokenizer_config, train_tokenizer


def prepare_run(
    run: Path,
    plan: RunPlan,
    data: Sequence[str | Path],
    held_out_data: Sequence[str | Path],
    tokenizer: Path | None = None,
    special_tokens: tuple[str, ...] = (),
    chat_template: str | None = None,
    generation_config: dict[str, Any] | None = None,
    options: DataOptions | None = None,
) -> str:
    """Write tokenizer, token shards and run.json into `run`; returns a line on what was read.

    Without `held_out_data`, a part of the data is held out (corpus.py). The tokenizer is the teacher's when there is one,
    else the starting checkpoint's, else that of the token shards given as data, else the given tokenizer.json, else
    trained on what of `data` isn't held out; all that there are must have the same vocabulary. A starting checkpoint's
    chat template and generation settings go on where none are given. Raises UsageError for unusable data, a tokenizer that
    doesn't fit the model's vocabulary, or a teacher or a starting checkpoint that doesn't fit.
    """
    plan.model.check_trainable("the model")
    head, embedding = plan.training.head, plan.training.embedding
    if plan.model.tie_word_embeddings and head != embedding:
        raise UsageError(
            f"head is {head!r} and embedding {embedding!r}, but they are one matrix in this model; give both alike"
        )
    options = options or DataOptions()
    corrupt = Corrupt(skip=options.skip_corrupt)
    run.mkdir(parents=True, exist_ok=True)
    inherited: dict[str, str] = {}
    if plan.init is not None:
        start = open_checkpoint(Path(plan.init))
        _check_start(start.config, plan)
        inherited = dict(start.files)
    if plan.teacher is not None:
        check_teacher(teacher_facts(Path(plan.teacher)), plan)
    sources = options.open(data, corrupt)
    apart = options.open(held_out_data, corrupt) if held_out_data else None
    if sources.shards is not None:
        if options.most_tokens is not None:
            raise UsageError(
                f"data_tokens is {options.most_tokens}, but {sources.shards} holds token shards, which are read where they "
                "are; leave it out, or give the texts"
            )
        lengths = tuple(len(shard.tokens) for shard in open_part(sources.shards, "train"))
        plan = replace(plan, shards=str(sources.shards.resolve()), shard_tokens=lengths)
    plan = replace(plan, data=tuple(map(str, data)), held_out=tuple(map(str, held_out_data)))
    chosen = _choose_tokenizer(plan, tokenizer, sources, special_tokens, options, splits=apart is None)
    bos, eos = _document_ends(chosen, plan.model)
    if sources.shards is None or apart is not None:
        vocabulary = Vocabulary(size=plan.model.vocab_size, tokenizer=chosen, bos=bos, eos=eos)
        told = summary(write_corpus(run, sources, apart, vocabulary, options, corrupt))
    else:
        told = f"token shards of {sources.shards}"
    open_batches(run, plan)  # too little text is an error now, not when the run starts
    names = [chosen.id_to_token(bos), chosen.id_to_token(eos)]
    sidecars = {
        "tokenizer.json": chosen.to_str(),
        "tokenizer_config.json": json.dumps(
            tokenizer_config(chat_template, UNK if chosen.token_to_id(UNK) is not None else None, *names), indent=1
        ),
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
    return told


def open_batches(run: Path, plan: RunPlan) -> tuple[Batches, Batches]:
    """The run's training and held-out batches. Raises UsageError where a shard is missing, damaged, of a larger
    vocabulary or another than the run began with, or where there is too little text."""
    both = []
    for part, name in PARTS.items():
        folder = run
        if plan.shards is not None and not (part == "held_out" and (run / part).exists()):
            folder = Path(plan.shards)
        shards = open_part(folder, part)
        if not shards and plan.shards is not None:
            raise UsageError(f"{folder} has no {part} shards; name held-out data with --held-out")
        lengths = tuple(len(shard.tokens) for shard in shards)
        if part == "train" and plan.shard_tokens and lengths != plan.shard_tokens:
            raise UsageError(
                f"{folder} holds {len(lengths)} shards of {sum(lengths)} tokens, the run began with "
                f"{len(plan.shard_tokens)} of {sum(plan.shard_tokens)}; put those back"
            )
        check_ids(shards, plan.model.vocab_size)
        training = plan.training
        is_train = part == "train"
        seed = training.seed if is_train else 0  # runs of other seeds look at the same held-out windows
        same = is_train and training.cache_teacher
        both.append(Batches(shards, training.batch_size, training.sequence_length, seed, name, same_windows=same))
    batches, held_out = both
    return batches, held_out


def check_teacher(teacher: TeacherFacts, plan: RunPlan) -> None:
    """Raises UsageError for a teacher that can't teach this model."""
    if teacher.vocab_size != plan.model.vocab_size:
        raise UsageError(
            f"the teacher's vocabulary has {teacher.vocab_size} pieces, the student's {plan.model.vocab_size}; "
            "distillation needs the same vocabulary"
        )
    if teacher.positions < plan.training.sequence_length:
        raise UsageError(
            f"sequences of {plan.training.sequence_length} tokens are longer than the teacher's "
            f"{teacher.positions} positions; choose a shorter --sequence-length"
        )


def _choose_tokenizer(
    plan: RunPlan,
    given: Path | None,
    data: Sources,
    special_tokens: tuple[str, ...],
    options: DataOptions,
    splits: bool,
) -> Tokenizer:
    """See prepare_run. splits: a part of the data will be held out, and is no text for a new tokenizer either."""
    folders = [Path(folder) for folder in (plan.teacher, plan.init, data.shards) if folder is not None]
    files = [folder / "tokenizer.json" for folder in folders if (folder / "tokenizer.json").exists()]
    if given is not None:
        files.append(given)
    if files:
        chosen = read_tokenizer(files[0])
        for other in files[1:]:
            if read_tokenizer(other).get_vocab() != chosen.get_vocab():
                raise UsageError(f"{other} and {files[0]} are different tokenizers; distillation needs the same one")
    elif folders or not data.texts:
        lacking = folders[0] if folders else "data of token ids"
        raise UsageError(f"{lacking} has no tokenizer.json; name its tokenizer with --tokenizer")
    else:
        documents = data.documents(Corrupt(skip=options.skip_corrupt))
        if splits:
            documents = (trained_on for trained_on, _ in split_held_out(documents))
        chosen = train_tokenizer(documents, plan.model.vocab_size, special_tokens)
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


def _document_ends(tokenizer: Tokenizer, model: ModelConfig) -> tuple[int, int]:
    """The ids before and after a document: <s> and </s> where the tokenizer has them, else what the model says."""
    wanted = model.bos_token_id, model.eos_token_id
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    if bos is None and eos is None and None not in map(tokenizer.id_to_token, wanted):
        return wanted
    if bos is None or eos is None or (bos, eos) != wanted:
        raise UsageError(
            f"the tokenizer's {BOS} and {EOS} are {bos} and {eos}, the model expects {wanted[0]} and {wanted[1]}"
        )
    return bos, eos


def _check_start(start: ModelConfig, plan: RunPlan) -> None:
    """Everything but the scaling form must be as in the checkpoint that the run starts from."""
    theirs, wanted = start.to_dict(), plan.model.to_dict()
    for name in theirs.keys() - {"scaling_pattern"}:
        if theirs[name] != wanted[name]:
            raise UsageError(
                f"{plan.init} has {name} {theirs[name]}, the model {wanted[name]}; start from the same shape"
            )
