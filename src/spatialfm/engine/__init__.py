"""How work is cut and run: contexts, batches, device and precision."""

from spatialfm.engine._batches import Batch, encode_tissue, make_batch, network_edges
from spatialfm.engine._contexts import Context, cut_contexts
from spatialfm.engine._device import choose_device, choose_dtype
from spatialfm.engine._whole import encode_whole, walk_tensor

__all__ = [
    "Batch",
    "Context",
    "choose_device",
    "choose_dtype",
    "cut_contexts",
    "encode_tissue",
    "encode_whole",
    "make_batch",
    "network_edges",
    "walk_tensor",
]
