"""Tools: AnnData in, AnnData fields out."""

from spatialfm.tl._annotate_regions import annotate_regions
from spatialfm.tl._domains import domains
from spatialfm.tl._embed import embed
from spatialfm.tl._fine_tune import fine_tune
from spatialfm.tl._image_features import image_features
from spatialfm.tl._predict_expression import predict_expression
from spatialfm.tl._retrieve import retrieve
from spatialfm.tl._subpopulations import subpopulations

__all__ = [
    "annotate_regions",
    "domains",
    "embed",
    "fine_tune",
    "image_features",
    "predict_expression",
    "retrieve",
    "subpopulations",
]
