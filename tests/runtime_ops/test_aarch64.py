"""The op library on 64-bit Arm: cross-compiled, and run inside the ONNX Runtime of the aarch64 wheel under qemu-user.

test_native.py compares the Arm kernels with the scalar one, alone. Here are the tests of the operators themselves, which
run whole under the machine's own Python, and the C++ example; both on processors that choose different kernels.
"""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from support.arm_machine import CROSS, ROOT, ArmMachine
from support.bundled import MODEL, PROMPT
from support.native import SOURCE, build, call, install

from fbiedge.session import Session
from fbiedge.tokenizer import Tokenizer

# The kernels that each processor must choose: Raspberry Pi 3, 4 and 5, a server, and all that the emulator knows.
CHOICE = {
    "cortex-a53": ["neon", "scalar"],
    "cortex-a72": ["neon", "scalar"],
    "cortex-a76": ["neon_dotprod", "neon", "scalar"],
    "neoverse-n1": ["neon_dotprod", "neon", "scalar"],
    "max": ["neon_i8mm", "neon_dotprod", "neon", "scalar"],
}
TOKENS = 48


@pytest.fixture(scope="module")
def machine() -> ArmMachine:
    return ArmMachine.create("pytest", "onnx")


@pytest.fixture(scope="module")
def arm_library(machine: ArmMachine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prefix of `cmake --install`, for Arm."""
    folder = tmp_path_factory.mktemp("arm library")
    return install(folder / "build", folder / "prefix", CROSS)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages of the checkout, laid out as they are when installed."""
    package = tmp_path_factory.mktemp("checkout") / "fbiedge"
    package.mkdir()
    for path in (ROOT / "fbiedge").iterdir():
        (package / path.name).symlink_to(path)
    (package / "exporters").symlink_to(ROOT / "exporters")
    return package.parent


def python(
    machine: ArmMachine, library: Path, checkout: Path, processor: str, *arguments: str
) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("FBIEDGE", "PYTHON"))}
    environment |= {
        "FBIEDGE_OPS_LIBRARY": str(library / "lib/libfbiedge_ops.so"),
        "PYTHONPATH": os.pathsep.join([str(checkout), str(machine.packages)]),
    }
    command = [str(machine.python(checkout, processor)), *arguments]
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)


def test_each_processor_gets_the_best_kernels_that_it_can_run(
    machine: ArmMachine, arm_library: Path, checkout: Path
) -> None:
    code = "from fbiedge import ops_library as o; print(o.active_isa(), *o.available_isas())"
    for processor, isas in CHOICE.items():
        done = python(machine, arm_library, checkout, processor, "-c", code)
        assert done.stdout.split() == [isas[0], *isas], f"{processor}: {done.stderr}"


def test_the_operators_pass_their_tests(machine: ArmMachine, arm_library: Path, checkout: Path) -> None:
    """The same files that test them here; each test runs on every kernel of the processor that knows all."""
    files = [["test_onnxruntime.py", "test_matmul_nbits.py"], ["test_attention.py", "test_binary_layer.py"]]

    def run(names: list[str]) -> subprocess.CompletedProcess[str]:
        paths = [str(ROOT / "tests/runtime_ops" / name) for name in names]
        options = ["-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
        options += ["-k", "not neither_copied_nor_repacked"]  # measures memory, here the emulator's
        return python(machine, arm_library, checkout, "max", "-m", "pytest", *options, *paths)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in pool.map(run, files):
            assert done.returncode == 0, f"{done.stdout[-4000:]}{done.stderr[-4000:]}"
            assert " passed" in done.stdout and "skipped" not in done.stdout


@pytest.fixture(scope="module")
def ids() -> tuple[list[int], list[int]]:
    """A prompt and its greedy continuation, here."""
    session = Session.open(MODEL, threads=1)
    prompt = list(Tokenizer.from_model(session.model).encode(PROMPT))
    continuation = [int(np.argmax(session.forward(prompt)))]
    while len(continuation) < TOKENS:
        continuation.append(int(np.argmax(session.forward(continuation[-1:]))))
    return prompt, continuation


def test_the_example_generates_the_same_ids_as_here(
    machine: ArmMachine, arm_library: Path, ids: tuple[list[int], list[int]], tmp_path: Path
) -> None:
    (onnxruntime,) = (machine.packages / "onnxruntime/capi").glob("libonnxruntime.so.*")
    options = (CROSS, f"-DCMAKE_PREFIX_PATH={arm_library}", f"-DONNXRUNTIME_LIBRARY={onnxruntime}")
    build(tmp_path, *options, source=SOURCE / "examples")
    prompt, continuation = ids
    for processor, threads in (("cortex-a53", "1"), ("cortex-a76", "2"), ("max", "1")):
        command = machine.program(processor, tmp_path / "generate")
        output = call(*command, "--threads", threads, MODEL, "linked", str(TOKENS), *map(str, prompt))
        assert output.splitlines()[0].split() == [*map(str, continuation)], processor
