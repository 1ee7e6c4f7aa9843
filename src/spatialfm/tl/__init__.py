"""Tools: AnnData in, AnnData fields out."""

from spatialfm.tl._annotate import annotate
from spatialfm.tl._annotate_regions import annotate_regions
from spatialfm.tl._attention import attention
from spatialfm.tl._domains import domains
from spatialfm.tl._embed import embed
from spatialfm.tl._evaluate import evaluate
from spatialfm.tl._fine_tune import fine_tune
from spatialfm.tl._image_features import image_features
from spatialfm.tl._impute import impute
from spatialfm.tl._ligand_receptor import ligand_receptor
from spatialfm.tl._niche_composition import niche_composition
from spatialfm.tl._outcome import outcome
from spatialfm.tl._predict_expression import predict_expression
from spatialfm.tl._retrieve import retrieve
from spatialfm.tl._subpopulations import subpopulations

__all__ = [
    "annotate",
    "annotate_regions",
    "attention",
    "domains",
    "embed",
    "evaluate",
    "fine_tune",
    "image_features",
    "impute",
    "ligand_receptor",
    "niche_composition",
    "outcome",
    "predict_expression",
    "retrieve",
    "subpopulations",
]
