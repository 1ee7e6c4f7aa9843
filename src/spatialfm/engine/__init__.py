"""How work is cut and run: contexts, batches, device and precision."""

from spatialfm.engine._attention import Attention, attend_tissue
from spatialfm.engine._batches import Batch, encode_tissue, make_batch, make_batches, network_edges
from spatialfm.engine._contexts import Context, cut_contexts
from spatialfm.engine._device import choose_device, choose_dtype, torch_threads
from spatialfm.engine._images import encode_patches
from spatialfm.engine._spots import SpotEmbedding, encode_spots, find_regions, predict_spots, slide_tensor
from spatialfm.engine._whole import encode_whole, hear_whole, slide_size, walk_tensor

__all__ = [
    "Attention",
    "Batch",
    "Context",
    "SpotEmbedding",
    "attend_tissue",
    "choose_device",
    "choose_dtype",
    "cut_contexts",
    "encode_patches",
    "encode_spots",
    "encode_tissue",
    "encode_whole",
    "find_regions",
    "hear_whole",
    "make_batch",
    "make_batches",
    "network_edges",
    "predict_spots",
    "slide_size",
    "slide_tensor",
    "torch_threads",
    "walk_tensor",
]
