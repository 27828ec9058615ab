"""What a recorded figure depends on: commit, hardware, versions, command."""

import os
import platform
import subprocess
import sys
from datetime import date

import torch

THROTTLE = {
    0x1: "gpu_idle", 0x2: "applications_clocks_setting", 0x4: "sw_power_cap", 0x8: "hw_slowdown", 0x10: "sync_boost",
    0x20: "sw_thermal_slowdown", 0x40: "hw_thermal_slowdown", 0x80: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
}  # fmt: skip
"""Bits of NVML's clocks event reasons."""


def environment() -> dict:
    """A JSON-ready record of this machine, for docs/results/; what `gpu_state` tells is None without a GPU."""
    record = {
        "date": date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "commit": _run("git", "rev-parse", "HEAD"),
        "changed": bool(_run("git", "status", "--porcelain", "--untracked-files=no")),  # since that commit
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": platform.machine(),
        "cpu_name": _cpu_name(),
        "cores": os.cpu_count(),
    }
    for package in ("triton", "transformers"):
        try:
            record[package] = __import__(package).__version__
        except ImportError:
            record[package] = None
    if torch.cuda.is_available():
        record["gpu"] = torch.cuda.get_device_name()
        record["clocks"] = _run(
            "nvidia-smi",
            "--query-gpu=driver_version,clocks.sm,clocks.mem,clocks_throttle_reasons.active",
            "--format=csv,noheader",
        )
    return record | gpu_state()


def gpu_state() -> dict:
    """Driver, clocks now and highest (MHz), temperature (C) and throttle reasons of torch's device; None: not known."""
    uuid = told = None
    if torch.cuda.is_available():
        uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        told = _run(
            "nvidia-smi",
            "--query-gpu=uuid,driver_version,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,"
            "clocks_throttle_reasons.active",
            "--format=csv,noheader,nounits",
        )
    return parse_gpu_state(told, uuid)


def parse_gpu_state(told: str | None, uuid: str | None) -> dict:
    """One line of nvidia-smi per GPU of the machine; a process may see only some of them, in another order."""
    lines = [[cell.strip() for cell in line.split(",")] for line in (told or "").splitlines() if line.strip()]
    mine = [line for line in lines if uuid and uuid in line[0]] or (lines if len(lines) == 1 else [])
    cells = mine[0][1:] if mine and len(mine[0]) == 7 else [""] * 6
    numbers = [int(cell) if cell.isdigit() else None for cell in cells[1:5]]
    return {
        "driver": cells[0] or None,
        **dict(zip(("sm_mhz", "memory_mhz", "sm_mhz_max", "temperature_c"), numbers, strict=True)),
        "throttle_reasons": _reasons(cells[5]),
    }


def _reasons(mask: str) -> list[str] | None:
    try:
        bits = int(mask, 16)
    except ValueError:  # "[N/A]" inside some containers
        return None
    named = [name for bit, name in THROTTLE.items() if bits & bit]
    unnamed = bits & ~sum(THROTTLE)
    return named + ([hex(unnamed)] if unnamed else [])


def _cpu_name() -> str | None:
    try:
        with open("/proc/cpuinfo") as file:
            return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), None)
    except OSError:
        return None


def _run(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
