"""Which GPU a device is; without one, what the interpreter stands for."""

import functools

import torch


@functools.cache
def capability(device: torch.device) -> int:
    """90 on the CPU, where the interpreter runs what a Hopper would."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
