"""A network that is small enough to load a thousand times, in B0's place where a checkpoint's variant is found out."""

from contextlib import ExitStack, contextmanager
from unittest import mock

import torch

from fastmbconv import checkpoints
from fastmbconv.efficientnet import EfficientNet
from fastmbconv.scaling import COEFFICIENTS, Coefficients
from fastmbconv.sources import facts

TINY = Coefficients(width=0.1, depth=0.1, resolution=32, dropout=0.2)
CLASSES = ("a", "b", "c")
# Options of a run of `fastmbconv train` that is short.
RUN = ["--resolution", "32", "--workers", "0", "--epochs", "1", "--warmup-epochs", "0", "--batch-size", "4"]
RUN += ["--augment", "none", "--device", "cpu", "--no-tensorboard"]


@contextmanager
def tiny_b0():
    """Whoever looks B0 up, by its name or by the shapes of a checkpoint, sees the tiny one."""
    from fastmbconv.training import model, restore

    with ExitStack() as stack:
        for module in (checkpoints, facts, model, restore):
            stack.enter_context(mock.patch.object(module, "COEFFICIENTS", {**COEFFICIENTS, "b0": TINY}))
        yield


def tiny_weights(scheme, seed=1, **options):
    """Its entries under a library's names, with statistics that have moved; another seed, other values."""
    torch.manual_seed(seed)
    model = EfficientNet(TINY, num_classes=options.pop("num_classes", len(CLASSES)), **options)
    for name, value in model.state_dict().items():
        if "running" in name:
            value.uniform_(0.5, 1.5)
    return checkpoints.convert(model, model.state_dict(), to=scheme)
