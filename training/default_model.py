"""The recipe of the bundled model: texts -> full-precision teacher -> binary student -> shared scales, in one command.

    python -m fbiedge.training.default_model --data DATA -o RUNS [--student-steps N] [--final-steps N] ...

DATA holds the corpora of the model card (TinyStories, Synthetic-Persona-Chat, African Storybook) in the folders named
below. Stories come in two forms: half as plain text, half as the answer to a request that names something in
the story, so that a chat can ask for one. Dialogues become chats of user and assistant. The student learns with the
published `column` scales; a fine-tune then lets q, k, v and gate, up share theirs, so that GGUF holds the model exactly.
What bounds that student is its teacher, so the teacher then learns on, and the student from it. Interrupted, the same
command goes on where it stopped.
"""

from __future__ import annotations

import csv
import json
import lzma
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from tokenizers import Tokenizer

from fbiedge.config import preset
from fbiedge.errors import FbiEdgeError, UsageError

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
SEED = 11111

MODEL = preset("small")
TRAINING = replace(RECIPES["small"].training, compile=True)
# After 0.2M tokens peaks of 5e-4, 1e-3 and 2e-3 had cost 0.005, 0.021 and 0.048 nats of held-out loss against the start:
# the higher, the more is forgotten first. 1e-3 leaves a longer run room to gain; its end at 2e-5 settles the signs.
FINE_TUNE = replace(
    TRAINING, learning_rate=1e-3, min_learning_rate_ratio=0.02, warmup_steps=20, seed=SEED + 2, checkpoint_every=50,
    eval_every=100,
)  # fmt: skip
LONGER = replace(FINE_TUNE, warmup_steps=50)  # once more: the teacher with a peak of 1.5e-3, the student of 1e-3

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
    documents = []
    for path in DIALOGUES:
        with lzma.open(root / path, "rt", encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                turns = re.findall(r"^User ([12]): (.+)$", row["Best Generated Conversation"], re.MULTILINE)
                speakers = [speaker for speaker, _ in turns]
                if len(turns) >= 4 and all(s == "12"[i % 2] for i, s in enumerate(speakers)):
                    documents.append(
                        "".join(f"{USER if s == '1' else ASSISTANT}{tidy(text)}{END}" for s, text in turns)
                    )
    return documents


def tidy(text: str) -> str:
    """Plain quotes and dashes, single spaces, one newline between paragraphs: less to learn for a small model."""
    for curly, plain in (("\u2018", "'"), ("\u2019", "'"), ("\u201c", '"'), ("\u201d", '"'), ("\u2013", "-"), ("\u2014", " - "), ("\u2026", "...")):  # fmt: skip
        text = text.replace(curly, plain)
    return re.sub(r"\s*\n\s*", "\n", re.sub(r"[ \t]+", " ", text)).strip()


def write_texts(root: Path, out: Path) -> tuple[Path, Path, Path]:
    """Write the shuffled training text and the held-out stories and dialogues as three files below `out`."""
    dialogues = dialogue_documents(root)
    training = [*story_documents(root), *dialogues[:-HELD_OUT_DIALOGUES]]
    random.Random(SEED).shuffle(training)
    # This corpus separates its stories by blank lines only; most begin alike.
    with lzma.open(root / HELD_OUT_STORIES, "rt", encoding="utf-8") as file:
        held_out_stories = [tidy(story) for story in re.split(r"\n\n(?=Once upon a time)", file.read())]
    out.mkdir(parents=True, exist_ok=True)
    files = out / "train.txt", out / "held_out_stories.txt", out / "held_out_dialogues.txt"
    for path, documents in zip(files, (training, held_out_stories, dialogues[-HELD_OUT_DIALOGUES:]), strict=True):
        path.write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")
    return files


def _documents(path: Path) -> Iterator[str]:
    with lzma.open(path, "rt", encoding="utf-8") as file:
        for document in re.split(r"<\|endoftext\|>|<\|endofdoc\|>", file.read()):
            if document.strip():
                yield document.strip()


def stages(
    out: Path,
    *,
    teacher: int = 1500,
    student: int = 3600,
    shared: int = 1000,
    longer_teacher: int = 800,
    final: int = 1000,
) -> dict[str, RunPlan]:
    """The runs below `out`, in their order, each of so many steps; a later one starts from earlier ones' models."""

    def model(name: str) -> str:
        return str((out / name / "model").resolve())

    dense = replace(MODEL, scaling_pattern="none")
    return {
        "teacher": RunPlan(model=dense, training=replace(TRAINING, steps=teacher), teacher=None),
        "student": RunPlan(
            model=MODEL, training=replace(TRAINING, steps=student, seed=SEED + 1), teacher=model("teacher")
        ),
        "shared": RunPlan(
            model=MODEL, training=replace(FINE_TUNE, steps=shared), teacher=model("teacher"), init=model("student"),
            shared_scales=True,
        ),
        "longer-teacher": RunPlan(
            model=dense, training=replace(LONGER, steps=longer_teacher, learning_rate=1.5e-3, seed=SEED + 3), teacher=None,
            init=model("teacher"),
        ),
        "final": RunPlan(
            model=MODEL, training=replace(LONGER, steps=final, seed=SEED + 7), teacher=model("longer-teacher"),
            init=model("shared"), shared_scales=True,
        ),
    }  # fmt: skip


def run_stage(name: str, plan: RunPlan, data: Path, out: Path, console: Console) -> None:
    """Run one of `stages`, or what is left of it. Raises UsageError, and typer.Exit where Ctrl-C stopped it."""
    console.rule(name)
    if not (begun := (out / name / "run.json").exists()):
        if not (out / "text" / "train.txt").exists():
            write_texts(data, out / "text")
        prepare_stage(out / name, plan, out / "text")
    done = run_with_progress(out / name, begun, console)
    if done is not None and done.step < RunPlan.load(out / name).training.steps:
        raise typer.Exit(STOPPED)


def check_corpora(data: Path) -> None:
    """Raises UsageError where one is missing."""
    for needed in (*STORIES, TITLED_STORIES, *DIALOGUES, HELD_OUT_STORIES):
        if not (data / needed).is_file():
            raise UsageError(f"{data / needed} is missing; --data must hold the corpora of the model card")


def main(
    data: Annotated[Path, typer.Option(help="Folder with the corpora.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the runs.")],
    teacher_steps: Annotated[int, typer.Option(help="Optimizer steps of the teacher.")] = 1500,
    student_steps: Annotated[int, typer.Option(help="Optimizer steps of the student.")] = 3600,
    shared_steps: Annotated[int, typer.Option(help="Optimizer steps of the fine-tune into shared scales.")] = 1000,
    longer_teacher_steps: Annotated[int, typer.Option(help="Optimizer steps that the teacher learns on for.")] = 800,
    final_steps: Annotated[int, typer.Option(help="Optimizer steps of the student with that teacher.")] = 1000,
) -> None:
    """Train the teacher and the student of the bundled model, let the student share its scales, and train both longer."""
    console = Console()
    check_corpora(data)
    plans = stages(
        out, teacher=teacher_steps, student=student_steps, shared=shared_steps, longer_teacher=longer_teacher_steps,
        final=final_steps,
    )  # fmt: skip
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
                f"{name:8} {text:20} {loss.nats_per_token:.4f} nats/token  perplexity {loss.perplexity:.3f}  "
                f"{loss.bits_per_byte:.4f} bits/byte  {loss.tokens} tokens"
            )
    (out / "report.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    try:
        typer.run(main)
    except FbiEdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
