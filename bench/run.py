"""Times each kernel of hpa_ext beside what one would write by hand in torch, on this machine.

    python bench/run.py [KERNEL ...] [--quick | --full] [--compare FILE] [--out FILE] [--threads N]

A whole run (no kernel named, not --quick) writes bench/results.csv and docs/bench.svg; other runs write where --out
says.  docs/benchmarks.md says how to read the figures.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEVELS = ("quick", "default", "full")


def kernels() -> list[str]:
    return sorted(path.stem.removeprefix("bench_") for path in (ROOT / "bench").glob("bench_*.py"))


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=f"some of: {', '.join(kernels())}")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="fewer cases and rounds, no torch.compile")
    size.add_argument("--full", action="store_true", help="also the cases that take minutes")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="an earlier CSV; exits with 1 if slower")
    parser.add_argument("--out", type=Path, metavar="FILE", help="CSV file to write, with a picture beside it")
    parser.add_argument("--threads", type=int, help="for every contender (default: torch's setting)")
    options = parser.parse_args(argv)
    unknown = sorted(set(options.kernels) - set(kernels()))
    if unknown:
        parser.error(f"KERNEL: expected some of {', '.join(kernels())}, got {', '.join(unknown)}")
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads: expected at least 1, got {options.threads}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    # hand_written.py lies with the tests: the baselines are what the tests hold to the kernels' results.
    sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tests")]

    import torch
    from harness import Effort, measure
    from machine import Machine
    from results import compare, read, rows_of, setting_of, write
    from table import print_comparison, print_header, print_rows, print_targets
    from threadpoolctl import threadpool_limits

    import hpa_ext

    earlier = read(options.compare) if options.compare else None
    threads = options.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    level = LEVELS.index("quick" if options.quick else "full" if options.full else "default")
    effort = Effort(seconds=0.7, rounds=3) if options.quick else Effort(seconds=2.5, rounds=5)
    start = time.perf_counter()
    rows = []
    with threadpool_limits(threads), hpa_ext.num_threads(threads):
        setting, machine = setting_of(threads), Machine(threads)
        print_header(setting, machine)
        for name in options.kernels or kernels():
            for case in importlib.import_module(f"bench_{name}").cases():
                if LEVELS.index(case.level) <= level:
                    timings = measure(case, effort, machine, compiled=not options.quick)
                    rows += rows_of(case, timings, machine, setting)
                    print_rows(rows[-len(timings) :])
    print_targets(rows, time.perf_counter() - start)

    for csv_file, picture_file in destinations(options):
        from picture import draw

        write(rows, csv_file)
        picture_file.write_text(draw(rows), encoding="utf-8")
        print(f"wrote {csv_file} and {picture_file}")
    if earlier is None:
        return 0
    comparison = compare(earlier, rows)
    print_comparison(comparison, options.compare)
    return comparison.exit_status


def destinations(options: argparse.Namespace) -> Iterator[tuple[Path, Path]]:
    if options.out is not None:
        yield options.out, options.out.with_suffix(".svg")
    elif not options.kernels and not options.quick:
        yield ROOT / "bench" / "results.csv", ROOT / "docs" / "bench.svg"


if __name__ == "__main__":
    sys.exit(main())
