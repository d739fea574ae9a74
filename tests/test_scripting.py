"""torch.jit.script of fused models: the script is of the un-fused model, and the caller's model is left alone."""

import copy
import io
import threading

import pytest
import torch
from libraries import library
from torch import nn

import fastmbconv

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class Wrapper(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x) * 2


class Unscriptable(nn.Module):
    def forward(self, x):
        return next(iter({"x": x, 1: x}.values()))  # no TorchScript


class Unprepared(nn.Identity):
    def __prepare_scriptable__(self):
        raise ValueError("not now")


class Replaced(nn.ReLU):
    def __prepare_scriptable__(self):
        return nn.ReLU()


def block():
    return library("torchvision").models.mobilenetv2.InvertedResidual(8, 8, 1, 2)


def chain(*more):
    shared = block()
    return nn.Sequential(nn.Conv2d(3, 8, 1), shared, nn.Sequential(block(), shared), Replaced(), *more)


def whole():
    """With a stem and a head."""
    return library("timm").create_model("test_efficientnet", num_classes=4)


class Blocks(torch.fx.Tracer):
    def is_leaf_module(self, module, name):
        return super().is_leaf_module(module, name) or isinstance(module, type(block()))


def traced():
    """A module whose class was made for it alone."""
    model = chain()
    return torch.fx.GraphModule(model, Blocks().trace(model))


def picture(model):
    """Everything about a model's tree of modules that somebody could hold on to."""
    return [
        (
            name,
            module,
            type(module),
            {key: id(value) for key, value in vars(module).items()},
            list(module._modules.items()),
        )
        for name, module in model.named_modules(remove_duplicate=False)
    ]


def refused(error):
    def script(model):
        with pytest.raises(error):
            torch.jit.script(model)

    return script


def in_threads(model):
    threads = [threading.Thread(target=torch.jit.script, args=(model,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def hidden(model):
    """A fused module that is a plain attribute of another one, which torch.jit.script finds all the same."""
    wrapper = Wrapper(nn.Identity())
    wrapper.__dict__["hidden"] = model
    try:
        torch.jit.script(wrapper)
    finally:
        assert wrapper.__dict__["hidden"] is model


SCRIPTED = {
    "model": (chain, torch.jit.script),
    "twice": (chain, lambda model: [torch.jit.script(model) for _ in range(2)]),
    "threads": (chain, in_threads),
    "deep-copy": (chain, lambda model: torch.jit.script(copy.deepcopy(model))),
    "shallow-copy": (chain, lambda model: torch.jit.script(copy.copy(model))),
    "wrapper": (chain, lambda model: torch.jit.script(Wrapper(model))),
    "sub-module": (chain, lambda model: torch.jit.script(model[2])),
    "block": (chain, lambda model: torch.jit.script(model[1])),
    "copied-block": (chain, lambda model: torch.jit.script(copy.copy(model[1]))),
    "fx": (traced, torch.jit.script),
    "half-way": (lambda: chain(Unscriptable()), refused(RuntimeError)),
    "unprepared": (lambda: chain(Unprepared()), refused(ValueError)),
    "hidden": (block, hidden),
    "ends": (whole, torch.jit.script),
    "ends-wrapped": (whole, lambda model: torch.jit.script(Wrapper(model))),
}


@pytest.mark.parametrize("make, script", SCRIPTED.values(), ids=SCRIPTED)
def test_the_callers_model_stays_as_it_was(make, script):
    model = fastmbconv.fuse(make()).eval()
    before = picture(model)
    script(model)
    assert picture(model) == before
    explanation = fastmbconv.explain(model)
    assert explanation.fused == len(explanation) > 0


@pytest.mark.parametrize("make", [chain, whole])
def test_the_script_is_of_the_unfused_model(make):
    """Its parameters are the model's own, and it names nothing of ours."""
    model, x = fastmbconv.fuse(make()).eval(), torch.randn(2, 3, 32, 32)
    scripted, stored = torch.jit.script(model), io.BytesIO()
    torch.testing.assert_close(scripted(x), model(x))
    torch.jit.save(scripted, stored)
    assert b"fastmbconv" not in stored.getvalue() and b"Fused" not in stored.getvalue()
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    assert {name: p.data_ptr() for name, p in scripted.named_parameters()} == places
    with torch.no_grad():
        next(model.parameters()).zero_()
    assert not next(scripted.parameters()).any()


def test_models_without_fused_modules_are_scripted_as_ever():
    """By torch itself, which writes what a module gives for itself into the model."""
    fastmbconv.fuse(chain())
    model = chain()
    torch.jit.script(model)
    assert type(model[3]) is nn.ReLU


def test_repr_says_what_a_block_is():
    model = fastmbconv.fuse(nn.Sequential(block(), fastmbconv.mbconv.MBConv(8, 8)))
    assert "(0): InvertedResidual (fused)(" in repr(model) and "Fused" not in repr(model)
    assert "(1): MBConv(\n    fused\n" in repr(model)
    assert type(model[0]).__name__.isidentifier() and isinstance(model[0], type(block()))
    assert "fused" not in repr(fastmbconv.unfuse(model)) and type(model[0]) is type(block())
    assert "(bn1): BatchNormAct2d (fused)(" in repr(fastmbconv.fuse(whole()))
