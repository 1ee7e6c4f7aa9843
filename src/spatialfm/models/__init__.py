"""Plain torch models: each architecture in one file, and the registry of weights."""

from spatialfm.models.heist import HEIST, HEISTConfig

__all__ = ["HEIST", "HEISTConfig"]
