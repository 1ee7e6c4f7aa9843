"""Seconds of ``import spatialfm`` beside ``import scanpy``, each in a fresh interpreter.

python benchmarks/import_time.py
"""

from __future__ import annotations

import argparse
import subprocess
import sys

import numpy as np


def seconds(statement: str) -> float:
    """Time a statement in an interpreter of its own, whose start does not count."""
    code = f"import time; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"
    return float(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()[-1]
    )


def main() -> None:
    """Print medians of paired repeats."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7, help="default: %(default)s")
    args = parser.parse_args()
    statements = ["import spatialfm", "import spatialfm; spatialfm.pp, spatialfm.tl, spatialfm.pl", "import scanpy"]
    for statement in statements:
        seconds(statement)  # byte code, and files in the system's cache
    times = np.array([[seconds(statement) for statement in statements] for _ in range(args.repeats)])
    print(f"{'':62}{'seconds':>8}{'scanpy / this':>15}")
    for statement, column in zip(statements, times.T, strict=True):
        print(f"{statement:62}{np.median(column):8.3f}{np.median(times[:, -1] / column):15.1f}")


if __name__ == "__main__":
    main()
