"""What a plan's tensors may turn out to be: the same one in two places, saved in another layout, unknown."""

import pytest
import torch
from torch import Tensor

from fastmbconv import plans
from fastmbconv.kernels import launching
from fastmbconv.mbconv import MBConv

pytestmark = pytest.mark.usefixtures("triton_backend")


@pytest.fixture
def block(device):
    plans.forget()
    return MBConv(8, 8, se_ratio=0).to(device)


def image(device):
    return torch.randn(2, 8, 4, 4, device=device).to(memory_format=torch.channels_last)


def gradient(block, x, dy):
    (dx,) = torch.autograd.grad(block(x.requires_grad_()), x, dy)
    return dx


def by_launchers(block, x, dy):
    with launching.watching():
        return gradient(block, x, dy)


def test_one_tensor_in_two_places_is_no_pattern_for_two(block, device):
    """An output's gradient that is the input itself, say: a step that reads one of them could be meant for either."""
    for _ in range(2):
        x = image(device)
        gradient(block, x, x)
    x, dy = image(device), image(device)
    torch.testing.assert_close(gradient(block, x, dy), by_launchers(block, x, dy), rtol=0, atol=0)


def test_a_saved_image_may_come_back_in_another_layout(block, device):
    """As from `torch.autograd.graph.save_on_cpu(pin_memory=True)`, whose copies are contiguous."""
    for _ in range(2):
        gradient(block, image(device), image(device))
    x, dy = image(device), image(device)
    expected = by_launchers(block, x, dy)
    for _ in range(3):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().contiguous(), lambda t: t):
            torch.testing.assert_close(gradient(block, x, dy), expected, rtol=0, atol=0)
    torch.testing.assert_close(gradient(block, x, dy), expected, rtol=0, atol=0)


def test_a_view_of_an_unknown_tensor_is_followed_by_no_plan():
    plans.forget()
    x, unknown, calls = torch.ones(2), torch.arange(4.0), []

    def function() -> list[Tensor]:
        calls.append(1)
        return [x + unknown.view(2, 2)[1]]

    for _ in range(4):
        (found,) = plans.run("unknown", function, (x,))
        assert found.tolist() == [3.0, 4.0]
    assert len(calls) == 4
