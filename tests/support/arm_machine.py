"""A 64-bit Arm machine under qemu-user: Debian's own arm64 Python, and the packages that pip would install there.

Everything is kept in build/arm-machine/ for the next run. The first time takes about 20 seconds: apt fetches 16 MB of
signed packages into lists of its own, so that nothing of this system changes and nobody needs to be root, and pip 60 MB.

    machine = ArmMachine.create()
    subprocess.run([machine.python(folder, "cortex-a72"), "-c", "print()"])   # PYTHONPATH: machine.packages
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import onnxruntime
import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("qemu-aarch64", "aarch64-linux-gnu-g++", "apt-get", "dpkg-deb")
CROSS = f"-DCMAKE_TOOLCHAIN_FILE={ROOT}/runtime_ops/cmake/aarch64-linux-gnu.cmake"
# The processor of a Raspberry Pi 4, in the words of its kernel. ONNX Runtime reads them when it is loaded, and crashes on
# those of an x86 kernel; what the processor can do it asks the emulator.
CPUINFO = """\
processor	: 0
BogoMIPS	: 108.00
Features	: fp asimd evtstrm crc32 cpuid
CPU implementer	: 0x41
CPU architecture: 8
CPU variant	: 0x0
CPU part	: 0xd08
CPU revision	: 3

"""


def require(*programs: str) -> None:
    """Skips the test where one of the programs is missing; with FBIEDGE_REQUIRE_QEMU=1 it fails."""
    missing = [name for name in programs if shutil.which(name) is None]
    if missing:
        unavailable(f"no {' or '.join(missing)} (Debian: apt-get install g++-aarch64-linux-gnu qemu-user)")


def unavailable(reason: str) -> None:
    assert os.environ.get("FBIEDGE_REQUIRE_QEMU") != "1", f"FBIEDGE_REQUIRE_QEMU=1, but there is {reason}"
    pytest.skip(reason)


@dataclass(frozen=True)
class ArmMachine:
    """Files of the machine: `root` is its system, `packages` what pip installed."""

    root: Path
    packages: Path

    @staticmethod
    def create(*extra_packages: str) -> ArmMachine:
        """The machine with the runtime's dependencies, ONNX Runtime in the version that is installed here."""
        require(*PROGRAMS)
        wanted = sorted({f"onnxruntime=={onnxruntime.__version__}", *_dependencies(), *extra_packages})
        key = "\n".join([*wanted, (ROOT / "constraints.txt").read_text(), sys.version])
        folder = ROOT / "build/arm-machine" / hashlib.sha256(key.encode()).hexdigest()[:12]
        if not folder.exists():
            partial = folder.with_name(f"{folder.name}.{os.getpid()}")
            try:
                _fetch_system(partial / "apt", partial / "root")
                _fetch_packages(partial / "packages", _python(partial / "root").name, wanted)
                shutil.rmtree(partial / "apt")
                partial.rename(folder)
            except subprocess.CalledProcessError as error:
                unavailable(f"no arm64 Python: {error.cmd[0]} failed: {error.stderr.strip().splitlines()[-1:]}")
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        return ArmMachine(folder / "root", folder / "packages")

    def program(self, processor: str, path: str | Path) -> list[str]:
        """The command that runs a program of Arm on that processor."""
        return ["qemu-aarch64", "-cpu", processor, "-L", str(self.root), str(path)]

    def python(self, folder: Path, processor: str) -> Path:
        """A file in `folder` that is the machine's Python: what runs there may start it again as sys.executable."""
        interpreter = _python(self.root)
        script = folder / f"python-{processor}"
        partial = folder / f"python-{processor}.{threading.get_ident()}"  # a shell may be reading the script
        partial.write_text(
            "#!/bin/sh\n"
            f"export PYTHONHOME='{self.root}/usr' PYTHONPYCACHEPREFIX='{self.root.parent}/pyc'\n"
            f"exec qemu-aarch64 -cpu {processor} -L '{self.root}' -0 \"$0\" '{interpreter}' \"$@\"\n"
        )
        partial.chmod(0o755)
        partial.replace(script)
        return script


def _dependencies() -> list[str]:
    """What pyproject.toml asks for, without the extras."""
    return [line for line in importlib.metadata.requires("fbiedge") or [] if "extra ==" not in line]


def _python(root: Path) -> Path:
    (path,) = (root / "usr/bin").glob("python3.[0-9]*[0-9]")
    return path


def _run(*command: str | Path) -> None:
    subprocess.run([*map(str, command)], check=True, capture_output=True, text=True)


def _fetch_system(apt: Path, root: Path) -> None:
    """Debian's python3 for arm64 and what it needs, unpacked into `root`; from the sources that this system trusts."""
    for name in ("state/lists/partial", "cache/archives/partial"):
        (apt / name).mkdir(parents=True)
    (apt / "status").touch()  # as on a machine where nothing is installed, so that apt fetches everything
    options = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Sandbox::User": "",
        "Acquire::Languages": "none",
        "Dir::State": apt / "state",
        "Dir::State::status": apt / "status",
        "Dir::Cache": apt / "cache",
    }
    command = ["apt-get", "-y", "-q", *(word for name, value in options.items() for word in ("-o", f"{name}={value}"))]
    _run(*command, "update")
    _run(*command, "install", "--download-only", "--no-install-recommends", "python3", "libstdc++6")
    for package in (apt / "cache/archives").glob("*.deb"):
        _run("dpkg-deb", "-x", package, root)
    if not (root / "lib").exists():  # newer releases leave this link to a package with scripts
        (root / "lib").symlink_to("usr/lib")
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc/cpuinfo").write_text(CPUINFO)


def _fetch_packages(target: Path, python: str, packages: list[str]) -> None:
    platforms = ["manylinux2014_aarch64", *(f"manylinux_2_{minor}_aarch64" for minor in range(17, 37))]
    _run(
        sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile", "--target", target,
        "--only-binary=:all:", "--python-version", python.removeprefix("python"), "--constraint", ROOT / "constraints.txt",
        *(word for platform in platforms for word in ("--platform", platform)), *packages,
    )  # fmt: skip
