"""Plain torch models, one file for each architecture, and functions that load, save and publish their weights."""

from spatialfm.models._available import available
from spatialfm.models._files import fingerprint
from spatialfm.models._push_to_hub import push_to_hub
from spatialfm.models._registry import Model, load, save
from spatialfm.models._towers import ImageTower, load_tower
from spatialfm.models.heist import HEIST, HEISTConfig
from spatialfm.models.heist_niche import HEISTNiche, HEISTNicheConfig
from spatialfm.models.hibio import HiBio, HiBioConfig

__all__ = [
    "HEIST",
    "HEISTConfig",
    "HEISTNiche",
    "HEISTNicheConfig",
    "HiBio",
    "HiBioConfig",
    "ImageTower",
    "Model",
    "available",
    "fingerprint",
    "load",
    "load_tower",
    "push_to_hub",
    "save",
]
