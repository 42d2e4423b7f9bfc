"""Facts of the CUDA kernels' machine code, for GPUs that need not be here: no spilled registers, as many resident
blocks as a file's header claims, 128-bit accesses and matrix units where it claims them.

The code is taken from the installed module where that is newer than the sources and holds the architecture (`make test`
builds it so); else the files are compiled, once for each state of the sources.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "csrc" / "cuda"
SOURCES = [source for source in sorted(FOLDER.glob("*.cu")) if "__global__" in source.read_text()]
HEADERS = [*FOLDER.glob("*.*h"), *(ROOT / "csrc" / "include" / "hpa").glob("*.h")]
FLAGS = ["-std=c++20", "-O3", "-Werror=all-warnings", f"-I{FOLDER}", f"-I{ROOT / 'csrc' / 'include'}"]

# Bytes of shared memory of a multiprocessor; all three have 65536 registers and room for 2048 threads and 32 blocks.
SHARED_BYTES = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024}
RESERVED_BYTES = 1024  # of shared memory, a block


def tool() -> str | None:
    """The toolkit's cuobjdump, or the one in Triton's wheel."""
    triton = importlib.util.find_spec("triton")
    places = [Path(folder) for folder in triton.submodule_search_locations or []] if triton else []
    beside = [str(place / "backends" / "nvidia" / "bin" / "cuobjdump") for place in places]
    return next(filter(None, map(shutil.which, ["cuobjdump", *beside])), None)


CUOBJDUMP = tool()
pytestmark = [
    pytest.mark.skipif(CUOBJDUMP is None, reason="needs cuobjdump, from a CUDA toolkit or from the package triton"),
    pytest.mark.skipif(shutil.which("c++filt") is None, reason="needs c++filt"),
    pytest.mark.timeout(600),
]


def read(*arguments: str) -> str:
    assert CUOBJDUMP is not None
    return subprocess.run([CUOBJDUMP, *arguments], capture_output=True, text=True, check=True).stdout


def installed(architecture: str) -> Path | None:
    """The built module, if it is of these sources and has code for the architecture."""
    spec = importlib.util.find_spec("hpa_ext._cuda")
    if spec is None or spec.origin is None:
        return None
    built = Path(spec.origin)
    if built.stat().st_mtime < max(file.stat().st_mtime for file in [*SOURCES, *HEADERS]):
        return None
    return built if f".{architecture}.cubin" in read("--list-elf", str(built)) else None


def compiled(architecture: str) -> list[Path]:
    if shutil.which("nvcc") is None:
        pytest.skip(f"needs nvcc, or an installed hpa_ext._cuda with code for {architecture}")
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for file in sorted([*SOURCES, *HEADERS]):
        digest.update(file.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"hpa-cubin-{architecture}-{digest.hexdigest()[:16]}"
    folder.mkdir(exist_ok=True)

    def cubin(source: Path) -> Path:
        to = folder / f"{source.stem}.cubin"
        if not to.exists():
            partial = to.with_suffix(".partial")
            command = ["nvcc", *FLAGS, f"-arch={architecture}", "-cubin", str(source), "-o", str(partial)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-4000:]
            partial.rename(to)
        return to

    slowest_first = sorted(SOURCES, key=lambda source: source.stem != "project")
    with (folder / "lock").open("w") as lock, ThreadPoolExecutor(2) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return list(pool.map(cubin, slowest_first))


@dataclass
class Kernel:
    registers: int
    local_bytes: int  # of a thread: its stack, and arrays that did not fit registers
    shared_bytes: int
    instructions: Counter[str] = field(default_factory=Counter)

    def count(self, instruction: str) -> int:
        """How many instructions begin like this."""
        return sum(times for name, times in self.instructions.items() if name.startswith(instruction))

    def resident(self, architecture: str, threads: int) -> int:
        """Blocks of a multiprocessor; registers are given to warps by 256."""
        by_registers = 65536 // (threads // 32 * -(-self.registers * 32 // 256) * 256)
        # From sm_90 on the bytes that the tool prints include the reserved ones.
        shared = max(self.shared_bytes + (RESERVED_BYTES if architecture == "sm_80" else 0), RESERVED_BYTES)
        return min(by_registers, SHARED_BYTES[architecture] // shared, 2048 // threads, 32)


@cache
def kernels(architecture: str) -> dict[str, Kernel]:
    """By name and template arguments, as `merge_kernel<float, 4>`."""
    module = installed(architecture)
    binaries = compiled(architecture) if module is None else [module]
    select = [] if module is None else ["-arch", architecture]
    usage = "".join(read("-res-usage", *select, str(binary)) for binary in binaries)
    assembly = "".join(read("-sass", *select, str(binary)) for binary in binaries)
    found = {}
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    for name, registers, stack, shared, local in re.findall(pattern, usage):
        found[name] = Kernel(int(registers), int(stack) + int(local), int(shared))
    for part in re.split(r"\bFunction : ", assembly)[1:]:
        name, _, code = part.partition("\n")
        found[name.strip()].instructions.update(re.findall(r"^\s+/\*\w+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]+)", code, re.M))
    names = subprocess.run(["c++filt"], input="\n".join(found), capture_output=True, text=True, check=True).stdout
    plain = [re.sub(r"\(anonymous namespace\)::|hpa::cuda::|^void ", "", name) for name in names.splitlines()]
    return {name.partition("(")[0]: kernel for name, kernel in zip(plain, found.values(), strict=True)}


def claims() -> dict[str, tuple[int, int]]:
    """What the headers say: threads and resident blocks, by pattern."""
    said = {}
    for source in SOURCES:
        comment = source.read_text().partition("#include")[0].replace("\n//", " ")
        line = re.search(r"Resident +blocks of (\d+) threads: ([^.]*)\.", comment)
        assert line is not None, f"{source.name} does not say how many blocks are resident"
        for pattern, blocks in re.findall(r"(\w+_kernel(?:<[^>]*>)?)\s+(\d+)", line[2]):
            said[pattern] = (int(line[1]), int(blocks))
    return said


def matching(found: dict[str, Kernel], pattern: str) -> dict[str, Kernel]:
    """Kernels of a pattern; a bare name stands for all its template arguments."""
    wanted = (pattern, pattern + "<*")
    chosen = {name: kernel for name, kernel in found.items() if any(fnmatchcase(name, each) for each in wanted)}
    assert chosen, f"no kernel is called {pattern}"
    return chosen


architectures = pytest.mark.parametrize("architecture", SHARED_BYTES)


@architectures
def test_no_kernel_spills_or_uses_local_memory(architecture: str) -> None:
    found = kernels(architecture)
    assert len(found) >= 40
    assert {name: kernel.local_bytes for name, kernel in found.items() if kernel.local_bytes} == {}
    assert {name for name, kernel in found.items() if kernel.count("LDL") or kernel.count("STL")} == set()


@architectures
def test_as_many_blocks_are_resident_as_the_headers_claim(architecture: str) -> None:
    found = kernels(architecture)
    missing = set(found)
    for pattern, (threads, blocks) in claims().items():
        # The first claim that fits a kernel is the one that holds.
        chosen = {name: kernel for name, kernel in matching(found, pattern).items() if name in missing}
        assert chosen, pattern
        resident = {name: kernel.resident(architecture, threads) for name, kernel in chosen.items()}
        assert min(resident.values()) >= blocks, resident
        missing -= set(chosen)
    assert missing == set(), "kernels without a claim"


# Accesses of 16 bytes: at least those of one turn of the loop that a header claims them for.
LOADS = {
    "statistics_kernel<float, 4>": 2 * 4,
    "statistics_kernel<Bfloat16, 8>": 2 * 4,
    "statistics_kernel<Half, 8>": 2 * 4,
    "statistics_kernel<double, 2>": 2 * 4,
    "merge_kernel<float, 4>": 2 * 4,
    "merge_kernel<Bfloat16, 8>": 2 * 4,
    "merge_kernel<Half, 8>": 2 * 4,
    "merge_kernel<double, 2>": 2 * 4,
    "importance_kernel<*>": 3 * 4 * 3,  # one load a group for float32, two for float64
    "coefficients_kernel<*, 1, 16>": 3 * (1 + 16),
    "coefficients_kernel<*, 8, 8>": 3 * (8 + 8),
    "subtract_kernel<*, 1>": 3 * (1 + 1),
    "subtract_kernel<*, 8>": 3 * (1 + 8),
    "multiply_kernel<float, 8>": 2,
    "multiply_kernel<double, 4>": 2,
}
STORES = {
    "merge_kernel<float, 4>": 4,
    "merge_kernel<Bfloat16, 8>": 4,
    "merge_kernel<Half, 8>": 4,
    "merge_kernel<double, 2>": 4,
    "importance_kernel<*>": 3 * 4,  # one group for float32, two for float64
    "subtract_kernel<*, 1>": 3,
    "subtract_kernel<*, 8>": 3 * 8,
}


@architectures
def test_sixteen_bytes_a_load_and_store_where_the_headers_claim_them(architecture: str) -> None:
    found = kernels(architecture)
    for table, instruction in ((LOADS, "LDG.E.128"), (STORES, "STG.E.128")):
        for pattern, least in table.items():
            counts = {name: kernel.count(instruction) for name, kernel in matching(found, pattern).items()}
            assert min(counts.values()) >= least, (instruction, counts)


@architectures
def test_products_use_matrix_units_for_16_bit_types_and_nothing_else_does(architecture: str) -> None:
    found = kernels(architecture)
    for name, kernel in matching(found, "matrix_kernel").items():
        kind = ".BF16" if name.startswith("matrix_kernel<true") else ""
        assert kernel.count(f"HMMA.16816.F32{kind}") >= 2 * 16, name
        assert kernel.count("LDSM.16.MT88.4") >= 2 * 6, name
    for name, kernel in matching(found, "matrix_kernel<*, true>").items():
        assert kernel.count("LDGSTS.E.BYPASS.128") >= 3 * 4, name  # asynchronous copies of 16 bytes
    others = {name: kernel for name, kernel in found.items() if not name.startswith("matrix_kernel")}
    assert {name for name, kernel in others.items() if kernel.count("HMMA") or kernel.count("DMMA")} == set()
    assert {name for name, kernel in found.items() if any("TF32" in one for one in kernel.instructions)} == set()


@architectures
def test_no_kernel_adds_floats_atomically(architecture: str) -> None:
    """The headers promise the same bits on every run."""
    for name, kernel in kernels(architecture).items():
        atomic = [one for one in kernel.instructions if one.startswith(("RED", "ATOM"))]
        assert not any(re.search(r"\.F(16|32|64|P)|BF16", one) for one in atomic), (name, atomic)
