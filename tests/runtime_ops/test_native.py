"""Builds runtime_ops alone, as an app would, and runs its native tests: with sanitizers here, and under emulation for Arm."""

from __future__ import annotations

import json
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.arm_machine import require
from support.native import SOURCE, build, call, tool

from fbiedge.config import PRESETS

# Those that compare kernels, which pass on every machine and under sanitizers.
NATIVE_TESTS = (
    "test_activations",
    "test_attention",
    "test_binary_layer",
    "test_binary_matmul",
    "test_matmul_nbits",
)


def test_native_tests_pass_under_sanitizers(tmp_path: Path) -> None:
    for program in NATIVE_TESTS:
        folder = build(tmp_path, "-DCMAKE_BUILD_TYPE=Debug", "-DFBIEDGE_SANITIZE=ON", target=program)
        # A leak check needs ptrace, which containers may deny; it is left to a run by hand.
        output = call(folder / program, env={"ASAN_OPTIONS": "detect_leaks=0"})
        assert output.endswith(" 0 failed\n")


def test_onnx_runtime_is_told_the_reason(tmp_path: Path) -> None:
    """Whatever fails inside the op, also in ONNX Runtime's own threads: its message, not "out of memory"."""
    folder = build(tmp_path, "-DCMAKE_BUILD_TYPE=Debug", "-DFBIEDGE_SANITIZE=ON", target="test_ort_errors")
    assert call(folder / "test_ort_errors", env={"ASAN_OPTIONS": "detect_leaks=0"}) == "0 failed\n"


def test_pool_is_used_only_while_it_helps(tmp_path: Path) -> None:
    folder = build(tmp_path, target="test_pool")
    assert call(folder / "test_pool") == "0 failed\n"


@pytest.mark.skipif(sys.platform != "linux", reason="nm's letters are those of ELF")
def test_kernel_objects_have_no_weak_symbols(tmp_path: Path) -> None:
    """Built without optimisation, where nothing is inlined away.

    An inline function with external linkage, compiled for AVX-512 in a kernel file, could be the copy that the linker
    keeps for the whole library; on a machine without AVX-512 that is an illegal instruction.
    """
    folder = build(tmp_path, "-DCMAKE_BUILD_TYPE=Debug", target="fbiedge_kernels")
    objects = sorted(folder.rglob("kernels/*.o"))
    assert "scalar.cc.o" in [path.name for path in objects]
    for path in objects:
        symbols = [line.split()[-2:] for line in call(tool("nm"), "--defined-only", path).splitlines()]
        visible = [(kind, name) for kind, name in symbols if kind.isupper() or kind in "wvu"]
        is_table = [kind in "DR" and re.fullmatch(r"_ZN7fbiedge\d+k[A-Z]\w+E", name) for kind, name in visible]
        assert len(visible) == 1 and all(is_table), f"{path.name}: {visible}"


def test_benchmark_ends_in_json(tmp_path: Path) -> None:
    folder = build(tmp_path, "-DCMAKE_BUILD_TYPE=Debug", target="bench_binary_matmul")
    shapes = tmp_path / "shapes.txt"
    shapes.write_text("# M x N x K\n1x64x172\n\n3x33x64  # a remark\n")
    output = call(folder / "bench_binary_matmul", "--file", shapes, "--seconds", "0.01", "--megabytes", "0.1")
    results = json.loads(output.splitlines()[-1])["results"]
    assert {(r["m"], r["n"], r["k"]) for r in results} == {(1, 64, 172), (3, 33, 64)}
    assert all(r["gmacs_per_second"] > 0 for r in results)
    for (
        result
    ) in results:  # decode is held against reading, int8 prefill against multiplying, fp32 prefill against nothing
        speed = result["gigabytes_per_second" if result["m"] == 1 else "gmacs_per_second"]
        has_limit = result["m"] == 1 or (result["level"] == "int8" and result["kernel"] != "scalar")
        assert (result["limit"] > 0) == has_limit
        assert not has_limit or result["share_of_limit"] == pytest.approx(speed / result["limit"], rel=0.05, abs=1e-3)


def test_shapes_to_measure_are_those_of_the_presets() -> None:
    for name in ("130m", "1.3b", "7b"):
        lines = (SOURCE / "bench" / "shapes" / f"{name}.txt").read_text().splitlines()
        shapes = {tuple(map(int, line.split()[0].split("x"))) for line in lines if not line.startswith("#")}
        assert shapes == {(m, n, k) for m in (1, 128) for n, k in PRESETS[name].linear_shapes().values()}


# Arm processors and the kernels that must be chosen there, best first: Raspberry Pi 4, a server without smmla, everything
# that the emulator knows. The other tests run where their kernels differ from those of a processor before.
EMULATED = {
    "cortex-a72": (
        ("neon", "scalar"),
        ("test_binary_matmul", "test_activations", "test_attention", "test_matmul_nbits"),
    ),
    "neoverse-n1": (("neon_dotprod", "neon", "scalar"), ("test_binary_matmul", "test_matmul_nbits")),
    "max": (("neon_i8mm", "neon_dotprod", "neon", "scalar"), ("test_binary_matmul", "test_binary_layer")),
}


def test_neon_kernels_equal_the_scalar_ones_under_emulation(tmp_path: Path) -> None:
    """The native tests compare every kernel with the scalar one, bit for bit at the int8 level."""
    require("aarch64-linux-gnu-g++", "qemu-aarch64")
    toolchain = "-DCMAKE_TOOLCHAIN_FILE=cmake/aarch64-linux-gnu.cmake"  # as runtime_ops/README.md says it
    for program in sorted({name for _, programs in EMULATED.values() for name in programs}):
        build(tmp_path, toolchain, target=program)

    def emulate(processor: str, program: str) -> str:
        return call("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", "-cpu", processor, tmp_path / program)

    runs = [(processor, name) for processor, (_, programs) in EMULATED.items() for name in programs]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        outputs = pool.map(lambda run: emulate(*run), runs)
    for (processor, name), output in zip(runs, outputs, strict=True):
        assert output.endswith(" 0 failed\n"), f"{processor} {name}: {output}"
        if name == "test_binary_matmul":
            assert f"kernels: {' '.join(EMULATED[processor][0])}\n" in output
