"""One process of a training under test: `train_worker.py RUN...` executes or resumes runs, process 0 prints their reports.

RUN[:resume][:to=STEP][:limit=BYTES]    to: stop after that step, as if asked to; limit: no file may grow larger
"""

from __future__ import annotations

import json
import resource
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from fbiedge.errors import FbiEdgeError
from fbiedge.training.parallel import is_first, joined, leave
from fbiedge.training.run import execute_run


def run(folder: str, *words: str) -> None:
    options = dict(word.split("=") for word in words if "=" in word)
    done = 0
    if "limit" in options:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(options["limit"]), resource.RLIM_INFINITY))

    def stop() -> bool:
        return done + 1 == int(options.get("to", 0))

    for report in execute_run(Path(folder), "resume" in words, stop=stop):
        done = report.step
        if is_first():
            print(json.dumps({"run": Path(folder).name, **asdict(report)}), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    code = 0
    try:
        with joined():
            for argument in sys.argv[1:]:
                run(*argument.split(":"))
    except FbiEdgeError as error:
        print(f"error: {error}")
        code = error.exit_code
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else 1
    leave(code)
