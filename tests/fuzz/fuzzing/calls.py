"""One valid, quick call of every public function that reads an AnnData."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import anndata as ad
import matplotlib.pyplot as plt

import spatialfm as sfm
from fuzzing.tissue import PAIRS, SETS, heist, hibio, make_tissue, tower


@dataclass(frozen=True, eq=False)
class Call:
    """A public function with arguments that are valid for :func:`tissue_with`."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    """Calls whose results are needed."""
    late: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    """Functions that make further arguments when they are needed: models and other tissues."""
    variant: str = ""

    @property
    def id(self) -> str:
        return f"{self.name}-{self.variant}" if self.variant else self.name

    @property
    def function(self) -> Callable[..., Any]:
        module, _, name = self.name.partition(".")
        return getattr(getattr(sfm, module), name)

    @property
    def parameters(self) -> list[str]:
        names = [name for name in inspect.signature(self.function).parameters if name not in ("adata", "options")]
        return [*names, *OPTIONS.get(self.id, ())]

    @property
    def writes(self) -> bool:
        return "copy" in self.parameters

    def keywords(self) -> dict[str, Any]:
        return {**self.arguments, **{name: make() for name, make in self.late.items()}}


SLIDES = {"library_key": "sample"}
# Options that these calls have in addition to their signature.
OPTIONS = {
    "tl.embed": ("min_detected", "dtype", "context_size"),
    "tl.embed-heist": ("groupby", "context_size", "batch_size", "dtype", "rng"),
    "tl.embed-hibio": ("image", "gene_sets", "batch_size"),
    "tl.fine_tune": ("learning_rate", "validate_every", "patience", "weight_decay", "warmup", "dtype", "mask"),
}
EMBED = "tl.embed"
SPOTS = "tl.embed-hibio"

CALLS = {
    call.id: call
    for call in (
        Call("pp.spatial_neighbors", SLIDES),
        Call("pp.spatial_neighbors", {**SLIDES, "method": "knn", "n_neighbors": 3}, variant="knn"),
        Call("pp.spatial_neighbors", {**SLIDES, "method": "radius", "radius": 15.0}, variant="radius"),
        Call("pp.grn", {**SLIDES, "groupby": "cell_type", "n_genes": 12, "n_bins": 4, "n_candidates": 8}),
        Call("pp.grn", {**SLIDES, "n_genes": 12, "n_bins": 4, "n_candidates": 8}, variant="auto"),
        Call("pp.pathways", {"gene_sets": SETS}),
        Call("pp.pathways", {"gene_sets": SETS, "method": "mean"}, variant="mean"),
        Call("pp.regions", {**SLIDES, "size": 5, "branching": 2, "use_rep": None}),
        Call("pp.regions", {**SLIDES, "size": 5, "branching": 2}, (EMBED,), variant="niche"),
        Call("pp.resolve_genes", {"organism": "human"}),
        Call("pp.tfidf", SLIDES),
        Call("pp.patches", {**SLIDES, "size_px": 10.0, "out_px": 8}),
        Call("tl.embed", SLIDES),
        Call("tl.embed", {**SLIDES, "context_size": 20}, variant="heist", late={"model": heist}),
        Call("tl.embed", {**SLIDES, "gene_sets": SETS}, variant="hibio", late={"model": hibio}),
        Call("tl.fine_tune", {**SLIDES, "max_steps": 2, "validate_every": 1}),
        Call("tl.image_features", {**SLIDES, "key_added": "features"}, late={"tower": tower}),
        Call("tl.domains", {**SLIDES, "n_domains": 2}, (EMBED,)),
        Call("tl.domains", {**SLIDES, "method": "leiden", "resolution": 0.5}, (EMBED,), variant="leiden"),
        Call("tl.annotate", {**SLIDES, "groupby": "marks", "n_folds": 2}, (EMBED,)),
        Call(
            "tl.annotate",
            {**SLIDES, "groupby": "niche", "n_folds": 2},
            (EMBED,),
            {"reference": make_tissue},
            "reference",
        ),
        Call("tl.annotate_regions", {**SLIDES, "groupby": "marks"}, (EMBED,)),
        Call(
            "tl.attention",
            {**SLIDES, "groupby": "cell_type", "condition_key": "condition", "context_size": 20, "n_permutations": 10},
            late={"model": heist},
        ),
        Call(
            "tl.evaluate",
            {**SLIDES, "groupby": "cell_type", "baselines": ["pca", "hops"], "n_folds": 2, "n_bootstrap": 10},
            (EMBED,),
        ),
        Call("tl.impute", {**SLIDES, "n_folds": 2, "genes": ["MYC", "VEGFA"]}),
        Call(
            "tl.ligand_receptor",
            {
                **SLIDES,
                "groupby": "cell_type",
                "pairs": PAIRS,
                "min_edges": 1,
                "min_fraction": 0.0,
                "n_permutations": 20,
            },
        ),
        Call(
            "tl.niche_composition",
            {
                "niche_key": "niche",
                "sample_key": "sample",
                "condition_key": "condition",
                "groupby": "cell_type",
                "n_permutations": 20,
            },
        ),
        Call(
            "tl.outcome",
            {"condition_key": "condition", "sample_key": "sample", "n_folds": 2, "n_repeats": 1, "n_permutations": 4},
            (EMBED,),
        ),
        Call("tl.predict_expression", {**SLIDES, "genes": "all"}, late={"model": hibio}),
        Call("tl.retrieve", {"n": 3, "paired": True}, (SPOTS,), {"reference": lambda: tissue_with(SPOTS)}),
        Call(
            "tl.subpopulations",
            {**SLIDES, "groupby": "cell_type", "group": "T cell", "n_clusters": 2, "n_permutations": 10},
            (EMBED,),
        ),
        Call("get.annotation_df", needs=("tl.annotate",)),
        Call("get.attention_df", {"level": "differences"}, ("tl.attention",)),
        Call("get.evaluation_df", needs=("tl.evaluate",)),
        Call("get.imputation_df", needs=("tl.impute",)),
        Call("get.keywords_df", {"groupby": "cell_type", "n_genes": 3}, ("pp.tfidf",)),
        Call("get.ligand_receptor_df", needs=("tl.ligand_receptor",)),
        Call("get.niche_composition_df", needs=("tl.niche_composition",)),
        Call("get.outcome_df", needs=("tl.outcome",)),
        Call("get.predicted_expression", needs=("tl.predict_expression",)),
        Call("get.pyg", needs=("pp.spatial_neighbors", "pp.grn")),
        Call("get.retrieval_recall_df", {"groupby": "sample", "at": [1, 0.1]}, ("tl.retrieve",)),
        Call("get.retrieved_df", needs=("tl.retrieve",)),
        Call("get.subpopulations_df", needs=("tl.subpopulations",)),
        Call("pl.annotation", needs=("tl.annotate",)),
        Call("pl.attention", SLIDES, ("tl.attention",)),
        Call("pl.embedding_blocks", {"color": "cell_type", "n_neighbors": 5}, (EMBED,)),
        Call("pl.evaluation", needs=("tl.evaluate",)),
        Call("pl.grn", {"group": "T cell"}, ("pp.grn",)),
        Call("pl.imputation", {**SLIDES, "n": 1}, ("tl.impute",)),
        Call("pl.keywords", {"groupby": "cell_type", "n_genes": 3}, ("pp.tfidf",)),
        Call("pl.ligand_receptor", {"max_fdr": 1.0}, ("tl.ligand_receptor",)),
        Call("pl.loss_curve", needs=("tl.fine_tune",)),
        Call("pl.niche_composition", needs=("tl.niche_composition",)),
        Call("pl.outcome", needs=("tl.outcome",)),
        Call("pl.patches", {"n": 2, "slide": "s1"}, late={"patches": lambda: patches()}),
        Call("pl.pathways", {**SLIDES, "n": 1}, ("pp.pathways",)),
        Call("pl.predicted_expression", {**SLIDES, "n": 1}, ("tl.predict_expression",)),
        Call("pl.retrieval", {**SLIDES, "n_spots": 1}, ("tl.retrieve",), {"reference": lambda: tissue_with(SPOTS)}),
        Call("pl.spatial", {**SLIDES, "color": "cell_type"}),
        Call("pl.spatial", {**SLIDES, "color": "MYC", "groups": None}, variant="gene"),
        Call("pl.subpopulations", SLIDES, ("tl.subpopulations",)),
    )
}


@cache
def _tissue_with(needs: tuple[str, ...]) -> ad.AnnData:
    if not needs:
        return make_tissue()
    *others, name = needs
    call = CALLS[name]
    adata = tissue_with(*others, *call.needs)
    result = call.function(adata, **call.keywords())
    return result if name == "tl.outcome" else adata


def tissue_with(*needs: str) -> ad.AnnData:
    """Copy of the tissue with the results of some calls."""
    return _tissue_with(needs).copy()


@cache
def patches() -> Any:
    """Patches of the tissue."""
    call = CALLS["pp.patches"]
    return call.function(make_tissue(), **call.keywords())


@cache
def warm_up(call: Call) -> None:
    """Make a call once, so that libraries are imported and functions are compiled; both change the process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call.function(tissue_with(*call.needs), **call.keywords())
    plt.close("all")
