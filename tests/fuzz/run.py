"""Damages model files and prompt caches and runs the real commands on them; what isn't a result or one line is a finding.

    python tests/fuzz/run.py --seconds 600 [--seed 0] [--only gguf] [--jobs 2] [--save FOLDER]
    python tests/fuzz/run.py --replay FOLDER/onnx-17          one case again, in this process

Each case is a process of its own, forked from one that has everything imported, with limits on memory, time and the size
of files. It may end with 0, or with 2 and one line `error: …` that leaves no output behind. It may not end by a signal
(a crash in ONNX Runtime, llama.cpp or tokenizers counts as ours: we handed the file over), hang, ask for memory out of
proportion, or show a traceback. The files of a finding are saved. A seed gives the same cases on any machine; the last
line is one JSON document.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests import `support.…`
os.environ.update(TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

from fuzz.targets import CHAT, EVAL, INSPECT, RUN, TO_ONNX, Target, damage, targets

from fbiedge import cli

SECONDS_A_CASE = 30
MEMORY_BYTES = 2 << 30  # beyond what the process holds when it is forked
FILE_BYTES = 64 << 20


@dataclass(frozen=True)
class Outcome:
    """What became of one case."""

    kind: str  # read, refused, or what is wrong
    command: str
    detail: str

    @property
    def is_finding(self) -> bool:
        return self.kind not in ("read", "refused")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--cases", type=int, help="stop after so many of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="targets whose names begin so")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--save", type=Path, default=Path("build/fuzz"))
    parser.add_argument("--replay", type=Path)
    options = parser.parse_args()
    if options.replay:
        return replay(options.replay)
    _import_everything()
    with tempfile.TemporaryDirectory(prefix="fbiedge-fuzz-") as folder:
        found = [target for target in targets(Path(folder) / "sound") if target.name.startswith(options.only)]
        readers = []
        for job in range(options.jobs):
            read_end, write_end = os.pipe()
            if os.fork() == 0:
                os.close(read_end)
                try:
                    with os.fdopen(write_end, "w") as results:
                        work(found, job, options, Path(folder) / f"job-{job}", results)
                    os._exit(0)
                finally:  # never through exit handlers: those of ONNX Runtime wait for a thread of the first process
                    traceback.print_exc()
                    os._exit(1)
            os.close(write_end)
            readers.append(os.fdopen(read_end))
        counts: Counter[str] = Counter()
        by_target: Counter[str] = Counter()
        failed = False
        for reader in readers:
            for line in reader:
                name, kind = line.split()
                counts[kind] += 1
                by_target[name] += 1
            failed = os.wait()[1] != 0 or failed
    findings = sum(number for kind, number in counts.items() if kind not in ("read", "refused"))
    document = {"seed": options.seed, "cases": sum(counts.values()), "findings": findings, "outcomes": dict(counts)}
    print(json.dumps(document | {"targets": dict(sorted(by_target.items()))}))
    return 1 if findings or failed else 0


def work(found: list[Target], job: int, options: argparse.Namespace, folder: Path, results: object) -> None:
    """Every `jobs`-th case, until time is up."""
    ends, number = time.monotonic() + options.seconds, job
    while time.monotonic() < ends:
        index, which = divmod(number, len(found))
        if options.cases is not None and index >= options.cases:
            break
        target = found[which]
        number += options.jobs
        random = Random(f"{options.seed} {target.name} {index}")
        files, what = damage(target, found, random)
        commands = random.sample(target.commands, 1)
        outcome = attempt(target, files, commands, folder)
        print(target.name, outcome.kind, file=results, flush=True)  # type: ignore[call-overload]
        if outcome.is_finding:
            save(options.save / f"{target.name}-{options.seed}-{index}", target, files, commands, what, outcome)
            print(f"{target.name} {index}: {outcome.kind} in {outcome.command} after {what}", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)


def attempt(target: Target, files: dict[str, bytes], commands: list[tuple[str, ...]], folder: Path) -> Outcome:
    """Runs the commands on `files`, laid out in `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        path = folder / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (folder / "out").mkdir()
    outcome = Outcome("read", "", "")
    for command in commands:
        outcome = _forked(target, command, folder)
        if outcome.is_finding:
            break
    return outcome


def _forked(target: Target, command: tuple[str, ...], folder: Path) -> Outcome:
    arguments = [_argument(word, target, folder) for word in command]
    process = os.fork()
    if process == 0:
        _child(arguments, folder)
    deadline = time.monotonic() + SECONDS_A_CASE
    status = None
    while status is None:
        done, code = os.waitpid(process, os.WNOHANG)
        if done:
            status = code
        elif time.monotonic() > deadline:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return Outcome("hang", command[0], f"no end after {SECONDS_A_CASE} s")
        else:
            time.sleep(0.002)
    stderr = (folder / "stderr").read_text(errors="replace")
    left = [path.name for path in (folder / "out").iterdir()]
    return _judged(command[0], status, stderr, left)


def _judged(command: str, status: int, stderr: str, left: list[str]) -> Outcome:
    if os.WIFSIGNALED(status):
        return Outcome(f"crash-{signal.Signals(os.WTERMSIG(status)).name}", command, stderr[-2000:])
    code = os.waitstatus_to_exitcode(status)
    if "Traceback" in stderr or code not in (0, 2):
        return Outcome("traceback", command, stderr[-4000:])
    lines = stderr.splitlines()
    if code == 0:
        return Outcome("read", command, stderr[-500:])
    if "not enough memory" in stderr or "std::bad_alloc" in stderr:
        return Outcome("memory", command, stderr[-2000:])
    if not lines or not lines[-1].startswith("error: ") or any(not line.startswith("warning: ") for line in lines[:-1]):
        return Outcome("unclear", command, stderr[-2000:])
    if len(lines[-1]) > 1000 or not lines[-1].isprintable():
        return Outcome("unclear", command, stderr[-2000:])
    if left:
        return Outcome("half-written", command, f"{left}: {stderr[-2000:]}")
    return Outcome("refused", command, lines[-1])


def _child(arguments: list[str], folder: Path) -> None:
    """Never returns."""
    code = 70
    try:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        (folder / "stdin").write_text("he said\n")
        os.dup2(os.open(folder / "stdin", os.O_RDONLY), 0)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
        _limit()
        code = cli.run(arguments)
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else 70
    except BaseException:  # noqa: BLE001, whatever it is, it is what is looked for
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _limit() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    held = pages * resource.getpagesize()
    for limit, value in (
        (resource.RLIMIT_AS, held + MEMORY_BYTES),
        (resource.RLIMIT_CPU, SECONDS_A_CASE),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write then fails, as on a full disk


def _argument(word: str, target: Target, folder: Path) -> str:
    if word.startswith("IN"):
        return str(folder / "in" / target.opened) + word[2:]
    return word.replace("OUT", str(folder / "out"))


def save(
    place: Path, target: Target, files: dict[str, bytes], commands: list[tuple[str, ...]], what: str, outcome: Outcome
) -> None:
    """The files of a finding, and a case.json that says what it is."""
    shutil.rmtree(place, ignore_errors=True)
    for name, content in files.items():
        path = place / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    about = {
        "target": target.name, "opened": target.opened, "commands": commands, "damage": what, "outcome": outcome.kind,
        "detail": outcome.detail,
    }  # fmt: skip
    (place / "case.json").write_text(json.dumps(about, indent=2) + "\n")


def replay(place: Path) -> int:
    """The commands of a saved case, one after the other, in this process."""
    about = json.loads((place / "case.json").read_text())
    target = Target(about["target"], {}, about["opened"], (), ())
    with tempfile.TemporaryDirectory() as out:
        shutil.copytree(place / "in", Path(out) / "in")
        (Path(out) / "out").mkdir()
        codes = [cli.run([_argument(word, target, Path(out)) for word in command]) for command in about["commands"]]
    print(f"exit codes {codes}; it was {about['outcome']}")
    return max(codes)


def _import_everything() -> None:
    """What a command imports by itself, once for all cases. No session is opened: threads don't survive a fork."""
    import fbiedge.cli_evaluate
    import fbiedge.exporters.gguf.reader
    import fbiedge.exporters.onnx
    import fbiedge.llama_cpp_session
    import fbiedge.session  # noqa: F401
    from fbiedge.llama_cpp_library import load_library
    from fbiedge.ops_library import available_isas

    load_library()
    available_isas()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for command in (RUN, CHAT, INSPECT, TO_ONNX, EVAL):
            cli.run([word.replace("IN", "/nowhere.onnx").replace("OUT", "/nowhere") for word in command])


if __name__ == "__main__":
    sys.exit(main())
