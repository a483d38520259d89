"""How many threads to use when nobody says: the physical cores this process may run on."""

from __future__ import annotations

import os
from pathlib import Path


def default_threads() -> int:
    """Physical cores available here, within the CPU affinity and the container's quota; at least 1.

    Physical, because two threads of one core share the multipliers that the kernels keep busy; within the quota, because
    spinning workers that are not scheduled stall the rest.
    """
    if hasattr(os, "sched_getaffinity"):
        cpus = os.sched_getaffinity(0)
    else:
        cpus = set(range(os.cpu_count() or 1))
    cores = {_siblings(cpu) or str(cpu) for cpu in cpus}
    return max(1, min(len(cores), _quota() or len(cores)))


def _siblings(cpu: int) -> str:
    """Logical CPUs on the same core as `cpu`, as Linux writes them; empty elsewhere."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return ""


def _quota() -> int | None:
    """CPUs that the cgroup grants, rounded up; None where it grants all."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else -(-int(quota) // int(period))
    except (OSError, ValueError):
        return None
