"""The recipe of the bundled model: texts -> full-precision teacher -> binary student -> shared scales, in one command.

    python -m fbiedge.training.default_model --data DATA -o RUNS [--steps 1500,3600,...]

DATA holds the corpora of the model card (TinyStories, Synthetic-Persona-Chat, African Storybook) in the folders named
below. Stories come in two forms: half as plain text, half as the answer to a request that names something in
the story, so that a chat can ask for one. Dialogues become chats of user and assistant. The student learns with the
published `column` scales; a fine-tune then lets q, k, v and gate, up share theirs, so that GGUF holds the model exactly.
What bounds that student is its teacher, so the teacher then learns on, and the student from it, and both once more.
Interrupted, the same command goes on where it stopped.
"""

from __future__ import annotations

import csv
import json
import lzma
import random
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from tokenizers import Tokenizer

from fbiedge.config import preset
from fbiedge.errors import FbiEdgeError, UsageError
from fbiedge.files import atomic_file

from .checkpoint import load_model
from .cli import STOPPED
from .evaluation import held_out_loss
from .plan import RunPlan
from .prepare import prepare_run
from .progress import run_with_progress
from .recipes import RECIPES

USER, ASSISTANT, END = "<|user|>", "<|assistant|>", "<|end|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'user' %}<|user|>{{ message.content }}<|end|>"
    "{% elif message.role == 'assistant' %}<|assistant|>{{ message.content }}<|end|>"
    "{% else %}{{ raise_exception('this model knows the roles user and assistant, not ' ~ message.role) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Ids of <s>, </s> and <|end|> in the tokenizer below; the sampling that reads best at this size.
GENERATION = {"bos_token_id": 1, "eos_token_id": [2, 5], "do_sample": True, "temperature": 0.7, "top_p": 0.9}
STORIES = ("corpora/tinystories/train_head_recased_4M.txt.xz", "corpora/tinystories/czhou_val.txt.xz")
TITLED_STORIES = "corpora/stories/african_storybook_en_ccby.txt.xz"
DIALOGUES = ("chat/synthetic_persona_chat/valid.csv.xz", "chat/synthetic_persona_chat/test.csv.xz")
HELD_OUT_STORIES = "corpora/tinystories/valid_sample_794k.txt.xz"  # 0.3 % of the training stories recur in it
HELD_OUT_DIALOGUES = 60  # the last ones
PLACEHOLDER = re.compile(r"\[(?:user ?([12])(?:'s)?(?: name)?|username|(?:your |their |my )?name)\]", re.IGNORECASE)
NAMES = (
    "Alice Amy Anna Ben Bob Carla Chris Claire Dan David Emily Emma Eric Eva Frank Grace Hannah Henry Jack James Jane "
    "Jenny John Julia Kate Kevin Laura Leo Lisa Lucy Maria Mark Mary Mia Mike Nick Nina Oliver Paul Peter Rachel Sam "
    "Sarah Steve Susan Tim Tom"
).split()
SEED = 11111

MODEL = preset("small")
TRAINING = replace(RECIPES["small"].training, compile=True)
# After 0.2M tokens peaks of 5e-4, 1e-3 and 2e-3 had cost 0.005, 0.021 and 0.048 nats of held-out loss against the start:
# the higher, the more is forgotten first. 1e-3 leaves a longer run room to gain; its end at 2e-5 settles the signs.
FINE_TUNE = replace(
    TRAINING, learning_rate=1e-3, min_learning_rate_ratio=0.02, warmup_steps=20, seed=SEED + 2, checkpoint_every=50,
    eval_every=100,
)  # fmt: skip
LONGER = replace(FINE_TUNE, warmup_steps=50, learning_rate=1.5e-3)
STEPS = {
    "teacher": 1500, "student": 3600, "shared": 1000, "teacher-2": 800, "student-2": 1000, "teacher-3": 3000,
    "student-3": 2400,
}  # fmt: skip
LENGTHS = ",".join(map(str, STEPS.values()))

# Things a child's story may be about; the first that a story names becomes the subject of the request for it.
SUBJECTS = frozenset(
    "cat dog bird fish rabbit bunny bear lion tiger elephant monkey frog duck horse cow pig sheep mouse fox wolf owl bee "
    "ant butterfly spider snake turtle dragon dinosaur princess prince king queen fairy witch pirate robot monster ghost "
    "giant farmer baby doll ball kite car truck train boat ship plane bike balloon tree flower garden forest park beach "
    "river lake sea mountain farm house castle school rain snow sun moon star cake cookie apple banana candy ice bread "
    "soup birthday picnic race treasure box key hat dress shoe ring crown book song game puzzle friend".split()
)


def story_documents(root: Path) -> Iterator[str]:
    """Training documents from the stories: plain, or as the answer to a request."""
    rng = random.Random(SEED)
    for path in STORIES:
        for raw in _documents(root / path):
            story = tidy(raw)
            yield story if rng.random() < 0.5 else f"{USER}{request_for(story, rng)}{END}{ASSISTANT}{story}{END}"
    for raw in _documents(root / TITLED_STORIES):
        title, _, story = tidy(raw).partition("\n")
        yield f"{USER}Tell me the story of {title}.{END}{ASSISTANT}{story}{END}" if rng.random() < 0.5 else story


def request_for(story: str, rng: random.Random) -> str:
    """A user's request that `story` answers: with a name or a thing from it, or with nothing in particular."""
    name = re.search(r"\bnamed ([A-Z][a-z]+)\b", story)
    subject = next((word for word in re.findall(r"[a-z]+", story[:300].lower()) if word in SUBJECTS), None)
    article = "an" if subject and subject[0] in "aeio" else "a"
    choices = ["Tell me a story.", "Please tell me a story.", "Can you tell me a story?"]
    if subject:
        choices = [f"Tell me a story about {article} {subject}.", f"Can you tell me a story about {article} {subject}?",
                   f"I want to hear a story about {article} {subject}.", *choices[:1]]  # fmt: skip
    if subject and name:
        choices += [f"Tell me a story about {article} {subject} and {name[1]}.", f"Tell me a story about {name[1]}."]
    return rng.choice(choices)


def dialogue_documents(root: Path) -> list[str]:
    """Chats from the persona dialogues: user 1 becomes the user, user 2 the assistant."""
    documents, rng = [], random.Random(SEED)
    for path in DIALOGUES:
        with lzma.open(root / path, "rt", encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                turns = re.findall(r"^User ([12]): (.+)$", row["Best Generated Conversation"], re.MULTILINE)
                speakers = [speaker for speaker, _ in turns]
                if len(turns) >= 4 and all(s == "12"[i % 2] for i, s in enumerate(speakers)):
                    named = with_names(turns, rng)
                    documents.append(
                        "".join(f"{USER if s == '1' else ASSISTANT}{tidy(text)}{END}" for s, text in named)
                    )
    return documents


def with_names(turns: list[tuple[str, str]], rng: random.Random) -> list[tuple[str, str]]:
    """The turns (speaker "1" or "2", text) with names for both where the corpus has placeholders: "I'm [name]"."""
    names = dict(zip("12", rng.sample(NAMES, 2), strict=True))

    def name(speaker: str, match: re.Match[str]) -> str:
        own = re.search(r"\b(I'm|I am|name is|name's|call me|This is) $", match.string[: match.start()], re.IGNORECASE)
        return names[match[1] or (speaker if own else "12"[speaker == "1"])]

    return [(speaker, PLACEHOLDER.sub(partial(name, speaker), text)) for speaker, text in turns]


def tidy(text: str) -> str:
    """Plain quotes and dashes, single spaces, one newline between paragraphs: less to learn for a small model."""
    for curly, plain in (("\u2018", "'"), ("\u2019", "'"), ("\u201c", '"'), ("\u201d", '"'), ("\u2013", "-"), ("\u2014", " - "), ("\u2026", "...")):  # fmt: skip
        text = text.replace(curly, plain)
    return re.sub(r"\s*\n\s*", "\n", re.sub(r"[ \t]+", " ", text)).strip()


def write_texts(root: Path, out: Path) -> None:
    """Write the shuffled training text and the held-out stories and dialogues as three files below `out`."""
    dialogues = dialogue_documents(root)
    # "I live in [city]": other placeholders are few, and no text to learn from.
    chats = [dialogue for dialogue in dialogues[:-HELD_OUT_DIALOGUES] if "[" not in dialogue]
    training = [*story_documents(root), *chats]
    random.Random(SEED).shuffle(training)
    # This corpus separates its stories by blank lines only; most begin alike.
    with lzma.open(root / HELD_OUT_STORIES, "rt", encoding="utf-8") as file:
        held_out_stories = [tidy(story) for story in re.split(r"\n\n(?=Once upon a time)", file.read())]
    held_out_dialogues = dialogues[-HELD_OUT_DIALOGUES:]
    texts = {"held_out_stories": held_out_stories, "held_out_dialogues": held_out_dialogues, "train": training}
    for name, documents in texts.items():  # `train` last: where it is, the others are
        with atomic_file(out / f"{name}.txt") as temporary:
            temporary.write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")


def _documents(path: Path) -> Iterator[str]:
    with lzma.open(path, "rt", encoding="utf-8") as file:
        for document in re.split(r"<\|endoftext\|>|<\|endofdoc\|>", file.read()):
            if document.strip():
                yield document.strip()


def stages(out: Path, steps: Mapping[str, int] = STEPS) -> dict[str, RunPlan]:
    """The runs below `out`, in their order, each of so many steps; a later one starts from earlier ones' models."""

    def model(name: str) -> str:
        return str((out / name / "model").resolve())

    dense = replace(MODEL, scaling_pattern="none")
    plans = {
        "teacher": RunPlan(model=dense, training=TRAINING, teacher=None),
        "student": RunPlan(model=MODEL, training=replace(TRAINING, seed=SEED + 1), teacher=model("teacher")),
        "shared": RunPlan(
            model=MODEL, training=FINE_TUNE, teacher=model("teacher"), init=model("student"), shared_scales=True
        ),
    }
    teacher, student = "teacher", "shared"
    for edition, teacher_seed, student_seed, rate in ((2, SEED + 3, SEED + 7, 1e-3), (3, SEED + 9, SEED + 11, 1.5e-3)):
        longer_teacher, longer_student = f"teacher-{edition}", f"student-{edition}"
        plans[longer_teacher] = RunPlan(
            model=dense, training=replace(LONGER, seed=teacher_seed), teacher=None, init=model(teacher)
        )
        plans[longer_student] = RunPlan(
            model=MODEL, training=replace(LONGER, learning_rate=rate, seed=student_seed), teacher=model(longer_teacher),
            init=model(student), shared_scales=True,
        )  # fmt: skip
        teacher, student = longer_teacher, longer_student
    return {name: replace(plan, training=replace(plan.training, steps=steps[name])) for name, plan in plans.items()}


def run_stage(name: str, plan: RunPlan, data: Path, out: Path, console: Console) -> None:
    """Run one of `stages`, or what is left of it. Raises UsageError, and typer.Exit where Ctrl-C stopped it."""

    def prepare(run: Path) -> None:
        if not (out / "text" / "train.txt").exists():
            write_texts(data, out / "text")
        prepare_stage(run, plan, out / "text")

    train_or_resume(name, out / name, plan, prepare, console)


def train_or_resume(name: str, run: Path, plan: RunPlan, prepare: Callable[[Path], object], console: Console) -> None:
    """Train `run`, which `prepare` makes by `plan` where it isn't there, or what is left of it.

    Raises UsageError where it was begun with other hyperparameters, and typer.Exit where Ctrl-C stopped it.
    """
    console.rule(name)
    if begun := (run / "run.json").exists():
        before, now = RunPlan.load(run).training.to_dict(), plan.training.to_dict()
        if changed := [f"{key} {before[key]}, not {now[key]}" for key in now if before[key] != now[key]]:
            raise UsageError(f"{run} was begun with {', '.join(changed)}; choose another folder, or the same settings")
    else:
        prepare(run)
    done = run_with_progress(run, begun, console)
    if done is not None and done.step < RunPlan.load(run).training.steps:
        raise typer.Exit(STOPPED)


def check_corpora(data: Path) -> None:
    """Raises UsageError where one is missing."""
    for needed in (*STORIES, TITLED_STORIES, *DIALOGUES, HELD_OUT_STORIES):
        if not (data / needed).is_file():
            raise UsageError(f"{data / needed} is missing; --data must hold the corpora of the model card")


def main(
    data: Annotated[Path, typer.Option(help="Folder with the corpora.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the runs.")],
    steps: Annotated[str, typer.Option(help=f"Optimizer steps of each stage: {', '.join(STEPS)}.")] = LENGTHS,
) -> None:
    """Train the teacher and the student of the bundled model, let the student share its scales, and train both longer."""
    console = Console()
    check_corpora(data)
    lengths = steps.split(",")
    if len(lengths) != len(STEPS) or not all(map(str.isdecimal, lengths)):
        raise UsageError(f"--steps is {steps!r}, expected {len(STEPS)} numbers with commas between, as in {LENGTHS}")
    plans = stages(out, dict(zip(STEPS, map(int, lengths), strict=True)))
    for name, plan in plans.items():
        run_stage(name, plan, data, out, console)
    console.rule("held-out")
    report(out, tuple(plans), console)


def prepare_stage(run: Path, plan: RunPlan, texts: Path) -> None:
    """Write the folder of one of the runs, with the texts of `write_texts`."""
    held_out = [texts / "held_out_stories.txt", texts / "held_out_dialogues.txt"]
    markers = (USER, ASSISTANT, END) if plan.teacher is None else ()  # others take their teacher's tokenizer
    prepare_run(run, plan, [texts / "train.txt"], held_out, None, markers, CHAT_TEMPLATE, GENERATION)


def report(out: Path, names: tuple[str, ...], console: Console) -> None:
    """Print and store (OUT/report.json) the loss of each run's model on each held-out text."""
    rows = []
    for name in names:
        run = out / name
        model = load_model(run / "model")
        tokenizer = Tokenizer.from_file(str(run / "tokenizer.json"))
        for text in ("held_out_stories", "held_out_dialogues"):
            loss = held_out_loss(model, out / "text" / f"{text}.txt", tokenizer, out / "text" / f"{text}.tokens")
            row = {"model": name, "text": text, **asdict(loss)}
            rows.append({**row, "perplexity": loss.perplexity, "bits_per_byte": loss.bits_per_byte})
            console.print(
                f"{name:9} {text:20} {loss.nats_per_token:.4f} nats/token  perplexity {loss.perplexity:.3f}  "
                f"{loss.bits_per_byte:.4f} bits/byte  {loss.tokens} tokens"
            )
    (out / "report.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    try:
        typer.run(main)
    except FbiEdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
