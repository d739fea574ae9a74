"""The libraries' own EfficientNets beside ours: which numerics each one runs, and what it says to the same images."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

from fastmbconv.cli.extras import CommandError, require, require_vision

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fastmbconv.checkpoints import Identity

SIDE = 64
FREE = ("fastmbconv", "timm")  # whose names are the same in both families


class Numerics(NamedTuple):
    """What tells models with the same weights apart."""

    family: str
    eps: float


def numerics(
    source: str, target: str, identity: Identity, family: str | None, eps: float | None = None, said: str | None = None
) -> tuple[Numerics, str]:
    """The numerics of the weights of a conversion, and where they are known from; `said`: what says the family.

    Raises:
        CommandError: if source, target, family and eps don't go together.
    """
    from fastmbconv.efficientnet import FAMILIES

    known = {name: _own(name, identity.variant) for name in (source, target) if name not in FREE}
    weights, here = known.get(source), known.get(target)
    if weights and family and weights.family != family:
        raise CommandError(f"--family is {family}: {source}'s weights are of family {weights.family}")
    if weights and here and weights != here:
        raise CommandError(_refusal(f"{source} has", weights, target, here))
    if weights and eps not in (None, weights.eps):
        raise CommandError(f"--eps is {eps:g}: {source}'s {identity.variant} has BN eps {weights.eps:g}")
    if weights:
        return weights, f"{source}'s own"
    same = f"{source}'s names are the same in both families"
    if here and family and here.family != family:
        raise CommandError(
            _refusal("SRC has", None, target, here, family) + f" ({same}; --family, or a name with tf_, says {family})"
        )
    if here:
        _check_eps(source, target, identity.variant, here, eps)
        told = "" if family else f"; {same}, so SRC is taken to be of this one (--family tf or torch if you know)"
        return here, f"{target}'s own{told}"
    lite = identity.variant.startswith("lite")
    chosen = family or ("tf" if lite else "torch")
    told = f"as {said or '--family or --model'} says" if family else f"assumed; {same}, --family chooses"
    return Numerics(chosen, FAMILIES[chosen].eps if eps is None else eps), told


def _check_eps(source: str, target: str, variant: str, here: Numerics, eps: float | None) -> None:
    """CommandError where weights whose names tell no eps would meet another one than theirs."""
    from fastmbconv.efficientnet import FAMILIES

    own = FAMILIES[here.family].eps
    if eps is None and own != here.eps:
        raise CommandError(
            f"--to is {target}: its {variant} runs BN eps {here.eps:g}, {source}'s {own:g} unless told otherwise, and "
            f"SRC doesn't say what it was trained with: --eps {here.eps:g} if it came from {target}"
        )
    if eps not in (None, here.eps):
        raise CommandError(
            f"--eps is {eps:g}: {target}'s {variant} runs {here.eps:g}, and weights of another one give other outputs "
            "there; allowed are timm and fastmbconv, which take any"
        )


def recipe(target: str, identity: Identity, numerics: Numerics) -> str | None:
    """How a model that takes the converted weights is made, where a library's default would run other numerics."""
    from fastmbconv.efficientnet import FAMILIES

    other = numerics.eps != FAMILIES[numerics.family].eps
    if target not in FREE or (numerics.family == "torch" and not other):
        return None
    classes = f", num_classes={identity.num_classes}"
    if target == "timm":
        name = f"{'tf_' if numerics.family == 'tf' else ''}efficientnet_{identity.variant}"
        return f"timm.create_model({name!r}{classes}{f', bn_eps={numerics.eps:g}' if other else ''})"
    return f"efficientnet({identity.variant!r}{classes}, family={numerics.family!r}, eps={numerics.eps:g})"


def _own(library: str, variant: str) -> Numerics:
    """What the models of a library that has one family run."""
    from fastmbconv.checkpoints import own_numerics
    from fastmbconv.scaling import COEFFICIENTS

    scheme = "huggingface" if library == "transformers" else library
    return Numerics(*own_numerics(scheme, COEFFICIENTS[variant]))


def _refusal(whose: str, weights: Numerics | None, target: str, here: Numerics, family: str = "") -> str:
    was = f"family {weights.family}, BN eps {weights.eps:g}" if weights else f"family {family}"
    return (
        f"--to is {target}: its models are of family {here.family}, BN eps {here.eps:g}, {whose} weights of {was}: "
        "they would load there and give other outputs; allowed are timm and fastmbconv, which have both families"
    )


def images(identity: Identity) -> Tensor:
    """Two random images, the same ones every time, in float64."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, identity.in_chans, SIDE, SIDE, generator=generator, dtype=torch.float64)


def outputs(library: str, identity: Identity, numerics: Numerics, entries: dict[str, Tensor], x: Tensor) -> Tensor:
    """What a library's own model with these weights says.

    Raises:
        CommandError: if the library is not installed, or has no such model.
    """
    import torch

    model = MODELS[library](identity, numerics)
    if library == "fastmbconv":
        from fastmbconv.checkpoints import convert

        entries = convert(model, entries, "fastmbconv")  # type: ignore[arg-type]
    model = model.double().eval()
    try:
        model.load_state_dict(entries, strict=False)
        missing = set(model.state_dict()) - set(entries)
    except RuntimeError as error:
        raise CommandError(f"it doesn't take the weights: {error}") from error
    if missing := {name for name in missing if not name.endswith("num_batches_tracked")}:
        raise CommandError(f"it has more entries: {sorted(missing)[0]}")
    with torch.inference_mode():
        out = model(x)
    return out if isinstance(out, torch.Tensor) else out.logits


def _ours(identity: Identity, numerics: Numerics) -> nn.Module:
    return identity.model(family=numerics.family, eps=numerics.eps)


def _timm(identity: Identity, numerics: Numerics) -> nn.Module:
    name = f"{'tf_' if numerics.family == 'tf' else ''}efficientnet_{identity.variant}"
    options = dict(num_classes=identity.num_classes, in_chans=identity.in_chans, bn_eps=numerics.eps)
    return require_vision("timm", "demo").create_model(name, **options)


def _torchvision(identity: Identity, numerics: Numerics) -> nn.Module:
    models = require_vision("torchvision", "train").models
    _only(identity, "torchvision", "b0", "b1", "b2", "b3", "b4", "b5", "b6", "b7")
    if identity.in_chans != 3:
        raise CommandError("torchvision's models take 3 channels")
    return models.get_model(f"efficientnet_{identity.variant}", weights=None, num_classes=identity.num_classes)


def _lukemelas(identity: Identity, numerics: Numerics) -> nn.Module:
    library = require_vision("efficientnet_pytorch", "test")
    _only(identity, "lukemelas", *(name.removeprefix("efficientnet-") for name in library.VALID_MODELS))
    options: dict[str, Any] = dict(num_classes=identity.num_classes, image_size=None)
    return library.EfficientNet.from_name(f"efficientnet-{identity.variant}", identity.in_chans, **options)


def _transformers(identity: Identity, numerics: Numerics) -> nn.Module:
    from fastmbconv.scaling import COEFFICIENTS, HEAD_CHANNELS, round_filters

    if identity.num_classes == 0:
        raise CommandError("transformers' classifier needs classes")
    if find_spec("torchvision") is not None:
        require_vision("torchvision", "train")  # transformers imports it late, and tells no reason where that fails
    library, of = require("transformers", "test"), COEFFICIENTS[identity.variant]
    config = library.EfficientNetConfig(
        width_coefficient=of.width,
        depth_coefficient=of.depth,
        image_size=SIDE,  # it pads for the size in its configuration
        hidden_dim=round_filters(HEAD_CHANNELS, of.width),
        num_labels=identity.num_classes,
        num_channels=identity.in_chans,
    )
    return library.EfficientNetForImageClassification(config)


def _only(identity: Identity, library: str, *known: str) -> None:
    if identity.variant not in known:
        raise CommandError(f"{library} has no model {identity.variant}")
    if identity.num_classes == 0:
        raise CommandError(f"{library}'s models have a classifier, and SRC has none")


MODELS = {
    "fastmbconv": _ours,
    "timm": _timm,
    "torchvision": _torchvision,
    "lukemelas": _lukemelas,
    "transformers": _transformers,
}
