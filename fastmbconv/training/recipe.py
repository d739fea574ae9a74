"""EfficientNet's recipe: RMSprop as TensorFlow computes it, a staircase of rates, a moving average of the weights."""

from __future__ import annotations

import math
from itertools import chain

import torch
from timm.optim import RMSpropTF
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from fastmbconv.training.config import Config

RATES = {"rmsprop": 0.016, "adamw": 0.001, "sgd": 0.125}
PER = 256  # pictures: the paper's 0.256 for a batch of 4096


def peak_rate(config: Config, batch_size: int) -> float:
    """The rate after the warm-up."""
    return RATES[config.optimizer] * batch_size / PER if config.lr is None else config.lr


def rate(config: Config, peak: float, step: int, steps_per_epoch: int) -> float:
    """The learning rate of a step, counted from 0 over the whole run. Source: utils.py of TensorFlow's TPU models."""
    warmup = config.warmup_epochs * steps_per_epoch
    if step < warmup:
        return peak * min((step + 1) / warmup, 1.0)
    if (config.schedule or ("step" if config.optimizer == "rmsprop" else "cosine")) == "step":
        return peak * config.decay_rate ** math.floor(step / (config.decay_epochs * steps_per_epoch))
    total = config.epochs * steps_per_epoch
    return peak / 2 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def optimizer_for(model: nn.Module, config: Config, peak: float) -> torch.optim.Optimizer:
    """No weight decay on BatchNorms and biases, which are the parameters with one dimension."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "rmsprop":
        return RMSpropTF(groups, lr=peak, alpha=0.9, eps=1e-3, momentum=config.momentum)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=peak, fused=True)
    return torch.optim.SGD(groups, lr=peak, momentum=config.momentum, nesterov=config.momentum > 0, fused=True)


class Average(AveragedModel):
    """The moving average of weights and statistics: its decay grows to `decay`, as TensorFlow's does.

    After n updates it is min(decay, (1 + n) / (10 + n)).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, use_buffers=True)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """One step towards this model; torch's own waits for the GPU, to which it sends the count from the CPU."""
        n = int(self.n_averaged)
        weight = 1 - min(self.decay, (1 + n) / (10 + n)) if n else 1.0
        groups: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        own, theirs = (chain(each.parameters(), each.buffers()) for each in (self.module, model))
        for averaged, current in zip(own, theirs, strict=True):
            group = groups.setdefault(averaged.dtype, ([], []))
            group[0].append(averaged.detach())
            group[1].append(current.detach())
        for dtype, (ours, others) in groups.items():
            if dtype.is_floating_point:
                torch._foreach_lerp_(ours, others, weight)
            else:
                torch._foreach_copy_(ours, others)  # num_batches_tracked
        self.n_averaged += 1
