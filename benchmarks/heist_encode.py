"""Speed of ``HEIST.encode`` beside torch's own matrix product and a plain PyTorch Geometric port with the same weights.

    python benchmarks/heist_encode.py [--device cuda]

All rows of a table come from one run, in which repeats of its entries alternate: cells/s of the best repeat, and the
median over repeats of the ratio to the same repeat of the first entry. Where the two disagree, the machine was busy.
"""

from __future__ import annotations

import argparse
import os
import time
from statistics import median
from typing import TYPE_CHECKING

import torch
from pyg_heist import PyGHEIST
from scipy.spatial import Delaunay

from spatialfm.models import HEIST, HEISTConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def pyg_port(model: HEIST) -> PyGHEIST:
    """Return the PyG port with the weights of ``model``."""
    config = model.config
    port = PyGHEIST(config.width, config.heads, config.layers, config.pe_dim, config.cross)
    ours = model.state_dict()
    state = {f"norm.{k}": ours[f"norm.{k}"] for k in ("weight", "bias")}
    for k in ("weight", "bias"):
        state |= {f"mlp_high.0.{k}": ours[f"cell_input.{k}"], f"mlp_low.0.{k}": ours[f"gene_input.{k}"]}
    for i in range(config.layers):
        here, there = f"layers.{i}.", f"convs.{i}."
        state[f"{there}conv_high.eps"] = ours[f"{here}cell_gin.eps"][None]
        for k in ("weight", "bias"):
            state[f"{there}norm.{k}"] = ours[f"{here}norm.{k}"]
            state[f"{there}conv_high.nn.{k}"] = ours[f"{here}cell_gin.linear.{k}"]
            state[f"{there}multi_head.in_proj_{k}"] = ours[f"{here}cell_qkv.{k}"]
            state[f"{there}multi_head.out_proj.{k}"] = ours[f"{here}cell_out.{k}"]
            for part, value in zip(
                ("query", "key", "value", "skip"), ours[f"{here}gene_qkvs.{k}"].chunk(4), strict=True
            ):
                state[f"{there}conv_low.lin_{part}.{k}"] = value
        if config.cross:
            for theirs, name in (("cross_hl", "cell_from_genes"), ("cross_lh", "gene_from_cell")):
                for letter, part in (("Q", "query"), ("K", "key"), ("V", "value")):
                    state[f"{there}{theirs}.{letter}.weight"] = ours[f"{here}{name}.{part}.weight"]
    missing, unexpected = port.load_state_dict(state, strict=False)
    unused = [
        k for k in missing if config.cross or "cross_" not in k
    ]  # without cross messages their weights are not used
    if unused or unexpected:
        msg = f"the port does not fit: missing {unused}, unexpected {unexpected}"
        raise RuntimeError(msg)
    return port.eval()


def tissue(
    n_cells: int, n_genes: int, n_groups: int, device: str
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor]:
    """Random cells with a Delaunay graph, and random networks of a quarter of the pairs, as arguments of ``encode``."""
    coords, expression = torch.randn(n_cells, 2), torch.rand(n_cells, n_genes)
    pairs = torch.from_numpy(Delaunay(coords.numpy()).simplices).long()[:, [[0, 1], [1, 2], [2, 0]]].flatten(0, 1)
    cell_edges = torch.cat([pairs, pairs.flip(1)]).unique(dim=0).T
    networks = []
    for _ in range(n_groups):
        upper = (torch.rand(n_genes, n_genes) < 0.25).triu(1)
        networks.append((upper | upper.T).nonzero().T.contiguous().to(device))
    group = torch.arange(n_cells) % n_groups
    return coords.to(device), cell_edges.to(device), expression.to(device), networks, group.to(device)


def alternate(entries: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds of each entry in each repeat, after one call of each to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in entries}
    for repeat in range(repeats + 1):
        for name, entry in entries.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            entry()
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=256)
    parser.add_argument("--genes", type=int, default=200)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--pyg-cells", type=int, default=32, help="cells of the port's call; its memory is large")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=None, help="torch's threads (default: torch's own choice)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device == "cuda":  # float32 means float32
        torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    model = HEIST(HEISTConfig()).eval().to(args.device)
    port = pyg_port(model).to(args.device)
    n, config = args.cells, model.config
    # Matrix products of one cell: query, key, value, skip, cross value; scores and weighted sums.
    products = config.layers * (2 * args.genes * config.width**2 * 5 + 4 * args.genes**2 * config.width)
    data, few = (
        tissue(n, args.genes, args.groups, args.device),
        tissue(args.pyg_cells, args.genes, args.groups, args.device),
    )
    side = 2048 if args.device == "cpu" else 8192
    matrix = torch.randn(side, side, device=args.device)
    half = matrix.bfloat16()
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    load = f", load before {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(f"torch {torch.__version__}, {where}{load}")
    print(
        f"{n} cells, {args.genes} genes, {args.groups} groups, {products / 1e9:.3f} GFLOP of matrix products a cell\n"
    )

    with torch.inference_mode():
        entries: dict[str, Callable[[], object]] = {
            "HEIST float32": lambda: model.encode(*data, dtype="float32"),
            "HEIST bfloat16": lambda: model.encode(*data, dtype="bfloat16"),
            "PyG port float32": lambda: port(*few),
            "matmul float32": lambda: matrix @ matrix,
            "matmul bfloat16": lambda: half @ half,
        }
        seconds = alternate(entries, args.repeats, args.device)
        work = {name: side**3 * 2 / products if "matmul" in name else n for name in entries} | {
            "PyG port float32": args.pyg_cells
        }
        rate = {name: [work[name] / s for s in values] for name, values in seconds.items()}
        print(f"{'':18}{'cells/s':>10}{'GFLOP/s':>10}{'best/best':>12}{'median ratio':>14}   (to HEIST float32)")
        for name, values in rate.items():
            best = max(values) / max(rate["HEIST float32"])
            paired = median(a / b for a, b in zip(values, rate["HEIST float32"], strict=True))
            cells = "" if "matmul" in name else f"{max(values):.1f}"
            print(f"{name:18}{cells:>10}{max(values) * products / 1e9:>10.0f}{best:>12.3f}{paired:>14.3f}")
        top = {name: max(values) for name, values in rate.items()}
        full, low = model.encode(*data, dtype="float32"), model.encode(*data, dtype="bfloat16")
        cosine = [torch.cosine_similarity(a, b, dim=-1) for a, b in zip(low, full, strict=True)]
        ours, theirs = model.encode(*few, dtype="float32"), port(*few)
        error = max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True))
        print(f"\nfloat32, share of torch's matmul rate   {top['HEIST float32'] / top['matmul float32']:.1%}")
        print(f"bfloat16 over float32                   {top['HEIST bfloat16'] / top['HEIST float32']:.2f}x")
        print(
            f"cosine of bfloat16 to float32           cells >= {cosine[0].min():.4f}, genes mean {cosine[1].mean():.4f}"
        )
        print(f"float32 over the PyG port               {top['HEIST float32'] / top['PyG port float32']:.1f}x")
        print(f"bfloat16 over the PyG port              {top['HEIST bfloat16'] / top['PyG port float32']:.1f}x")
        print(f"relative difference to the PyG port     {error:.1e} (norm)\n")

        # A call takes many contexts: small slides cost what one large slide costs.
        counts = [c for c in (1, 2, 4, 10, 40) if c <= n]
        contexts = {c: torch.arange(n, device=args.device) * c // n for c in counts}
        seconds = alternate(
            {str(c): lambda c=c: model.encode(*data, dtype="float32", context=contexts[c]) for c in counts},
            args.repeats,
            args.device,
        )
        print(f"{'contexts':>10}{'cells each':>12}{'cells/s':>10}{'to one context':>16}")
        for c in counts:
            best = min(seconds[str(c)])
            print(f"{c:>10}{n / c:>12.0f}{n / best:>10.1f}{min(seconds['1']) / best:>16.2f}")


if __name__ == "__main__":
    main()
