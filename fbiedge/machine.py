"""What a measurement has to be published with: machine, versions, commit, date; and the memory this process used."""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from . import __version__
from .cpu import default_threads


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where and with what something was measured. None: this system doesn't tell."""

    cpu: str
    cores: int  # physical, that this process may use
    logical_cpus: int
    memory_bytes: int | None
    system: str
    load_average: float | None  # processes running or waiting, before the measurement: above 0.1, others disturb it
    isas: tuple[str, ...]  # kernels that run here, best first; empty without an op library
    versions: dict[str, str]
    commit: str | None  # of the checkout that fbiedge runs from, with -dirty where it was changed
    date: str  # UTC


def describe_machine() -> Machine:
    """This machine, now."""
    from . import ops_library
    from .errors import OpLibraryError

    versions = {"fbiedge": __version__, "python": platform.python_version()}
    for package in ("onnxruntime", "numpy"):
        versions[package] = str(__import__(package).__version__)
    try:
        isas = tuple(ops_library.available_isas())
        versions["op library"] = ops_library.version()
    except OpLibraryError:
        isas = ()
    return Machine(
        cpu=_cpu_name(),
        cores=default_threads(),
        logical_cpus=os.cpu_count() or 1,
        memory_bytes=memory_bytes(),
        system=platform.platform(),
        load_average=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        isas=isas,
        versions=versions,
        commit=_commit(Path(__file__).resolve().parents[1]),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


def memory_bytes() -> int | None:
    """Memory of this machine; None where the system doesn't tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def peak_rss_bytes() -> int | None:
    """Most memory this process has held at once, mapped weights included; None where the system doesn't tell.

    On Linux from VmHWM: ru_maxrss begins with what the parent held when it started this process.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            label, _, value = line.partition(":")
            if label.strip() in ("model name", "Model"):  # x86; Raspberry Pi
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit(root: Path) -> str | None:
    """The commit of the checkout at `root`, or None where it is none."""
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():
        return None
    command = [git, "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
