"""Builds the CUDA module for the host: the same .cu files and the same binding, with this folder's cuda_runtime.h and
machine.cuh in place of the toolkit's and the GPU's.  Tensors on the CPU stand for tensors on the device.

HPA_CUDA_EMULATION          "address": with the address and undefined-behaviour sanitizers, "thread": with the thread
                            sanitizer; `environment` is what a process needs that loads such a module.  "counting":
                            with loads and stores counted (counting.cpp).
HPA_CUDA_EMULATION_KERNELS  a folder to be used for csrc/cuda, for a copy with a fault.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import hpa_ext

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
KERNELS = Path(os.environ.get("HPA_CUDA_EMULATION_KERNELS", ROOT / "csrc" / "cuda"))
FLAGS = ["-std=c++20", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off", "-w"]
INCLUDES = [f"-I{HERE}", f"-I{KERNELS}", f"-I{ROOT / 'csrc' / 'include'}", f"-I{ROOT / 'csrc' / 'third_party'}"]
SANITIZERS = {
    "": ["-O2"],
    "address": [
        "-O1",
        "-g1",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=undefined",
        "-DHPA_EMULATION_ASAN",
    ],
    "thread": ["-O1", "-g1", "-fsanitize=thread", "-DHPA_EMULATION_TSAN"],
    "counting": ["-O0", "-fsanitize=thread", "-DHPA_EMULATION_COUNTING"],
}


def environment(sanitizer: str) -> dict[str, str]:
    """Variables for a process that tests with a sanitizer, which has to be loaded before everything else."""
    if not sanitizer:
        return {"HPA_CUDA_EMULATION": ""}
    names = {"address": ["libasan.so", "libubsan.so"], "thread": ["libtsan.so"]}[sanitizer]
    found = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in names
    ]
    return {
        "HPA_CUDA_EMULATION": sanitizer,
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python frees little when it ends
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1 ignore_noninstrumented_modules=1",
    }


def built(source: Path, flags: list[str], folder: Path) -> tuple[Path, list[str] | None]:
    """Where the object of a source is, and the command that makes it where it is not there yet."""
    command = ["g++", *FLAGS, *flags, *INCLUDES, "-x", "c++", "-c", str(source)]
    digest = hashlib.sha256(sys.version.encode())
    digest.update(" ".join(word for word in command if str(KERNELS) not in word).encode())
    # One folder after the other: where a copy lies has no part in the order, so that it shares objects with the tree.
    digest.update(source.read_bytes())
    for headers in (KERNELS, HERE, ROOT / "csrc" / "bindings", ROOT / "csrc" / "include" / "hpa"):
        for file in sorted(headers.glob("*.*h")):
            digest.update(file.read_bytes())
    to = folder / f"{source.stem}-{digest.hexdigest()[:16]}.o"
    return to, None if to.exists() else [*command, "-o", str(to)]


def compile_all(commands: list[list[str]]) -> None:
    """Runs compilers, two at a time; the last word of a command is its output."""

    def run(command: list[str]) -> None:
        *words, to = command
        partial = f"{to}.partial"
        done = subprocess.run([*words, partial], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        os.rename(partial, to)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, commands))


def module() -> ModuleType:
    """The module; each object is compiled once for each state of its source."""
    import pybind11

    sanitizer = os.environ.get("HPA_CUDA_EMULATION", "")
    flags = SANITIZERS[sanitizer]
    # The emulator's own bookkeeping is not part of the program that is looked at for races.
    counting = sanitizer == "counting"
    own_flags = SANITIZERS[""] if counting else [flag for flag in flags if flag != "-fsanitize=thread"]
    python = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    defined = [f'-DHPA_VERSION="{hpa_ext.__version__}"', "-DHPA_CUDA_MODULE=_cuda_emulation"]
    defined += ["-DHPA_CUDA_DEVICE_TYPE=kDLCPU", "-fvisibility=hidden"]
    parts = [(source, flags) for source in sorted(KERNELS.glob("*.cu"))]
    parts += [(ROOT / "csrc" / "bindings" / "bind_cuda.cpp", [*own_flags, *python, *defined])]
    parts += [(HERE / "python.cpp", [*own_flags, *python]), (HERE / "emulation.cpp", own_flags)]
    parts += [(HERE / "counting.cpp", own_flags)] if counting else []

    folder = Path(tempfile.gettempdir()) / "hpa-cuda-emulation"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        objects = [built(source, flags_of, folder) for source, flags_of in parts]
        compile_all([command for _, command in objects if command is not None])
        names = " ".join(path.name for path, _ in objects)
        shared = folder / f"module-{hashlib.sha256(names.encode()).hexdigest()[:16]}.so"
        if not shared.exists():
            libraries = [] if counting else [flag for flag in flags if flag.startswith("-fsanitize")]
            link = ["g++", "-shared", *libraries]
            compile_all([[*link, *(str(path) for path, _ in objects), "-o", str(shared)]])
    spec = importlib.util.spec_from_file_location("_cuda_emulation", shared)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made
