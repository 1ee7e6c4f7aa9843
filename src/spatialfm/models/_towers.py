"""Image towers by name: networks that turn patches of tissue into features."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from spatialfm.models._registry import WEIGHTS, bundled_folder, fingerprint
from spatialfm.models.hibio import EfficientNetLite0

if TYPE_CHECKING:
    from collections.abc import Sequence

BUILT_IN = "efficientnet-lite0"


class ImageTower(nn.Module):
    """A network behind the normalisation it expects: patches in, features out.

    Parameters
    ----------
    network
        Module from normalised RGB pixels, float (B, 3, size, size), to features (B, n_features).
    name
        How :func:`load_tower` calls it.
    size
        Side in pixels that the network was trained with.
    mean, std
        Of each channel, for pixels from 0 to 1.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, network: nn.Module, *, name: str, size: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.network, self.name, self.size = network, name, size
        for key, value in (("mean", mean), ("std", std)):
            self.register_buffer(key, 255 * torch.tensor(value).view(3, 1, 1), persistent=False)

    def forward(self, patches: Tensor) -> Tensor:
        """Features of patches, uint8 (B, H, W, 3) -> float32 (B, n_features); resized where they are not of :attr:`size`."""
        pixels = patches.permute(0, 3, 1, 2).to(self.mean.dtype)
        if pixels.shape[-2:] != (self.size, self.size):
            pixels = F.interpolate(pixels, (self.size, self.size), mode="bicubic", antialias=True).clamp_(0, 255)
        return self.network((pixels - self.mean) / self.std).float()


def load_tower(name: str = BUILT_IN) -> ImageTower:
    """Load an image tower."""
    if name != BUILT_IN:
        msg = f"no image tower {name!r}; there is {BUILT_IN!r}"
        raise ValueError(msg)
    return _built_in()


def _built_in() -> ImageTower:
    path = bundled_folder(BUILT_IN) / WEIGHTS
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        state = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118 (not a mapping)
    network = EfficientNetLite0()
    network.load_state_dict(state)
    if fingerprint(network) != metadata["sha256"]:
        msg = f"{path}: the weights do not match their checksum; the file is damaged, install spatialfm again"
        raise ValueError(msg)
    return ImageTower(network, name=BUILT_IN, **json.loads(metadata["config"])).eval()
