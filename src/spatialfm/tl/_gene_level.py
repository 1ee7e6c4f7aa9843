"""What models know of single genes in single cells, for :func:`spatialfm.tl.ligand_receptor`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from spatialfm._data._components import spatial_components, walk

if TYPE_CHECKING:
    import torch

    from spatialfm.models import HEIST
    from spatialfm.pp._tissue import Tissue


def heard_expression(values: Any, graph: sp.csr_matrix, features: list[int], n_components: int) -> np.ndarray:
    """Expression (n, features) as the components of the tissue tell it after one lazy step to the neighbours; at least 0, float32.

    The gene-level state of ``heist-niche``: a gene's coefficients on the components times what the cell hears of each. Their sum is this.
    """
    scores = spatial_components(values, graph, n_components=n_components).scores
    heard = (scores + walk(graph) @ scores) / 2
    x = values[:, features]
    mean = np.asarray(x.mean(axis=0), np.float64).ravel()
    product = np.asarray((x.T @ scores), np.float64) - np.outer(mean, scores.sum(axis=0, dtype=np.float64))
    coefficients = product / np.maximum(np.square(scores).sum(axis=0, dtype=np.float64), 1e-12)
    return np.maximum(heard @ coefficients.T.astype(np.float32) + mean.astype(np.float32), 0)


def mean_cosines(
    model: HEIST,
    tissue: Tissue,
    type_of: np.ndarray,
    n_types: int,
    pairs: list[tuple[list[int], list[int]]],
    *,
    device: torch.device,
) -> np.ndarray:
    """Cosine of the ligand's embedding in the sender and the receptor's in the receiver, mean over the edges between two types.

    Parameters
    ----------
    model, tissue
        Memory is that of one batch of contexts.
    type_of
        (n,) type of each cell, in the order of ``tissue``; -1 where its edges do not count.
    pairs
        Positions among ``tissue.genes`` of a ligand's subunits and a receptor's; a complex has the mean of their directions.

    Returns
    -------
    (n_types * n_types, pairs), NaN where there is no edge.
    """
    import torch

    from spatialfm.engine import cut_contexts, make_batches
    from spatialfm.engine._device import in_evaluation

    sums = np.zeros((n_types**2, len(pairs)))
    contexts = cut_contexts(tissue.xy, tissue.graph, tissue.slide)
    with in_evaluation(model, device):
        for b, cells, is_core in make_batches(tissue, contexts, device=device):
            _, g = model.encode(b.coords, b.cell_edges, b.expression, b.gene_edges, b.group, context=b.context)
            # Each edge once: from the core, whose neighbours are all there.
            i, j = b.cell_edges[:, torch.from_numpy(is_core).to(device)[b.cell_edges[0]]]
            types = torch.from_numpy(type_of[cells]).to(device)
            counted = (types[i] >= 0) & (types[j] >= 0)
            i, j = i[counted], j[counted]
            joined = (types[i] * n_types + types[j]).cpu().numpy()
            unit = torch.nn.functional.normalize(g.float(), dim=2)
            for k, subunits in enumerate(pairs):
                sent, heard = (unit[:, own].mean(1) for own in subunits)
                cosine = torch.nn.functional.cosine_similarity(sent[i], heard[j], dim=1)
                sums[:, k] += np.bincount(joined, cosine.cpu().numpy(), minlength=n_types**2)
    i, j = (type_of[ends] for ends in tissue.graph.nonzero())
    n_edges = np.bincount((i * n_types + j)[(i >= 0) & (j >= 0)], minlength=n_types**2)[:, None]
    return np.divide(sums, n_edges, out=np.full(sums.shape, np.nan), where=n_edges > 0)
