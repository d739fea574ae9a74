"""Products by torch's library: values, dtypes, what is stated, and what autocast must not change."""

import pytest
import torch
from blocks import FLOATS, normal
from conftest import GPU
from parity import assert_parity

from fastmbconv.kernels import library
from fastmbconv.kernels.launching import written
from fastmbconv.kernels.traffic import recorded


@pytest.mark.parametrize("dtype", FLOATS)
def test_pixels_times_a_matrix(dtype, device):
    image, matrix = normal(2, 3, 5, 7, dtype=dtype, device=device), normal(7, 4, dtype=dtype, device=device)
    add = normal(2, 3, 5, 4, dtype=dtype, device=device)
    before = add.clone()
    for summand in (None, add):
        product, theirs, exact = (
            library.multiply(image, matrix, summand),
            image @ matrix,
            image.double() @ matrix.double(),
        )
        if summand is not None:
            theirs, exact = theirs + summand, exact + summand.double()
        assert product.dtype == dtype
        assert_parity("product", product, theirs, exact)
    assert torch.equal(add, before)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_sum_over_pixels_is_wide(dtype, device):
    """Of 4096 ones and a little: 16 bits would not hold it."""
    a, b = torch.ones(4, 32, 32, 2, dtype=dtype, device=device), torch.ones(4, 32, 32, 3, dtype=dtype, device=device)
    b[0, 0, 0] = 2
    product = library.multiply_pixels(a, b)
    assert product.dtype == torch.float32 and torch.equal(product, torch.full((2, 3), 4097.0, device=device))


def test_autocast_leaves_the_operands_as_they_are(device):
    """Somebody calls backward() inside autocast on a block that ran in float32."""
    image, matrix = normal(2, 3, 5, 7, dtype=torch.float32, device=device), normal(7, 4).float().to(device)
    other = normal(2, 3, 5, 4, dtype=torch.float32, device=device)
    plain = library.multiply(image, matrix, other), library.multiply_pixels(image, other)
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        inside = library.multiply(image, matrix, other), library.multiply_pixels(image, other)
    for a, b in zip(plain, inside, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_a_product_is_the_same_on_every_run(device):
    a, b = (normal(8, 28, 28, c, dtype=torch.float32, device=device).bfloat16() for c in (40, 96))
    first = library.multiply_pixels(a, b)
    assert all(torch.equal(first, library.multiply_pixels(a, b)) for _ in range(3))


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA GPU")
def test_products_of_two_streams_and_of_a_graph_are_the_same_on_every_run(device):
    """B0's last stages: where the library splits a sum, its workspace must be the stream's own."""
    a, b = (normal(128, 7, 7, c, dtype=torch.bfloat16, device=device) for c in (192, 1152))
    matrix = normal(1152, 192, dtype=torch.bfloat16, device=device)

    def products():
        return library.multiply_pixels(b, a), library.multiply(b, matrix)

    expected = products()
    streams = [torch.cuda.Stream(device) for _ in range(2)]
    found = []
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream(device))
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(products())
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = products()
    for _ in range(3):
        graph.replay()
        found.append(tuple(product.clone() for product in captured))
    torch.cuda.synchronize(device)
    for pair in found:
        assert all(torch.equal(ours, first) for ours, first in zip(pair, expected, strict=True))


def test_launches_that_are_written_down_compute_nothing(device, monkeypatch):
    monkeypatch.setattr(library, "compute", lambda *_: pytest.fail("computed"))
    image, matrix = torch.ones(1, 2, 2, 3, device=device), torch.ones(3, 4, device=device)
    with written():
        assert library.multiply(image, matrix).shape == (1, 2, 2, 4)


def test_what_a_product_moves_is_stated(device):
    image, matrix = torch.ones(1, 2, 2, 3, device=device), torch.ones(3, 4, device=device)
    add = torch.ones(1, 2, 2, 4, device=device)
    with recorded() as launches:
        library.multiply(image, matrix, add)
        library.cast(torch.ones(4, 3, 1, 1, device=device), torch.bfloat16)
    assert [one.kernel for one in launches] == ["copy", "mm", "copy"]
    sizes = [([m.size for m in one.reads], [m.size for m in one.writes]) for one in launches]
    assert sizes == [([64], [64]), ([48, 48, 64], [64]), ([48], [24])]


def test_a_weight_in_its_own_dtype_is_not_copied(device):
    weight = torch.ones(4, 3, 1, 1, device=device)
    assert library.cast(weight, torch.float32).data_ptr() == weight.data_ptr()
