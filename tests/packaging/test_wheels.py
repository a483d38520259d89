"""Wheels for other systems: their libraries need only what a tag promises, and Arm's generates under emulation.

Those of macOS and Windows are read, not run: there is neither here.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lief
import pytest
from support.arm_machine import ROOT, ArmMachine
from support.binary_matmul import FORMS, problem
from support.bundled import MODEL, PROMPT, golden

from fbiedge import ops_library

SCRIPT = ROOT / "runtime_ops/packaging/build_wheels.py"
HEADER = ROOT / "runtime_ops/include/fbiedge_ops.h"
EXPORTED = {"RegisterCustomOps", *re.findall(r"FBIEDGE_EXPORT\s[^;]*?(fbiedge_\w+)\(", HEADER.read_text())}
TAGS = {
    "linux-x86_64": "manylinux2014_x86_64.manylinux_2_17_x86_64",
    "linux-aarch64": "manylinux2014_aarch64.manylinux_2_17_aarch64",
    "macos-arm64": "macosx_11_0_arm64",
    "windows-x86_64": "win_amd64",
}
GLIBC = {"libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
MACHINES = {"linux-x86_64": lief.ELF.ARCH.X86_64, "linux-aarch64": lief.ELF.ARCH.AARCH64}


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A wheel of each platform, by the command that makes them for a release."""
    out = tmp_path_factory.mktemp("wheels")
    done = subprocess.run([sys.executable, SCRIPT, "-o", out], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    built = [Path(line.split()[0]) for line in done.stdout.splitlines()]
    assert sorted(built) == sorted(out.iterdir())
    return dict(zip(TAGS, built, strict=True))


@pytest.fixture(scope="module")
def libraries(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The one library of each wheel, unpacked."""
    found = {}
    for name, wheel in wheels.items():
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (m for m in archive.namelist() if m.startswith("fbiedge/lib/"))
            found[name] = Path(archive.extract(member, tmp_path_factory.mktemp(name)))
    return found


@pytest.mark.parametrize("platform", TAGS)
def test_name_and_contents(platform: str, wheels: dict[str, Path], libraries: dict[str, Path]) -> None:
    wheel = wheels[platform]
    assert wheel.name.endswith(f"-py3-none-{TAGS[platform]}.whl")
    system = platform.partition("-")[0]
    names = {"linux": "libfbiedge_ops.so", "macos": "libfbiedge_ops.dylib", "windows": "fbiedge_ops.dll"}
    assert libraries[platform].name == names[system]  # where fbiedge.ops_library looks for it
    with zipfile.ZipFile(wheel) as archive:
        members = archive.namelist()
        (metadata,) = (m for m in members if m.endswith(".dist-info/WHEEL"))
        tags = re.findall(r"^Tag: py3-none-(\S+)$", archive.read(metadata).decode(), re.MULTILINE)
    assert sorted(tags) == sorted(TAGS[platform].split("."))
    for needed in ("fbiedge/cli.py", "fbiedge/exporters/onnx/graph.py", "fbiedge/training/trainer.py",
                   "fbiedge/models/default.onnx", "fbiedge/include/fbiedge_ops.h"):  # fmt: skip
        assert needed in members
    assert not [m for m in members if m.endswith((".a", ".lib", ".pdb", ".pyc", ".cc"))]


@pytest.mark.parametrize("platform", [name for name in TAGS if name.startswith("linux")])
def test_linux_needs_an_old_glibc_and_nothing_else(platform: str, libraries: dict[str, Path]) -> None:
    library = lief.ELF.parse(str(libraries[platform]))
    assert library is not None and library.header.machine_type == MACHINES[platform]
    assert set(library.libraries) - GLIBC == set()
    needed = [version.name for file in library.symbols_version_requirement for version in file.get_auxiliary_symbols()]
    versions = [tuple(map(int, name.removeprefix("GLIBC_").split("."))) for name in needed]  # all are glibc's
    assert versions and max(versions) <= (2, 17)
    assert {symbol.name for symbol in library.exported_symbols} == EXPORTED
    assert not any(
        segment.type == lief.ELF.Segment.TYPE.GNU_STACK and 1 & int(segment.flags.value) for segment in library.segments
    )


def test_macos(libraries: dict[str, Path]) -> None:
    binary = lief.MachO.parse(str(libraries["macos-arm64"]))
    assert binary is not None and binary.size == 1
    library = binary.at(0)
    assert library is not None and library.header.cpu_type == lief.MachO.Header.CPU_TYPE.ARM64
    assert library.build_version is not None
    assert library.build_version.platform == lief.MachO.BuildVersion.PLATFORMS.MACOS
    assert library.build_version.minos == [11, 0, 0]
    assert {item.name for item in library.libraries} == {"@rpath/libfbiedge_ops.dylib", "/usr/lib/libSystem.B.dylib"}
    assert library.has_code_signature  # without one, at least an ad-hoc one, Apple silicon doesn't load it
    assert library.dyld_info is not None
    exported = {item.symbol.name for item in library.dyld_info.exports if item.symbol is not None}
    assert exported - {"___dso_handle", "__mh_dylib_header"} == {
        f"_{name}" for name in EXPORTED
    }  # two are the linker's


def test_windows(libraries: dict[str, Path]) -> None:
    """Windows 10 and later bring the C runtime that it imports (api-ms-win-crt-*)."""
    library = lief.PE.parse(str(libraries["windows-x86_64"]))
    assert library is not None and library.header.machine == lief.PE.Header.MACHINE_TYPES.AMD64
    imported = {str(item.name).lower() for item in library.imports}
    assert imported - {"kernel32.dll"} and all(
        name == "kernel32.dll" or name.startswith("api-ms-win-crt-") for name in imported
    )
    exports = library.get_export()
    assert exports is not None and {entry.name for entry in exports.entries} == EXPORTED


@pytest.fixture(scope="module")
def raspberry_pi(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[ArmMachine, Path]:
    """A machine, and the folder into which pip installed the wheel as it does there."""
    machine = ArmMachine.create("pytest", "onnx")
    folder = tmp_path_factory.mktemp("raspberry pi")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps",
               "--only-binary=:all:", "--platform", "manylinux_2_17_aarch64", "--target", str(folder / "site"),
               str(wheels["linux-aarch64"])]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, text=True)
    return machine, folder


def fbiedge(machine: ArmMachine, folder: Path, processor: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The installed command, on the machine."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("FBIEDGE", "PYTHON"))}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder / "site"), str(machine.packages)])
    command = [str(machine.python(folder, processor)), str(folder / "site/bin/fbiedge"), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_a_raspberry_pi_writes_the_golden_text(raspberry_pi: tuple[ArmMachine, Path]) -> None:
    """The README's path, on a Raspberry Pi 3, a Raspberry Pi 5 and a processor that knows everything."""
    best = {"cortex-a53": "neon", "cortex-a76": "neon_dotprod", "max": "neon_i8mm"}

    def generate(processor: str) -> subprocess.CompletedProcess[str]:
        options = ("-p", PROMPT, "--max-tokens", "96", "--temperature", "0")
        return fbiedge(*raspberry_pi, processor, "generate", *options)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for processor, done in zip(best, pool.map(generate, best), strict=True):
            assert done.returncode == 0, f"{processor}: {done.stderr}"
            assert done.stdout.rstrip("\n") == golden("int8"), processor
            assert f" {best[processor]} kernels, int8 " in done.stderr


@pytest.mark.parametrize("form", FORMS)
def test_both_compilers_give_the_same_bits(
    form: str, libraries: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the int8 level, on every kernel that runs here: the wheel's library is clang's, the installed one often GCC's."""
    for m, n, k in [(1, 345, 172), (9, 80, 300), (33, 64, 640)]:
        p = problem(m, n, k, form)
        for isa in ops_library.available_isas():
            monkeypatch.delenv("FBIEDGE_OPS_LIBRARY", raising=False)
            here = ops_library.matmul(*p.arguments(), n=n, scale_form=form, isa=isa)
            monkeypatch.setenv("FBIEDGE_OPS_LIBRARY", str(libraries["linux-x86_64"]))
            assert ops_library.matmul(*p.arguments(), n=n, scale_form=form, isa=isa).tobytes() == here.tobytes()


def test_the_x86_wheel_writes_it_too(libraries: dict[str, Path]) -> None:
    code = "import sys; from fbiedge import cli; sys.exit(cli.run(sys.argv[1:]))"
    options = ["generate", str(MODEL), "-p", PROMPT, "--max-tokens", "96", "--temperature", "0"]
    environment = {**os.environ, "FBIEDGE_OPS_LIBRARY": str(libraries["linux-x86_64"])}
    done = subprocess.run(
        [sys.executable, "-c", code, *options], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip("\n") == golden("int8")
