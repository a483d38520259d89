"""Zero-shot questions in files, scored by the harness's metrics; its own tasks on rows that stand in for the hub's."""

from __future__ import annotations

import gzip
import json
import lzma
import math
import os
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import scipy.stats
from support.huggingface_folders import llama_folder

from fbiedge.engines import open_logits
from fbiedge.errors import UsageError
from fbiedge.harness.files import read_task_file
from fbiedge.harness.tasks import PUBLISHED, load_tasks, run_tasks, wilson
from fbiedge.metrics import token_losses

from .conftest import Run, command, one_error_line

OWN = {"context": "The cat sat on the", "choices": ["mat", "very high mountain", "é"], "gold": 0}
FOUNDRY = {"query": "Question: What melts?\n", "choices": ["ice", "stone"], "gold": 0}
SCHEMA = {
    "context_options": ["The cup was full so the cup", "The cup was full so the jug"],
    "continuation": "spilt.",
    "gold": 1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_folder(tmp_path_factory.mktemp("llama") / "model", context=128)


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_forms(tmp_path: Path) -> None:
    own, other = read_task_file(write(tmp_path / "own.jsonl", OWN, FOUNDRY)).questions
    assert own.contexts == ("The cat sat on the",) and own.continuations == ("mat", "very high mountain", "é")
    assert other.contexts == ("Question: What melts?\nAnswer:",) and other.gold == 0
    boolq = FOUNDRY | {"query": "Passage: Ice melts.\nQuestion: does ice melt?"}
    plain = FOUNDRY | {"query": "Ice will "}
    written = write(tmp_path / "other.jsonl", boolq, plain)
    assert [one.contexts[0] for one in read_task_file(written).questions] == [
        "Passage: Ice melts.\nQuestion: does ice melt?\nAnswer:",
        "Ice will",
    ]
    schema = read_task_file(write(tmp_path / "schema.jsonl", SCHEMA))
    assert schema.varies == "contexts" and schema.questions[0].continuations == ("spilt.",)


def test_packed_files_and_their_names(tmp_path: Path) -> None:
    line = json.dumps(OWN).encode() + b"\n\n"  # an empty line is none
    for name, packed in (
        ("a.b.jsonl.xz", lzma.compress(line)),
        ("a.b.jsonl.gz", gzip.compress(line)),
        ("a.b.jsonl", b"\xef\xbb\xbf" + line),
    ):
        (tmp_path / name).write_bytes(packed)
        found = read_task_file(tmp_path / name)
        assert found.name == "a.b" and len(found.questions) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ("[]", "line 2 holds a JSON list, expected an object"),
        ('{"choices": ["a", "b"], "gold": 0}', 'line 2 has none of "context", "query" and "context_options"'),
        ('{"context": 3, "choices": ["a", "b"], "gold": 0}', 'line 2: "context" is no text'),
        ('{"query": " ", "choices": ["a", "b"], "gold": 0}', 'line 2: "query" is no text'),
        ('{"query": "q", "choices": ["a"], "gold": 0}', 'line 2: "choices" is no list of at least two texts'),
        ('{"query": "q", "choices": "ab", "gold": 0}', 'line 2: "choices" is no list of at least two texts'),
        ('{"query": "q", "choices": ["a", ""], "gold": 0}', 'line 2: option 1 of "choices" is no text'),
        ('{"query": "q", "choices": ["a", "\\ud800"], "gold": 0}', "half a surrogate pair"),
        ('{"query": "q", "choices": ["a", "b"], "gold": 2}', 'line 2: "gold" is 2, expected a number from 0 to 1'),
        ('{"query": "q", "choices": ["a", "b"], "gold": true}', '"gold" is True'),
        ('{"query": "q", "choices": ["a", "b"]}', '"gold" is None'),
        (json.dumps(SCHEMA), "line 2 is of another form than those before it"),
        ('{"context_options": ["a", "b"], "gold": 0}', 'line 2: "continuation" is no text'),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text(f"{json.dumps(OWN)}\n{line}\n")
    with pytest.raises(UsageError) as caught:
        read_task_file(path)
    assert message in str(caught.value) and str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl.xz").write_bytes(b"no xz")
    (tmp_path / "bad.jsonl.gz").write_bytes(gzip.compress(b"x" * 1000)[:20])
    packed = gzip.compress(bytes(1000))
    (tmp_path / "wrong.jsonl.gz").write_bytes(packed[:12] + b"\xff" * 4 + packed[16:])
    (tmp_path / "latin.jsonl").write_bytes(b"\xe9\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    for name in ("none.jsonl", "bad.jsonl.xz", "bad.jsonl.gz", "wrong.jsonl.gz", "latin.jsonl"):
        with pytest.raises(UsageError, match="can't read the task file"):
            read_task_file(tmp_path / name)
    with pytest.raises(UsageError, match="holds no questions"):
        read_task_file(tmp_path / "empty.jsonl")


def test_scores_are_those_of_a_plain_sum(folder: Path, tmp_path: Path) -> None:
    """acc and acc_norm, counted here from the log-likelihoods of each answer alone."""
    rows = [OWN, FOUNDRY, OWN | {"gold": 2}, FOUNDRY | {"gold": 1}, OWN | {"context": "Once upon a time", "gold": 1}]
    file = read_task_file(write(tmp_path / "own.jsonl", *rows))
    engine = open_logits(folder, tokens=128)
    assert engine.tokenizer is not None
    best, best_by_length = [], []
    for question in file.questions:
        sums = []
        for answer in question.continuations:
            context = engine.tokenizer.encode(question.contexts[0])
            ids = engine.tokenizer.encode(f"{question.contexts[0]} {answer}")
            engine.reset()
            sums.append(-token_losses(engine.logits(ids[:-1]), ids[1:])[len(context) - 1 :].sum())
        best.append(np.argmax(sums) == question.gold)
        lengths = [len(answer) for answer in question.continuations]
        best_by_length.append(np.argmax(np.array(sums) / lengths) == question.gold)
    report = run_tasks(engine, load_tasks([], [file]), window=128)
    acc, acc_norm = report.scores
    assert (acc.metric, acc.value, acc.questions) == ("acc", np.mean(best), 5)
    assert (acc_norm.metric, acc_norm.value) == ("acc_norm", np.mean(best_by_length))
    assert acc.chance == pytest.approx((3 * 1 / 3 + 2 * 1 / 2) / 5)
    assert acc.standard_error == pytest.approx(np.std(best, ddof=1) / math.sqrt(5))
    assert acc.interval == wilson(acc.value, 5)


def test_schema_compares_contexts(folder: Path, tmp_path: Path) -> None:
    engine = open_logits(folder, tokens=128)
    assert engine.tokenizer is not None
    sums = []
    for context in SCHEMA["context_options"]:
        start, ids = len(engine.tokenizer.encode(context)), engine.tokenizer.encode(f"{context} spilt.")
        engine.reset()
        sums.append(-token_losses(engine.logits(ids[:-1]), ids[1:])[start - 1 :].sum())
    best = int(np.argmax(sums))
    file = read_task_file(write(tmp_path / "own.jsonl", SCHEMA | {"gold": best}, SCHEMA | {"gold": 1 - best}))
    (only,) = run_tasks(engine, load_tasks([], [file]), window=128).scores
    assert (only.metric, only.value, only.chance) == ("acc", 0.5, 0.5)


@pytest.mark.parametrize(("right", "count"), [(250, 1000), (0, 10), (10, 10), (1, 2)])
def test_wilson(right: int, count: int) -> None:
    expected = scipy.stats.binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert wilson(right / count, count) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_the_command(folder: Path, tmp_path: Path) -> None:
    """In a process of its own, where the harness's bars and warnings would show. The hub is not asked for anything."""
    listener = socket.create_server(("127.0.0.1", 0))
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{listener.getsockname()[1]}",
        "HF_HOME": str(tmp_path),
    }
    environment.pop("HF_HUB_OFFLINE", None)
    own = write(tmp_path / "own.jsonl", OWN, OWN, OWN)
    schema = write(tmp_path / "schema.jsonl", SCHEMA)
    done = command("eval", folder, "--task-file", own, "--task-file", schema, "--limit", 2, "--json", env=environment)
    listener.setblocking(False)
    with pytest.raises(BlockingIOError):  # nobody called
        listener.accept()
    listener.close()
    assert (done.returncode, done.stderr) == (0, "")
    *table, last = done.stdout.splitlines()
    report = json.loads(last)
    assert [(score["task"], score["metric"], score["questions"]) for score in report["scores"]] == [
        ("own", "acc", 2), ("own", "acc_norm", 2), ("schema", "acc", 1),
    ]  # fmt: skip
    assert [score["file"] for score in report["scores"]] == [str(own), str(own), str(schema)]
    assert report["limit"] == 2 and report["window"] == 128 and report["engine"] == "numpy reference, fp32"
    assert table[2].split() == ["task", "metric", "value", "95", "%", "interval", "chance", "questions"]
    assert len(table) == 6 and "the first 2 questions of each task" in table[1]


ROWS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "boolq": ("validation", [{"passage": "Ice melts.", "question": "does ice melt", "idx": 0, "label": 1}]),
    "piqa": ("validation", [{"goal": "What melts?", "sol1": "ice", "sol2": "stone", "label": 0}]),
    "hellaswag": (
        "validation",
        [
            {
                "ind": 1, "activity_label": "Baking", "ctx_a": "A man bakes.", "ctx_b": "he", "ctx": "A man bakes. he",
                "endings": ["eats.", "flies.", "sinks.", "melts."], "source_id": "x", "split": "val",
                "split_type": "indomain", "label": "0",
            }
        ],
    ),
    "winogrande": (
        "validation", [{"sentence": "The cup was full so _ spilt.", "option1": "it", "option2": "I", "answer": "1"}]
    ),
    "arc_easy": (
        "test",
        [{"id": "1", "question": "What melts?", "answerKey": "A", "choices": {"text": ["ice", "stone"], "label": ["A", "B"]}}],
    ),
    "openbookqa": (
        "test",
        [{"id": "1", "question_stem": "What melts is", "answerKey": "A", "choices": {"text": ["ice", "stone"], "label": ["A", "B"]}}],
    ),
}  # fmt: skip
ROWS["arc_challenge"] = ROWS["arc_easy"]
_PATHS = {"baber/piqa": "piqa", "Rowan/hellaswag": "hellaswag", "allenai/winogrande": "winogrande",
          "allenai/ai2_arc": "arc_easy", "allenai/openbookqa": "openbookqa", "aps/super_glue": "boolq"}  # fmt: skip


def stand_in(path: str, *_: object, **__: object) -> datasets.DatasetDict:
    split, rows = ROWS[_PATHS[path]]
    return datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name in {"train", "validation", split}})


def test_the_seven_published_tasks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    tasks = load_tasks(PUBLISHED, [])
    assert tuple(tasks) == PUBLISHED
    report = run_tasks(open_logits(folder, tokens=128), tasks, window=128)
    with_length = [score.task for score in report.scores if score.metric == "acc_norm"]
    assert [score.task for score in report.scores if score.metric == "acc"] == list(PUBLISHED)
    assert with_length == [name for name in PUBLISHED if name not in ("boolq", "winogrande")]
    assert {score.task: score.chance for score in report.scores} == {
        name: 0.25 if name == "hellaswag" else 0.5 for name in PUBLISHED
    }


def test_a_file_of_the_same_question_gives_the_same_prompt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    theirs = load_tasks(["arc_easy", "piqa"], [])
    ours = load_tasks([], [read_task_file(write(tmp_path / "own.jsonl", FOUNDRY))])["own"]
    question = ours.task_docs[0]
    for task in theirs.values():
        assert task.doc_to_text(task.task_docs[0]) == ours.doc_to_text(question)
        assert task.doc_to_choice(task.task_docs[0]) == ours.doc_to_choice(question)
        assert task.config.target_delimiter == ours.config.target_delimiter == " "


def test_errors_of_the_command(fbiedge: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = write(tmp_path / "own.jsonl", OWN)
    (tmp_path / "folder").mkdir()
    twin = write(tmp_path / "folder/own.jsonl", OWN)
    for options, message in (
        (["--task-file", own, "--task-file", twin], "two tasks are called own"),
        (["--task-file", own, "--tasks", "own"], "two tasks are called own"),
        (["--task-file", own, "--limit", "0"], "--limit is 0, expected at least 1"),
        (["--task-file", own, "--max-tokens", "5"], "--max-tokens has a meaning only with"),
        (["--task-file", own, "--text", own], "expected one of --text, --dataset, and --tasks"),
        (["--tasks", "piqa,,boolq"], "expected names with commas between"),
        ([], "expected one of --text"),
    ):
        assert message in one_error_line(fbiedge("eval", folder, *options))

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route\nto the host")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    error = one_error_line(fbiedge("eval", folder, "--tasks", "piqa"))
    assert "can't get piqa from the Hugging Face hub or its cache (no route); give its questions in a file" in error


@pytest.mark.parametrize(
    ("loaded", "message"),
    [
        (SimpleNamespace(UNSAFE_CODE=True), "^odd needs more than text"),
        (SimpleNamespace(MULTIMODAL=True), "^odd needs more than text"),
        (ModuleNotFoundError("no", name="math_verify"), "^odd needs math_verify, which isn't installed"),
        (ValueError("a wrong\nfile"), r"^can't get odd from .* \(a wrong\); give its questions in a file"),
    ],
)
def test_tasks_that_cannot_be_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, loaded: Any, message: str) -> None:
    def load(names: list[str]) -> dict[str, Any]:
        if isinstance(loaded, Exception):
            raise loaded
        return {"tasks": {names[0]: loaded}}

    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda: SimpleNamespace(all_tasks=["odd"], load=load))
    with pytest.raises(UsageError, match=message):
        load_tasks(["odd"], [])
    if isinstance(loaded, SimpleNamespace):  # as a group brings tasks of other names than its own
        file = read_task_file(write(tmp_path / "part.jsonl", OWN))
        group = SimpleNamespace(all_tasks=["odd"], load=lambda _: {"tasks": {"part": loaded}})
        monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda: group)
        with pytest.raises(UsageError, match="two tasks are called part"):
            load_tasks(["odd"], [file])
    with pytest.raises(UsageError, match="lm-evaluation-harness has no task other; FBI-LLM's are boolq, piqa"):
        load_tasks(["other"], [])


def test_the_harness_is_looked_for_before_the_model(
    fbiedge: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = write(tmp_path / "own.jsonl", OWN)
    (tmp_path / "broken.onnx").touch()
    for name in ("lm_eval", "lm_eval.evaluator"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "no.onnx does not exist" in one_error_line(fbiedge("eval", tmp_path / "no.onnx", "--task-file", own))
    error = one_error_line(fbiedge("eval", tmp_path / "broken.onnx", "--task-file", own))
    assert "this needs lm_eval" in error and "pip install 'fbiedge[eval]'" in error


@pytest.mark.parametrize("options", [["--dataset", "c4"], ["--tasks", "boolq"]])
def test_without_the_hub_in_a_process_of_its_own(folder: Path, tmp_path: Path, options: list[str]) -> None:
    """For real: nobody listens there. Without care the hub's library tries for half a minute and prints of it."""
    environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    environment.pop("HF_HUB_OFFLINE", None)
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    started = time.monotonic()
    done = command("eval", folder, *options, env=environment)
    error = one_error_line((done.returncode, done.stdout, done.stderr))
    assert f"can't get {options[1]} from the Hugging Face hub or its cache" in error
    assert ("--dataset-file FILE" if options[1] == "c4" else "--task-file FILE") in error
    assert time.monotonic() - started < 60
