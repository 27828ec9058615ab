"""What a recorded figure depends on: commit, hardware, versions, command."""

import platform
import subprocess
import sys
from datetime import date

import torch


def environment() -> dict:
    """A JSON-ready record of this machine, for docs/results/."""
    record = {
        "date": date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "commit": _run("git", "rev-parse", "HEAD"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": platform.machine(),
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
    return record


def _run(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
