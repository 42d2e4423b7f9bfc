"""Builds the CUDA module for the host: the same .cu files and the same binding, with this folder's cuda_runtime.h and
machine.cuh in place of the toolkit's and the GPU's.  Tensors on the CPU stand for tensors on the device."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
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
KERNELS = ROOT / "csrc" / "cuda"
FLAGS = ["-std=c++20", "-O2", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off", "-w"]
INCLUDES = [f"-I{HERE}", f"-I{KERNELS}", f"-I{ROOT / 'csrc' / 'include'}", f"-I{ROOT / 'csrc' / 'third_party'}"]


def sources() -> list[Path]:
    return sorted(KERNELS.glob("*.cu"))


def compile_all(jobs: list[list[str]]) -> None:
    """Runs compilers, two at a time."""

    def run(command: list[str]) -> None:
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, jobs))


def object_command(source: Path, to: Path, *flags: str) -> list[str]:
    return ["g++", *FLAGS, *flags, *INCLUDES, "-x", "c++", "-c", str(source), "-o", str(to)]


def module() -> ModuleType:
    """The module, built once for each state of its sources."""
    import pybind11

    files = [*KERNELS.glob("*"), *HERE.glob("*"), *(ROOT / "csrc" / "bindings").glob("*")]
    files += (ROOT / "csrc" / "include" / "hpa").glob("*")
    digest = hashlib.sha256(sys.version.encode())
    for file in sorted(file for file in files if file.is_file()):
        digest.update(file.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"hpa-cuda-emulation-{digest.hexdigest()[:16]}"
    folder.mkdir(exist_ok=True)
    built = folder / "_cuda_emulation.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            python = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
            defined = [f'-DHPA_VERSION="{hpa_ext.__version__}"', "-DHPA_CUDA_MODULE=_cuda_emulation"]
            defined += ["-DHPA_CUDA_DEVICE_TYPE=kDLCPU", "-fvisibility=hidden"]
            binding = ROOT / "csrc" / "bindings" / "bind_cuda.cpp"
            sources_and_flags = [(binding, [*python, *defined]), (HERE / "python.cpp", python)]
            sources_and_flags += [(HERE / "emulation.cpp", [])]
            sources_and_flags += [(source, []) for source in sources()]
            objects = [folder / f"{source.stem}_{source.suffix[1:]}.o" for source, _ in sources_and_flags]
            compile_all(
                [
                    object_command(source, to, *flags)
                    for (source, flags), to in zip(sources_and_flags, objects, strict=True)
                ]
            )
            partial = folder / "partial.so"
            subprocess.run(["g++", "-shared", "-o", str(partial), *map(str, objects)], check=True)
            partial.rename(built)
    spec = importlib.util.spec_from_file_location("_cuda_emulation", built)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made
