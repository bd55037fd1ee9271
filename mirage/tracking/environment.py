"""What a run runs on and with: hardware without the machine's name, and the versions of what computes."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from mirage.tracking.code_version import describe_code

# Packages that decide numbers or speed; those that are not installed are left out.
_PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "deepspeed",
    "peft",
    "flash-attn",
    "liger-kernel",
    "kernels",
    "bitsandbytes",
    "wandb",
)


def environment(device: Any, *, num_processes: int) -> dict[str, str]:
    """Summary values `hardware/...` and `versions/...` of a run on `device` (torch.device)."""
    found = {
        "hardware/devices": hardware(device, num_processes=num_processes),
        "hardware/cores_a_machine": str(os.cpu_count()),
        "versions/mirage": describe_code(),
        "versions/python": platform.python_version(),
    }
    for name in _PACKAGES:
        try:
            found[f"versions/{name}"] = version(name)
        except PackageNotFoundError:
            continue
    return found


def hardware(device: Any, *, num_processes: int) -> str:
    """Processes and what each ran on, without the machine's name."""
    import torch

    if device.type == "cuda":
        gigabytes = torch.cuda.get_device_properties(device).total_memory / 1024**3
        return f"{num_processes} x {torch.cuda.get_device_name(device)} ({gigabytes:.0f} GiB)"
    return f"{num_processes} CPU process{'' if num_processes == 1 else 'es'} ({platform.machine()}), no GPU"
