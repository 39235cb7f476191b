"""DCT low-pass against SciPy, its algebra, and what the table cannot see: poisoned neighbours, batch invariance, gradients."""

from __future__ import annotations

import pytest
import torch
from scipy import fft
from stretto.ops import _backend, dct, ref
from torch import Tensor

from tests.oracle import same_bits

needs_native = pytest.mark.skipif(_backend._C is None, reason="the native module is not built")


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def scipy_lowpass(x: Tensor, keep: tuple[int, int], inverse: bool) -> Tensor:
    """Transform, crop, and for `inverse` transform back in the kept size with means kept."""
    y = fft.dctn(x.double().numpy(), axes=(1, 2), norm="ortho")[:, : keep[0], : keep[1]]
    if inverse:
        y = fft.idctn(y, axes=(1, 2), norm="ortho") * ((keep[0] * keep[1]) / (x.shape[1] * x.shape[2])) ** 0.5
    return torch.from_numpy(y)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("n", range(1, 33))
def test_scipy_for_every_size(n: int, inverse: bool, isa):
    """All n of 1..32 and all kept sizes, against another length on the other axis."""
    for keep in range(1, n + 1):
        other = 33 - n
        kept = (keep, max(1, other * keep // n))
        x = randn(1, n, other, 3)
        want = scipy_lowpass(x, kept, inverse)
        assert (dct.lowpass(x, kept, inverse).double() - want).abs().max() <= 4e-6 * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("inverse", [False, True])
def test_adjoint_is_the_transpose(inverse: bool, isa):
    """<lowpass(x), y> = <x, adjoint(y)> for all pairs of sizes up to 9."""
    for n in range(1, 10):
        for keep in range(1, n + 1):
            x, y = randn(2, n, 10 - n, 5), randn(2, keep, max(1, 10 - n - 2), 5)
            left = (dct.lowpass(x, (keep, y.shape[2]), inverse).double() * y.double()).sum()
            right = (x.double() * dct.lowpass_adjoint(y, (n, 10 - n), inverse).double()).sum()
            assert abs(left - right) <= 1e-4, (n, keep)


def test_the_whole_transform_can_be_undone(isa):
    x = randn(2, 13, 24, 20)
    assert torch.allclose(dct.lowpass_adjoint(dct.lowpass(x, (13, 24)), (13, 24)), x, atol=1e-5)
    assert torch.allclose(dct.lowpass(x, (13, 24), inverse=True), x, atol=1e-5)


def test_constants_low_waves_and_high_waves(isa):
    ones = torch.ones(1, 24, 24, 16)
    assert torch.allclose(dct.lowpass(ones, (6, 5), inverse=True), torch.ones(1, 6, 5, 16), atol=1e-6)
    assert torch.allclose(dct.lowpass(ones, (6, 6), inverse=True, rescale="ortho"), torch.full((1, 6, 6, 16), 4.0), atol=1e-5)
    assert torch.allclose(dct.lowpass(randn(1, 8, 8, 4), (1, 1), inverse=True)[0, 0, 0], randn(1, 8, 8, 4).mean((0, 1, 2)), atol=1e-6)
    for frequency, survives in [(3, True), (7, False)]:
        wave = ref.dct.cosine_matrix(24, 24)[frequency].float()
        x = wave[None, :, None, None].expand(1, 24, 24, 4).contiguous()
        smooth = dct.lowpass_adjoint(dct.lowpass(x, (6, 6)), (24, 24))
        assert torch.allclose(smooth, x if survives else torch.zeros_like(x), atol=1e-5)


def test_flip_of_the_grid(isa):
    x = randn(1, 10, 7, 33)
    assert torch.allclose(dct.lowpass(x.flip(1), (4, 3), inverse=True), dct.lowpass(x, (4, 3), inverse=True).flip(1), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bits_do_not_depend_on_batch_channels_or_layout(dtype: torch.dtype, isa):
    x = randn(3, 9, 12, 300, dtype=dtype)
    whole = dct.lowpass(x, (5, 4))
    assert same_bits(dct.lowpass(x[1:2], (5, 4)), whole[1:2])
    assert same_bits(dct.lowpass(x[..., 37:38], (5, 4)), whole[..., 37:38])
    assert same_bits(dct.lowpass(x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1), (5, 4)), whole)
    assert same_bits(dct.lowpass(x.flatten(1, 2), (5, 4), grid=(9, 12)), whole.flatten(1, 2))
    wide = torch.full((3, 9, 12, 400), torch.nan, dtype=dtype)
    wide[..., 50:350] = x
    assert same_bits(dct.lowpass(wide[..., 50:350], (5, 4)), whole), "the neighbours of a view were read"


def test_nan_stays_in_its_image_and_channel(isa):
    x = randn(2, 6, 6, 40)
    want = dct.lowpass(x, (3, 3))
    x[1, 2, 3, 20] = torch.nan
    got = dct.lowpass(x, (3, 3))
    assert got[1, :, :, 20].isnan().all()
    got[1, :, :, 20] = want[1, :, :, 20]
    assert same_bits(got, want)


@needs_native
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("inverse", [False, True])
def test_gradients(inverse: bool, tokens: bool):
    """First and second derivatives through the adjoint ops equal those of the reference."""
    x, g = randn(2, 6, 5, 7), randn(2, 3, 2, 7)
    if tokens:
        x, g = x.flatten(1, 2), g.flatten(1, 2)
    grid, keep = ((6, 5), (3, 2)) if tokens else (None, None)
    found = []
    for low, back in [(dct.lowpass, dct.lowpass_adjoint), (ref.dct.lowpass, ref.dct.lowpass_adjoint)]:
        a, b = x.clone().requires_grad_(), g.clone().requires_grad_()
        first = torch.autograd.grad(low(a, (3, 2), inverse, grid).square().sum(), a, create_graph=True)[0]
        (second,) = torch.autograd.grad(first.sin().sum(), a)
        (of_adjoint,) = torch.autograd.grad(back(b, (6, 5), inverse, keep).square().sum(), b)
        found.append((first.detach(), second, of_adjoint))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_compile():
    x = randn(1, 4, 4, 8)
    compiled = torch.compile(lambda t: dct.lowpass(t, (2, 2), inverse=True) * 2, backend="eager", fullgraph=True)
    assert same_bits(compiled(x), dct.lowpass(x, (2, 2), inverse=True) * 2)
