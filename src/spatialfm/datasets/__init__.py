"""Small real datasets inside the package, with licence and citation in ``uns["source"]``."""

from spatialfm.datasets._codex_mouse_spleen import codex_mouse_spleen
from spatialfm.datasets._her2_breast_tumour import her2_breast_tumour
from spatialfm.datasets._merfish_mouse_brain import merfish_mouse_brain
from spatialfm.datasets._visium_human_dlpfc import visium_human_dlpfc

__all__ = ["codex_mouse_spleen", "her2_breast_tumour", "merfish_mouse_brain", "visium_human_dlpfc"]
