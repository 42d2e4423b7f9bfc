"""This machine: its name, its caches, and the most it does (measured with machine.cpp)."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path

import torch

LIMITS = {"read": "GB/s", "copy": "GB/s", "scale": "GB/s", "update": "GB/s", "fp32": "GFLOP/s", "bf16": "GFLOP/s"}

_TRIES = 5  # of each way to write a loop, when the fastest is chosen
# Of each of two blocks, which are made a little smaller: streams at distances that are a power of two share cache sets
# and banks of the memory.
_SMALLEST = 120 * 2**20


class Machine:
    """The limits of this machine for a number of threads; without a C++ compiler there are none.

    A limit is one pass of the loop that was fastest when the object was made.  Passes are repeated beside whatever is
    compared with them, because memory bandwidth is shared and varies from minute to minute.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.rates: dict[str, float] = {}
        """Median of each limit when the object was made, in bytes or flops a second."""
        self.missing = ""
        """Why there are no limits, if there are none."""
        self._ways: dict[str, int] = {}
        try:
            self._library = _build()
        except (OSError, subprocess.CalledProcessError) as error:
            detail = getattr(error, "stderr", "") or str(error)
            self.missing = f"no shares of the machine's limits, machine.cpp was not built: {detail.strip()}"
            return
        self._bytes = max(_SMALLEST, 4 * last_level_cache()) // 1024 * 1000
        self._a, self._b = torch.ones(self._bytes // 4), torch.ones(self._bytes // 4)
        for limit in LIMITS:
            self._choose(limit)

    def measure(self, limit: str) -> float:
        """One pass: bytes or flops a second."""
        return self._pass(limit, self._ways[limit])

    def _choose(self, limit: str) -> None:
        best = 0.0
        for way in range(100):
            rates = [self._pass(limit, way) for _ in range(_TRIES)]
            if rates[0] < 0:
                break
            if max(rates) > best:
                best = max(rates)
                self._ways[limit] = way
                self.rates[limit] = statistics.median(rates)

    def _pass(self, limit: str, way: int) -> float:
        return float(
            self._library.machine_rate(
                limit.encode(), way, self._a.data_ptr(), self._b.data_ptr(), self._bytes, self.threads
            )
        )


def _build() -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        raise OSError("no C++ compiler found (CXX, c++, g++, clang++)")
    source = Path(__file__).with_name("machine.cpp")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "machine.so"
        flags = ["-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread"]
        subprocess.run(
            [*compiler.split(), *flags, str(source), "-o", str(target)], check=True, capture_output=True, text=True
        )
        library = ctypes.CDLL(str(target))
    library.machine_rate.restype = ctypes.c_double
    library.machine_rate.argtypes = [
        ctypes.c_char_p,
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int,
    ]
    return library


@functools.cache
def last_level_cache() -> int:
    """Bytes of the largest cache; 32 MiB where the system does not say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:], 0)
        if unit and text[:-1].isdigit():
            sizes.append(int(text[:-1]) * unit)
    return max(sizes, default=32 * 2**20)


def cpu_name() -> str:
    """The model as the system gives it, with family and model number: virtual machines often hide the name."""
    fields: dict[str, str] = {}
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in fields and "model" in fields:
        name += f" (family {fields['cpu family']}, model {fields['model']})"
    return name
