"""Small real datasets inside the package, with licence and citation in ``uns["source"]``."""

from spatialfm.datasets._merfish_mouse_brain import merfish_mouse_brain

__all__ = ["merfish_mouse_brain"]
