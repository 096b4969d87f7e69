"""What this machine can do, found by trying rather than by asking: `plaudit doctor`."""

import importlib.metadata
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import plaudit

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MATMUL_SIZE = 256


def diagnose(*, sizes: int = _MATMUL_SIZE) -> dict[str, Any]:
    """Look at this machine and this installation.

    Args:
        sizes: side of the square matrices whose product tries each dtype.

    Returns:
        A JSON-ready dictionary with the sections `versions`, `machine`, `devices`, `dtypes`, `extras`, `attention`
        and `trackers`. Memory is in bytes, speed in 1e9 floating point operations a second.
    """
    devices = find_devices()
    return {
        # What torch says of itself names its build as well, such as +cu130.
        "versions": {name: _version(name) for name in ("plaudit", "transformers", "datasets")}
        | {"torch": str(torch.__version__), "python": platform.python_version()},
        "machine": describe_machine(),
        "devices": devices,
        "dtypes": [try_dtype(device["name"], dtype, sizes) for device in devices for dtype in DTYPES],
        "extras": find_extras(),
        "attention": find_attention(),
        "trackers": find_trackers(),
    }


def describe_machine() -> dict[str, Any]:
    """Platform, processor cores, threads that torch uses, memory and free disk, in bytes."""
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "python_executable": sys.executable,
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "torch_interop_threads": torch.get_num_interop_threads(),
        "memory": total_memory(),
        "memory_available": available_memory(),
        "disk_free": shutil.disk_usage(Path.cwd()).free,
    }


def total_memory() -> int | None:
    """Bytes of main memory, or of the container's limit where that is smaller; None where it cannot be read."""
    sizes = []
    if hasattr(os, "sysconf") and {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= set(os.sysconf_names):
        sizes.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        sizes.append(int(text))
    return min(sizes) if sizes else None


def available_memory() -> int | None:
    """Bytes of main memory that a new process could take without swapping; None where it cannot be read."""
    source = Path("/proc/meminfo")
    if not source.is_file():
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", source.read_text(), re.MULTILINE)
    return int(found.group(1)) * 1024 if found else None


def find_devices() -> list[dict[str, Any]]:
    """The devices that torch sees, the processor always among them; memory in bytes."""
    devices: list[dict[str, Any]] = [{"name": "cpu", "model": _processor(), "memory": total_memory()}]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append({"name": f"cuda:{index}", "model": properties.name, "memory": properties.total_memory})
    if torch.backends.mps.is_available():
        devices.append({"name": "mps", "model": "Apple GPU", "memory": total_memory()})
    return devices


def try_dtype(device: str, dtype: torch.dtype, size: int = _MATMUL_SIZE) -> dict[str, Any]:
    """Multiply two matrices and differentiate through the product, check the numbers, and time the product.

    `works` means: the product and its gradient agree with float64 to what the dtype's precision allows,
    `max |C - C64| / max |C64| <= 8 eps`.

    Args:
        device: such as `cpu` or `cuda:0`.
        dtype: the dtype to try.
        size: side of the two `[size, size]` matrices.

    Returns:
        `device, dtype, works, relative_error, gigaflops, fault`; the last says why a dtype does not work.
    """
    result: dict[str, Any] = {"device": device, "dtype": str(dtype).removeprefix("torch."), "works": False}
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, size, generator=generator).to(dtype) for _ in range(2))
    exact = left.double() @ right.double()
    exact_gradient = (2 * exact / size) @ right.double().T
    try:
        a, b = left.to(device).requires_grad_(), right.to(device)
        product = a @ b
        (product.float().square().sum() / size).backward()  # type: ignore[no-untyped-call]
        if a.grad is None:
            raise RuntimeError("no gradient came back")
        errors = [
            (found.detach().cpu().double() - wanted).abs().max() / wanted.abs().max()
            for found, wanted in ((product, exact), (a.grad, exact_gradient))
        ]
        error = float(torch.stack(errors).max())
        seconds = _median_seconds(lambda: a.detach() @ b, device)
    except (RuntimeError, AssertionError, TypeError) as fault:  # torch raises each of these for what it cannot do
        return result | {"relative_error": None, "gigaflops": None, "fault": str(fault).splitlines()[0]}
    works = error <= 8 * torch.finfo(dtype).eps
    fault_text = None if works else f"the product is off by {error:.2g}"
    gigaflops = 2 * size**3 / seconds / 1e9
    return result | {"works": works, "relative_error": error, "gigaflops": gigaflops, "fault": fault_text}


def _median_seconds(function: Callable[[], torch.Tensor], device: str, repeats: int = 5) -> float:
    """Median seconds of one call; on an accelerator the queue is drained before and after."""
    wait: Callable[[], None] = torch.accelerator.synchronize if device != "cpu" else lambda: None
    times = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        function()
        wait()
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2]


def find_extras() -> dict[str, dict[str, str | None]]:
    """Each optional extra of Plaudit with the packages it asks for and their installed versions (None: absent)."""
    extras: dict[str, dict[str, str | None]] = {}
    for requirement in importlib.metadata.requires("plaudit") or ():
        name, _, condition = requirement.partition(";")
        extra = re.search(r"extra == ['\"]([^'\"]+)['\"]", condition)
        package = re.match(r"[A-Za-z0-9._-]+", name.strip())
        if extra and package and package.group() != "plaudit":
            extras.setdefault(extra.group(1), {})[package.group()] = _version(package.group())
    return extras


def find_attention() -> dict[str, Any]:
    """The backends of packed attention with what each lacks on each device (None: it works), and the stock ones."""
    from transformers.utils import is_flash_attn_2_available

    from plaudit.models.attention_backends import BACKENDS, missing_part, self_test

    def fault(name: str, device: torch.device) -> str | None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        return missing_part(name, device) or self_test(name, device, dtype, 64, windowed=False)

    devices = [torch.device(found["name"]) for found in find_devices()]
    stock = {"eager": True, "sdpa": True, "flash_attention_2": bool(is_flash_attn_2_available())}
    return {
        "packed_backends": sorted(name for name in BACKENDS if any(fault(name, device) is None for device in devices)),
        "packed_faults": {
            str(device): {name: reason for name in sorted(BACKENDS) if (reason := fault(name, device)) is not None}
            for device in devices
        },
        "stock": [name for name, usable in stock.items() if usable],
    }


def find_trackers() -> dict[str, bool]:
    """Each metrics tracker by name, and whether what it needs is installed."""
    from plaudit.training.trackers import TRACKERS

    return {name: name == "jsonl" or _version(name) is not None for name in ("jsonl", *sorted(TRACKERS))}


def _version(package: str) -> str | None:
    if package == "plaudit":
        return plaudit.__version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    source = Path("/proc/cpuinfo")
    if source.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", source.read_text(errors="replace"), re.MULTILINE)
        if found:
            return " ".join(found.group(1).split())
    return platform.processor() or platform.machine()
