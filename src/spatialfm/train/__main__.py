"""Pretrain HEIST on a folder of ``.h5ad`` files: ``python -m spatialfm.train DATA --out FOLDER``."""

from __future__ import annotations

import argparse
from pathlib import Path

from spatialfm.train import pretrain


def main() -> None:
    """Parse the command line and pretrain."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m spatialfm.train")
    parser.add_argument("data", type=Path, help="folder of .h5ad files, a slide each")
    parser.add_argument("--out", type=Path, required=True, help="folder for model.safetensors and record.json")
    parser.add_argument("--minutes", type=float, help="end after so many minutes")
    parser.add_argument("--steps", type=int, default=2000, help="end after so many steps (default: %(default)s)")
    parser.add_argument("--genes", type=int, default=48, help="genes of a step (default: %(default)s)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on CUDA, float32 elsewhere")
    parser.add_argument("--device", help="default: CUDA where there is one, otherwise the CPU")
    parser.add_argument("--rng", type=int, default=0, help="seed (default: %(default)s)")
    args = parser.parse_args()
    paths = sorted(args.data.glob("*.h5ad"))
    if not paths:
        parser.error(f"{args.data} holds no .h5ad file")
    pretrain(
        paths,
        args.out,
        max_steps=args.steps,
        max_minutes=args.minutes,
        n_genes=args.genes,
        device=args.device,
        dtype=args.dtype,
        rng=args.rng,
    )


if __name__ == "__main__":
    main()
