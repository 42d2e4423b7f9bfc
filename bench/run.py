"""Times each kernel of hpa_ext beside what one would write by hand in torch, on this machine.

    python bench/run.py [--kernel NAME ...] [--repeats N]

Every figure is the median of N runs with the 20th and 80th percentile; the two sides of a row take turns, so that a
disturbance of the machine meets both.  Inputs are larger than the caches, except in the rows that say ``small``.
The hand-written side is checked against the kernel before it is timed: nobody races a function that does less.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import hpa_ext


@dataclass
class Case:
    """One row: ``ours`` and ``by_hand`` compute the same from the same input; ``reset`` undoes in-place changes."""

    kernel: str
    shape: str
    ours: Callable[[], object]
    by_hand: Callable[[], object]
    reset: Callable[[], object] = lambda: None


def gram_cases() -> Iterator[Case]:
    for dtype, tokens, cols in ((torch.float32, 2048, 2048), (torch.bfloat16, 2048, 2048)):
        x = torch.randn(tokens, cols).to(dtype)
        ours, by_hand = torch.zeros(cols, cols), torch.zeros(cols, cols)

        def torch_gram(by_hand: torch.Tensor = by_hand, x: torch.Tensor = x) -> torch.Tensor:
            wide = x.float()
            return by_hand.addmm_(wide.t(), wide, alpha=2.0)

        yield Case(
            "accumulate_gram_",
            f"{tokens}x{cols} {short(dtype)}",
            lambda ours=ours, x=x: hpa_ext.accumulate_gram_(ours, x),
            torch_gram,
        )


def inverse_cases() -> Iterator[Case]:
    cols = 2048
    x = torch.randn(2 * cols, cols)
    gram = x.t() @ x / cols

    def torch_inverse() -> torch.Tensor:
        damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(cols)
        return torch.cholesky_inverse(torch.linalg.cholesky(damped)).diagonal()

    yield Case("inverse_diagonal", f"{cols} float32", lambda: hpa_ext.inverse_diagonal(gram), torch_inverse)


def importance_cases() -> Iterator[Case]:
    sizes = [(512, 512)] * 64
    grads = [torch.randn(s) for s in sizes]
    ours, by_hand = [torch.zeros(s) for s in sizes], [torch.zeros(s) for s in sizes]

    def torch_importance() -> None:
        for total, grad in zip(by_hand, grads, strict=True):
            total.addcmul_(grad, grad)

    yield Case(
        "accumulate_importance_",
        "64 x 512x512 float32",
        lambda: hpa_ext.accumulate_importance_(ours, grads),
        torch_importance,
    )


def layer_cases() -> Iterator[Case]:
    rows, cols = 4096, 4096
    mask = torch.rand(cols) < 0.1
    for dtype in (torch.float32, torch.bfloat16):
        before = torch.randn(rows, cols).to(dtype)
        after = (before.float() + 0.01 * torch.randn(rows, cols)).to(dtype)

        def torch_statistics(before: torch.Tensor = before, after: torch.Tensor = after) -> tuple[torch.Tensor, ...]:
            old = before.float()
            change = after.float() - old
            return change.square().mean(0), (change * old).sum(), old.square().sum(), change.square().sum()

        def torch_merge(before: torch.Tensor = before, after: torch.Tensor = after) -> torch.Tensor:
            return after.copy_(torch.where(mask, before, after - 1e-3 * before))

        yield Case(
            "change_statistics",
            f"{rows}x{cols} {short(dtype)}",
            lambda before=before, after=after: hpa_ext.change_statistics(before, after),
            torch_statistics,
        )
        yield Case(
            "merge_",
            f"{rows}x{cols} {short(dtype)}",
            lambda before=before, after=after: hpa_ext.merge_(after, before, mask, projection=1e-3),
            torch_merge,
        )


def mask_cases() -> Iterator[Case]:
    cols, keep, focus = 11008, 1100, 2200
    safety, task = torch.rand(cols, dtype=torch.float64), torch.rand(cols, dtype=torch.float64)

    def torch_mask() -> torch.Tensor:
        alpha = 0.4 + 0.4 * (1 + torch.tanh((safety / task).log().mean())) / 2
        focused = torch.zeros(2, cols, dtype=torch.bool)
        focused[0, safety.topk(focus).indices] = True
        focused[1, task.topk(focus).indices] = True
        apart = (focused[0] & ~focused[1]).nonzero().squeeze(1)
        kept = apart[safety[apart].argsort(descending=True)][:keep]
        overlap = (focused[0] & focused[1]).nonzero().squeeze(1)
        rest = overlap[(safety - alpha * task)[overlap].argsort(descending=True)][: keep - len(kept)]
        mask = torch.zeros(cols, dtype=torch.bool)
        mask[kept] = mask[rest] = True
        return mask

    yield Case("balanced_mask", f"{cols} float64", lambda: hpa_ext.balanced_mask(safety, task, keep, focus), torch_mask)


def projection_cases() -> Iterator[Case]:
    for label, rank, size in (("", 64, 2**20), (" small", 4, 1000)):
        basis = torch.linalg.qr(torch.randn(size, rank)).Q.t().contiguous()
        start = torch.randn(size)
        ours, by_hand = start.clone(), start.clone()
        yield Case(
            "project_",
            f"rank {rank}, {size} float32{label}",
            lambda ours=ours, basis=basis: hpa_ext.project_(ours, basis),
            lambda by_hand=by_hand, basis=basis: by_hand.sub_(basis.t() @ (basis @ by_hand)),
        )
    rank, size = 64, 2**18
    start = torch.randn(rank, size)
    vectors = start.clone()
    yield Case(
        "orthonormalize_",
        f"{rank}x{size} float32",
        lambda: hpa_ext.orthonormalize_(vectors),
        lambda: torch.linalg.qr(start.t()),
        lambda: vectors.copy_(start),
    )


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check(case: Case) -> None:
    """The first call of both sides, compared where both return tensors of one shape."""
    case.reset()
    ours, by_hand = case.ours(), case.by_hand()
    if isinstance(ours, tuple):
        ours = ours[0]
    if isinstance(by_hand, tuple):
        by_hand = by_hand[0]
    if isinstance(ours, torch.Tensor) and isinstance(by_hand, torch.Tensor) and ours.shape == by_hand.shape:
        if case.kernel == "accumulate_gram_":
            ours, by_hand = ours.tril(), by_hand.tril()
        if case.kernel == "merge_":  # both sides edited the same tensor, one after the other
            return
        scale = float(by_hand.double().abs().max()) or 1.0
        torch.testing.assert_close(ours.double(), by_hand.double(), rtol=2e-2, atol=1e-3 * scale)


def measure(case: Case, repeats: int) -> tuple[list[float], list[float]]:
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for side, call in zip(seconds, (case.ours, case.by_hand), strict=True):
            case.reset()
            start = time.perf_counter()
            call()
            side.append(time.perf_counter() - start)
    return seconds


def spread(seconds: list[float]) -> str:
    low, *_, high = statistics.quantiles(seconds, n=5)
    return f"{statistics.median(seconds) * 1e3:9.3f} ({low * 1e3:.3f}-{high * 1e3:.3f})"


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", action="append", help="only this kernel; may be given more than once")
    parser.add_argument("--repeats", type=int, default=9, help="runs of each side (at least 2)")
    options = parser.parse_args()
    if options.repeats < 2:
        parser.error(f"--repeats: expected at least 2, got {options.repeats}")
    torch.manual_seed(0)
    families = (
        gram_cases,
        inverse_cases,
        importance_cases,
        layer_cases,
        mask_cases,
        projection_cases,
    )
    threads = torch.get_num_threads()
    table = Table(title=f"{cpu_name()}, {threads} threads, torch {torch.__version__}, hpa-ext {hpa_ext.__version__}")
    for heading in ("kernel", "shape", "ours, ms (p20-p80)", "torch eager, ms (p20-p80)", "ratio"):
        table.add_column(heading, justify="left" if heading in ("kernel", "shape") else "right")
    for family in families:
        for case in family():
            if options.kernel and case.kernel not in options.kernel:
                continue
            check(case)
            ours, by_hand = measure(case, options.repeats)
            ratio = statistics.median(by_hand) / statistics.median(ours)
            table.add_row(case.kernel, case.shape, spread(ours), spread(by_hand), f"{ratio:.1f}x")
    Console(width=None if Console().is_terminal else 120).print(table)


if __name__ == "__main__":
    main()
