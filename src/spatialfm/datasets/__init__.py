"""Small real datasets inside the package, with licence and citation in ``uns["source"]``."""

from spatialfm.datasets._her2_breast_tumour import her2_breast_tumour
from spatialfm.datasets._merfish_mouse_brain import merfish_mouse_brain

__all__ = ["her2_breast_tumour", "merfish_mouse_brain"]
