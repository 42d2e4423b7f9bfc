"""One process, DDP and FSDP2 over gloo come to the same weights, with one reduction a step."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import projection_processes
import pytest
import torch

from hpa.storage import load_tensors

PROGRAM = Path(__file__).parent / "projection_processes.py"
CASES = [
    f"{space}:{what}:float64" for space in ("joint", "parameter", "input", "output") for what in ("gradient", "update")
] + ["joint:gradient:bfloat16"]


def start(out: Path, ways: str, processes: int, cases: list[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank in range(processes):
        place = {"RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **{key: str(value) for key, value in place.items()}}
        command = [sys.executable, str(PROGRAM), str(out), ways, *cases]
        running.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    said = [process.communicate(timeout=240)[0] for process in running]
    for rank, process in enumerate(running):
        assert process.returncode == 0, f"process {rank}:\n{said[rank]}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ways", "processes", "cases"),
    [("ddp,fsdp2,misuse", 2, CASES), ("fsdp2", 3, [case for case in CASES if "update" in case])],
)
def test_processes_together_do_what_one_does(tmp_path: Path, ways: str, processes: int, cases: list[str]):
    """Misuse is tried too, and must be an error in every process."""
    start(tmp_path, ways, processes, cases)
    for case in cases:
        expected = projection_processes.train("alone", *case.split(":"))
        for how in ways.removesuffix(",misuse").split(","):
            got, _ = load_tensors(tmp_path / f"{how}-{case.replace(':', '-')}.safetensors")
            assert sorted(got) == sorted(expected)
            for key, weight in got.items():
                # Sums in another order, in float64, through four steps of Adam, which divides by its gradients.
                torch.testing.assert_close(
                    weight, expected[key].detach(), rtol=0, atol=1e-11, msg=f"{how} {case} {key}"
                )
