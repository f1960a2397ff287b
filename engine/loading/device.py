"""Which device a name means, and exactly why CUDA cannot be used where it cannot."""

from __future__ import annotations

import re
import warnings

import torch

from ..errors import OptionError


def pick_device(name: str) -> torch.device:
    """The device called ``name``; "auto" is CUDA where it can be used.

    "mps" (Apple's GPUs) runs on plain torch, without native kernels, and has not been tested.

    Raises OptionError saying why a device cannot be used.
    """
    if name == "auto":
        return torch.device("cpu" if why_no_cuda() else "cuda")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise OptionError(
            f"unknown device {name!r}", hint="use auto, cpu, cuda, cuda:1 or mps"
        ) from None
    if device.type == "cuda" and (reason := why_no_cuda(device.index or 0)):
        raise OptionError(f"device {name} is not available: {reason}", hint="use --device cpu")
    if device.type == "mps" and (reason := why_no_mps()):
        raise OptionError(f"device {name} is not available: {reason}", hint="use --device cpu")
    return device


def why_no_mps() -> str:
    """Why an Apple GPU cannot be used, in one line; "" if it can."""
    if not torch.backends.mps.is_built():
        return "this torch is built without MPS"
    return "" if torch.backends.mps.is_available() else "this machine has no GPU of Apple's"


def why_no_cuda(index: int = 0) -> str:
    """Why CUDA device number ``index`` cannot be used, in one line; "" if it can."""
    if not torch.version.cuda:
        return "this torch is built without CUDA"
    with warnings.catch_warnings(action="ignore"):  # the reason says the same
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            return _reason(str(error))
        count = torch.cuda.device_count()
        if index >= count:
            return f"the driver finds {count} CUDA devices, numbered from 0"
        return _unbuilt(index)


def _reason(text: str) -> str:
    """The driver's refusal in our words where it is one of the known three, else its first line."""
    if "no NVIDIA driver" in text:
        return "no NVIDIA driver is installed"
    if "too old" in text:
        found = re.search(r"found version (\d+)", text)
        version = f" (it knows CUDA {_dotted(int(found[1]))})" if found else ""
        return f"the NVIDIA driver is too old for CUDA {torch.version.cuda}{version}"
    if "No CUDA GPUs" in text:
        return "the NVIDIA driver finds no device"
    return (text.strip().splitlines() or ["CUDA does not start"])[0][:200]


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _unbuilt(index: int) -> str:
    """That this torch holds no code for a device, "" if it does.

    Machine code (sm_86) serves its generation from its number on, PTX (compute_90) all later ones.
    """
    major, minor = torch.cuda.get_device_capability(index)
    built = torch.cuda.get_arch_list()
    for arch in built:
        kind, _, number = arch.partition("_")
        known = divmod(int(re.sub(r"\D", "", number) or 0), 10)
        if kind == "compute" and known <= (major, minor):
            return ""
        if kind == "sm" and known[0] == major and known[1] <= minor:
            return ""
    name = torch.cuda.get_device_name(index)
    return f"{name} has compute {major}.{minor}, this torch is built for {', '.join(built)}"
