"""EfficientNet's MBConv block, fused for training and inference in Triton.

model = fastmbconv.fuse(model)        # in place: same parameters, same state_dict, same results
print(fastmbconv.explain(model))      # a row per block: fused, or the reason why not
model = fastmbconv.unfuse(model)
"""

from importlib import import_module
from typing import TYPE_CHECKING

from fastmbconv._version import __version__

if TYPE_CHECKING:
    from fastmbconv.dispatch import backend, get_backend, set_backend
    from fastmbconv.graphs import graph
    from fastmbconv.swap import fuse, unfuse
    from fastmbconv.swap.explain import explain

__all__ = ["__version__", "backend", "explain", "fuse", "get_backend", "graph", "set_backend", "unfuse"]

# Importing torch takes seconds, and the command line answers before: what needs it is imported when it is asked for.
_HOMES = {
    **dict.fromkeys(("backend", "get_backend", "set_backend"), "dispatch"),
    "graph": "graphs",
    **dict.fromkeys(("explain", "fuse", "unfuse"), "swap"),
}
_SUBMODULES = frozenset(
    (
        "ahead", "block", "checkpoints", "checks", "dense", "dispatch", "efficientnet", "ends", "functional", "graphs",
        "graphs_training", "mbconv", "parity", "ranks", "reference", "scaling", "search", "swap", "synchronised",
        "traffic",
    )
)  # fmt: skip

if not TYPE_CHECKING:

    def __getattr__(name):
        if name in _HOMES:
            value = globals()[name] = getattr(import_module(f"fastmbconv.{_HOMES[name]}"), name)
            return value
        if name in _SUBMODULES:
            return import_module(f"fastmbconv.{name}")
        raise AttributeError(f"module 'fastmbconv' has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *_HOMES, *_SUBMODULES})
