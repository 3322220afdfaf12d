"""The machine that a figure was measured on: a description for reports, an identity for caches."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from pathlib import Path

import psutil

CPUINFO = Path("/proc/cpuinfo")
CGROUP = Path("/sys/fs/cgroup")
# The instruction sets that the kernels of llama.cpp and ONNX Runtime choose by.
FAST_INSTRUCTIONS = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8"),
    *("asimd", "asimddp", "i8mm", "sve"),
)
CHANGING = ("load",)


def describe_machine() -> dict[str, str]:
    """What decides speed here: CPU, cores, instructions, memory, system, Python, load.

    Cores and memory are those that this process may use (affinity and cgroup limits applied).
    """
    flags = _cpu_flags()
    return {
        "cpu": _cpu_model(),
        "cores": _cores(),
        "instructions": " ".join(f for f in FAST_INSTRUCTIONS if f in flags) or "unknown",
        "virtual": "yes" if "hypervisor" in flags else "not seen",
        "memory": f"{_memory_bytes() / 1e9:.1f} GB",
        "system": f"{_system()}, {platform.machine()}",
        "python": platform.python_version(),
        "load": " ".join(f"{x:.2f}" for x in os.getloadavg()),
    }


def fingerprint() -> str:
    """Sha256 of the description without what changes from minute to minute; hex."""
    stable = {k: v for k, v in describe_machine().items() if k not in CHANGING}
    return hashlib.sha256(repr(sorted(stable.items())).encode()).hexdigest()


def load_average() -> float:
    """Processes that wanted to run, averaged over the last minute."""
    return os.getloadavg()[0]


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpuinfo(*keys: str) -> str:
    """The first value of any of the keys in /proc/cpuinfo; empty where there is none."""
    if not CPUINFO.exists():
        return ""
    for line in CPUINFO.read_text(errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in keys and value.strip():
            return value.strip()
    return ""


def _cpu_flags() -> set[str]:
    return set(_cpuinfo("flags", "Features").split())


def _cpu_model() -> str:
    model = _cpuinfo("model name", "Hardware", "CPU implementer")
    if not model and platform.system() == "Darwin":
        asked = subprocess.run(
            ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"],
            capture_output=True,
            text=True,
            check=False,
        )
        model = asked.stdout.strip()
    return model or platform.processor() or "unknown"


def _cores() -> str:
    usable, present = usable_cores(), os.cpu_count() or 1
    text = str(usable) if usable == present else f"{usable} of {present}"
    quota = _cgroup("cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        text += f", limited to {int(quota[0]) / int(quota[1]):.1f} by the container"
    return text


def _memory_bytes() -> int:
    total: int = psutil.virtual_memory().total
    limit = _cgroup("memory.max")
    return min(total, int(limit)) if limit.isdigit() else total


def _cgroup(name: str) -> str:
    try:
        return (CGROUP / name).read_text().strip()
    except OSError:
        return ""  # no cgroup v2, or the root group, which has no limits


def _system() -> str:
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        name = platform.system()
    return f"{name}, kernel {platform.release()}"
