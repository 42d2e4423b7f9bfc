"""``python -m hpa_ext``: what was built, where it lies, and what this machine can run."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import numpy as np
import torch

from hpa_ext import __version__, backend, threads


def describe() -> list[tuple[str, str]]:
    """Pairs of a label and a value, in reading order."""
    lines = [
        ("hpa-ext", __version__),
        ("Python source", str(Path(__file__).resolve().parent)),
        ("Python", f"{platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}"),
        ("machine", f"{_processor()}, {_usable_cores()} usable cores"),
    ]
    try:
        module = backend.extension()
    except backend.BackendError as error:
        lines.append(("compiled module", f"not usable: {error}"))
    else:
        build = module.build_info()
        lines += [
            ("compiled module", str(module.__file__)),
            ("built with", f"{build['compiler']}, {build['build_type']} ({build['flags']})"),
            ("OpenMP", f"{build['openmp']}; in use: {module.thread_runtime()}"),
            ("CUDA", build["cuda"]),
            ("instruction sets", f"{', '.join(module.available_isas())}; in use: {module.isa()} (HPA_ISA)"),
            ("threads", f"{threads.get_num_threads()} (HPA_NUM_THREADS, else torch's setting)"),
        ]
    lines.append(("CUDA kernels", _cuda_kernels()))
    lines.append(("backends", ", ".join(backend.BACKENDS)))
    forced = os.environ.get("HPA_BACKEND")
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    for device in devices:
        lines.append((f"tensors on {device}", _choice(device, forced)))
    return lines


def _cuda_kernels() -> str:
    trouble = backend.cuda_trouble()
    return f"not usable: {trouble}" if trouble else str(backend.cuda_extension().__file__)


def _choice(device: torch.device, forced: str | None) -> str:
    chosen = forced or backend.automatic(device)
    origin = "HPA_BACKEND" if forced else "automatic"
    try:
        backend.select(None, device)
    except (backend.BackendError, ValueError) as error:
        return f"{chosen} ({origin}), which raises: {str(error).splitlines()[0]}"
    return f"{chosen} ({origin})"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def main() -> int:
    lines = describe()
    width = max(len(label) for label, _ in lines)
    for label, value in lines:
        print(f"{label:<{width}}  {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
