"""Image towers by name: networks that turn patches of tissue into features."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from spatialfm.models._registry import bundled_folder, fingerprint, with_weights
from spatialfm.models.hibio import EfficientNetLite0

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

BUILT_IN = "efficientnet-lite0"
# Not "model.safetensors": it embeds no tissue, so that `load` and `list` leave it alone.
WEIGHTS = "tower.safetensors"


class ImageTower(nn.Module):
    """A network behind the normalisation it expects: patches of tissue in, features out.

    :func:`load_tower` makes one from a name; make one yourself for a network of your own.

    Parameters
    ----------
    network
        Module from normalised RGB pixels, float (B, 3, size, size), to features (B, n_features).
    name
        What to call it.
    size
        Side of the images in pixels that the network expects.
    mean, std
        Of each channel, three numbers for pixels from 0 to 1.

    Attributes
    ----------
    n_features : int
        Columns that the network returns.

    Raises
    ------
    ValueError
        The network does not return (B, n_features).
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, network: nn.Module, *, name: str, size: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        # Patches come with their channels last.
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
            msg = f"image tower {name!r} returns {tuple(features.shape)} for one image; it must return (1, n_features): pool inside of it"
            raise ValueError(msg)
        self.n_features: int = features.shape[1]

    def forward(self, patches: Tensor) -> Tensor:
        """Features of patches, uint8 (B, H, W, 3) -> float32 (B, n_features); resampled first where they are not of the tower's size."""
        pixels = patches.permute(0, 3, 1, 2).to(self.mean.dtype)
        if pixels.shape[-2:] != (self.size, self.size):
            pixels = F.interpolate(pixels, (self.size, self.size), mode="bicubic", antialias=True).clamp_(0, 255)
        return self.network((pixels - self.mean) / self.std).float()

    def encode(self, patches: np.ndarray) -> Tensor:
        """Features of an array of patches, uint8 (B, H, W, 3), on the device of the tower and without gradients."""
        with torch.inference_mode():
            return self(torch.tensor(patches, device=self.mean.device))


def load_tower(name: str | Path = BUILT_IN) -> ImageTower:
    """Load an image tower.

    Parameters
    ----------
    name
        ``"efficientnet-lite0"``, the one that comes with the package; ``"timm/"`` and a model of timm, also on the Hugging Face hub
        (``"timm/hf-hub:MahmoodLab/UNI"``; extra ``timm``); ``"transformers/"`` and a model of the hub (``"transformers/owkin/phikon"``; extra
        ``transformers``); or a folder where either library saved a model.

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
        ``name`` is neither a text nor a path.
    ValueError
        The weights are damaged, or the model does not say how pixels are normalised or does not take images alone.

    Notes
    -----
    Features are: of a model of timm, what it returns without its classifier. Of a model of transformers, the class token of the last layer where it
    has one, since its pooler may never have been trained; otherwise what it pools; otherwise the mean over the last layer's tokens or pixels.

    Models of the hub are kept where these libraries keep them, and no code from the hub is run.
    """
    given: Any = name
    if not isinstance(given, str | Path):
        msg = f"tower must be {BUILT_IN!r}, 'timm/<model>', 'transformers/<model>', a folder or an sfm.models.ImageTower, got {given!r:.100}"
        raise TypeError(msg)
    library, _, source = str(name).partition("/")
    if name == BUILT_IN:
        return _built_in()
    if library in ("timm", "transformers") and source:
        return _timm(source) if library == "timm" else _transformers(source)
    config = Path(name) / "config.json"
    if not config.is_file():
        msg = f"no image tower {str(name)!r}: it is neither {BUILT_IN!r}, nor 'timm/<model>' or 'transformers/<model>', nor a folder with config.json"
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
        msg = f"image tower {source!r} is a {type(model).__name__}, which does not take images alone; name a model of images"
        raise ValueError(msg)
    try:
        # As plain values: the processors themselves would need torchvision.
        config, _ = transformers.ImageProcessingMixin.get_image_processor_dict(source)
        mean, std = config["image_mean"], config["image_std"]
    except (OSError, KeyError) as error:
        msg = (
            f"image tower {source!r} has no preprocessor_config.json with image_mean and image_std; load the model yourself and give them to "
            "sfm.models.ImageTower"
        )
        raise ValueError(msg) from error
    sizes = config["crop_size"] if config.get("crop_size") else config["size"]
    size = sizes if isinstance(sizes, int) else sizes.get("height") or sizes["shortest_edge"]
    return ImageTower(_Pooled(model), name=f"transformers/{source}", size=size, mean=mean, std=std)


class _Pooled(nn.Module):
    """A model of transformers, one vector an image."""

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
