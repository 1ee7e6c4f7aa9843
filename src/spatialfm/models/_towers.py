"""Image towers: networks that turn patches of tissue into features."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from spatialfm.models._files import bundled_folder, fingerprint, with_weights
from spatialfm.models.hibio import EfficientNetLite0

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

BUILT_IN = "efficientnet-lite0"
# Not "model.safetensors", which `load` and `available` read: a tower alone embeds no cells.
WEIGHTS = "tower.safetensors"


class ImageTower(nn.Module):
    """An image network with the normalisation it expects: patches of tissue in, features out.

    :func:`load_tower` loads one by name. Create one directly to use your own network.

    Parameters
    ----------
    network
        Module from normalised RGB pixels, float (B, 3, size, size), to features (B, n_features).
    name
        Name of the tower.
    size
        Side in pixels of the images that the network expects.
    mean, std
        Mean and standard deviation of each channel, for pixels from 0 to 1.

    Attributes
    ----------
    n_features : int
        Number of features that the network returns.

    Raises
    ------
    ValueError
        The network does not return (B, n_features).

    Examples
    --------
    >>> import spatialfm as sfm
    >>> import torch
    >>> network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 32), torch.nn.Flatten())
    >>> tower = sfm.models.ImageTower(network, name="mine", size=32, mean=[0.5] * 3, std=[0.25] * 3)
    >>> tower(torch.zeros(2, 64, 64, 3, dtype=torch.uint8)).shape
    torch.Size([2, 8])
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, network: nn.Module, *, name: str, size: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        # Patches are stored with channels last.
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.name, self.size = name, size
        device = next(network.parameters()).device
        for key, value in (("mean", mean), ("std", std)):
            scaled = 255 * torch.tensor(value, dtype=torch.float32, device=device).view(3, 1, 1)
            self.register_buffer(key, scaled, persistent=False)
        self.eval()
        with torch.no_grad():
            features = self(torch.zeros(1, size, size, 3, dtype=torch.uint8, device=device))
        if features.ndim != 2:
            msg = (
                f"image tower {name!r} returns {tuple(features.shape)} for one image; it must return (1, n_features): "
                "pool inside the network"
            )
            raise ValueError(msg)
        self.n_features: int = features.shape[1]

    def forward(self, patches: Tensor) -> Tensor:
        """Encode patches, uint8 (B, H, W, 3), as float32 (B, n_features); other sizes are resampled first."""
        pixels = patches.permute(0, 3, 1, 2).to(self.mean.dtype)
        if pixels.shape[-2:] != (self.size, self.size):
            pixels = F.interpolate(pixels, (self.size, self.size), mode="bicubic", antialias=True).clamp_(0, 255)
        return self.network((pixels - self.mean) / self.std).float()

    def encode(self, patches: np.ndarray) -> Tensor:
        """Encode an array of patches, uint8 (B, H, W, 3), on the device of the tower and without gradients."""
        with torch.inference_mode():
            return self(torch.tensor(patches, device=self.mean.device))


def load_tower(name: str | Path = BUILT_IN) -> ImageTower:
    """Load an image tower.

    Features are the output of a timm model without its classifier. For a transformers model, they are the class token
    of the last layer; without class token, the output of its pooler; without pooler, the mean of the last layer over
    tokens or pixels. These libraries cache models of the hub; no code from the hub is run.

    Parameters
    ----------
    name
        ``"efficientnet-lite0"``, which is part of the package; ``"timm/"`` and a model of timm, also on the Hugging
        Face hub (``"timm/hf-hub:MahmoodLab/UNI"``; extra ``timm``); ``"transformers/"`` and a model of the hub
        (``"transformers/owkin/phikon"``; extra ``transformers``); or a folder to which one of them saved a model.

    Returns
    -------
    :class:`ImageTower`, in evaluation mode on the CPU, float32.

    Raises
    ------
    ImportError
        timm or transformers is needed and not installed.
    FileNotFoundError
        There is no such tower or folder.
    TypeError
        ``name`` is neither a string nor a path.
    ValueError
        The weights are damaged, or the model has no normalisation of pixels, or needs more than images as input.

    Examples
    --------
    >>> import spatialfm as sfm
    >>> sfm.models.load_tower().n_features
    1280
    """
    given: Any = name
    if not isinstance(given, str | Path):
        msg = (
            f"tower must be {BUILT_IN!r}, 'timm/<model>', 'transformers/<model>', a folder or an sfm.models.ImageTower"
            f", got {given!r:.100}"
        )
        raise TypeError(msg)
    library, _, source = str(name).partition("/")
    if name == BUILT_IN:
        return _built_in()
    if library in ("timm", "transformers") and source:
        return _timm(source) if library == "timm" else _transformers(source)
    config = Path(name) / "config.json"
    if not config.is_file():
        msg = (
            f"no image tower {str(name)!r}: it is neither {BUILT_IN!r}, nor 'timm/<model>' or 'transformers/<model>', "
            "nor a folder with config.json"
        )
        raise FileNotFoundError(msg)
    if "model_type" in json.loads(config.read_text("utf-8")):
        return _transformers(str(name))
    return _timm(f"local-dir:{name}")


def _built_in() -> ImageTower:
    path = bundled_folder(BUILT_IN) / WEIGHTS
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        # A copy: what is read may be a view of the file.
        state = {key: file.get_tensor(key).to(torch.float32, copy=True) for key in file.keys()}  # noqa: SIM118
    network = with_weights(EfficientNetLite0, state)
    if fingerprint(network) != metadata["sha256"]:
        msg = f"{path}: the weights do not match their checksum; the file is damaged, install spatialfm again"
        raise ValueError(msg)
    return ImageTower(network, name=BUILT_IN, **json.loads(metadata["config"]))


def _timm(source: str) -> ImageTower:
    timm = _extra("timm")
    network = timm.create_model(source, pretrained=True, num_classes=0)
    config = timm.data.resolve_model_data_config(network)
    return ImageTower(
        network, name=f"timm/{source}", size=config["input_size"][-1], mean=config["mean"], std=config["std"]
    )


def _transformers(source: str) -> ImageTower:
    transformers = _extra("transformers")
    model = transformers.AutoModel.from_pretrained(source, trust_remote_code=False, dtype=torch.float32)
    if model.main_input_name != "pixel_values":
        msg = (
            f"image tower {source!r} is a {type(model).__name__}, which does not take images alone; "
            "choose a model of images"
        )
        raise ValueError(msg)
    try:
        # Read as plain values, because the processors themselves need torchvision.
        config, _ = transformers.ImageProcessingMixin.get_image_processor_dict(source)
        mean, std = config["image_mean"], config["image_std"]
    except (OSError, KeyError) as error:
        msg = (
            f"image tower {source!r} has no preprocessor_config.json with image_mean and image_std; load the model "
            "yourself and pass them to sfm.models.ImageTower"
        )
        raise ValueError(msg) from error
    sizes = config["crop_size"] if config.get("crop_size") else config["size"]
    size = sizes if isinstance(sizes, int) else sizes.get("height") or sizes["shortest_edge"]
    return ImageTower(_Pooled(model), name=f"transformers/{source}", size=size, mean=mean, std=std)


class _Pooled(nn.Module):
    """A model of transformers that returns one vector for each image."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.has_class_token = any(
            key.endswith(("cls_token", "class_embedding")) for key, _ in model.named_parameters()
        )

    def forward(self, pixels: Tensor) -> Tensor:
        found = self.model(pixel_values=pixels)
        last = found.last_hidden_state  # (B, tokens, features) or (B, features, H, W)
        if self.has_class_token:
            return last[:, 0]
        pooled = found.get("pooler_output")
        if pooled is not None:
            return pooled.flatten(1)
        return last.mean(dim=1) if last.ndim == 3 else last.mean(dim=(2, 3))


def _extra(package: str) -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        msg = (
            f'this image tower needs {package}: pip install "spatialfm[{package}]". {BUILT_IN!r} comes with the package'
        )
        raise ImportError(msg) from error
