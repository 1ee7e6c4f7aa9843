"""Plain torch models: each architecture in one file, and their weights by name, folder or file."""

from spatialfm.models._registry import fingerprint, load, save
from spatialfm.models.heist import HEIST, HEISTConfig

__all__ = ["HEIST", "HEISTConfig", "fingerprint", "load", "save"]
