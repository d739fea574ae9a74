"""EfficientNet's MBConv block, fused for training and inference in Triton.

model = fastmbconv.fuse(model)        # in place: same parameters, same state_dict, same results
print(fastmbconv.explain(model))      # a row per block: fused, or the reason why not
model = fastmbconv.unfuse(model)
"""

from fastmbconv._version import __version__
from fastmbconv.dispatch import backend, get_backend, set_backend
from fastmbconv.graphs import graph
from fastmbconv.swap import explain, fuse, unfuse

__all__ = ["__version__", "backend", "explain", "fuse", "get_backend", "graph", "set_backend", "unfuse"]
