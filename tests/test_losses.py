"""InfoNCE against its definition, one spot at a time."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch

from stexp.models.losses import info_nce, zinb_nll


def pair(n: int = 7, dim: int = 5, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(n)
    return tuple(scale * torch.randn(n, dim, generator=draws) for _ in range(2))


def slow_info_nce(asking: torch.Tensor, answering: torch.Tensor, temperature: float) -> float:
    """Mean over the rows of `asking` of -log softmax of its own partner among `answering`."""
    losses = []
    for i, a in enumerate(asking.double()):
        logits = [float(a @ b) / temperature for b in answering.double()]
        largest = max(logits)
        losses.append(largest + math.log(sum(math.exp(x - largest) for x in logits)) - logits[i])
    return sum(losses) / len(losses)


@pytest.mark.parametrize("temperature", [0.2, 1.0, 3.0])
@pytest.mark.parametrize("image_weight", [0.0, 0.3, 0.5, 1.0])
def test_equals_a_loop_over_spots_in_both_directions(temperature, image_weight):
    image, spot = pair()
    expected = image_weight * slow_info_nce(image, spot, temperature) + (1 - image_weight) * slow_info_nce(
        spot, image, temperature
    )
    assert float(info_nce(image, spot, temperature, image_weight)) == pytest.approx(expected, rel=1e-5)


def test_the_two_directions_differ_and_swap_with_their_inputs():
    image, spot = pair()
    assert float(info_nce(image, spot, 1.0, 1.0)) != pytest.approx(float(info_nce(image, spot, 1.0, 0.0)), rel=0.01)
    torch.testing.assert_close(info_nce(image, spot, 1.0, 0.3), info_nce(spot, image, 1.0, 0.7))


def test_embeddings_that_carry_nothing_cost_log_b_and_matching_ones_nothing():
    same = torch.ones(9, 4)
    assert float(info_nce(same, same)) == pytest.approx(math.log(9), rel=1e-6)
    apart = 50 * torch.eye(9)
    assert float(info_nce(apart, apart)) == pytest.approx(0, abs=1e-6)
    assert float(info_nce(apart, apart.roll(1, 0))) > 1000  # every partner is wrong


def test_order_of_spots_does_not_matter():
    image, spot = pair(12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(info_nce(image, spot, 0.7), info_nce(image[order], spot[order], 0.7))


def test_is_computed_in_float32_under_autocast():
    image, spot = pair(16, 256, scale=1.5)  # logits of tens to hundreds, as unnormalised embeddings have
    expected = info_nce(image, spot)
    with torch.autocast("cpu", torch.bfloat16):
        inside = info_nce(image, spot)
        assert (spot @ image.T).dtype == torch.bfloat16  # autocast is on around the loss
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, expected, rtol=0, atol=0)
    assert info_nce(image.bfloat16(), spot.bfloat16()).dtype == torch.float32


def test_gradient_reaches_both_sides_and_a_learned_temperature():
    image, spot = (x.requires_grad_() for x in pair())
    temperature = torch.tensor(0.5, requires_grad=True)
    info_nce(image, spot, temperature).backward()
    assert image.grad.abs().sum() > 0 and spot.grad.abs().sum() > 0
    step = 1e-3
    image, spot = image.detach(), spot.detach()
    slope = (info_nce(image, spot, 0.5 + step) - info_nce(image, spot, 0.5 - step)) / (2 * step)
    assert float(temperature.grad) == pytest.approx(float(slope), rel=1e-2)


def zinb_parameters(n: int = 40, genes: int = 6) -> tuple[torch.Tensor, ...]:
    draws = torch.Generator().manual_seed(3)
    mean = torch.empty(n, genes).log_normal_(1, 2, generator=draws)
    dispersion = torch.empty(n, genes).log_normal_(0, 2, generator=draws)
    zero_logit = 3 * torch.randn(n, genes, generator=draws)
    counts = torch.poisson(mean * torch.rand(n, genes, generator=draws), generator=draws)
    return counts, mean, dispersion, zero_logit


def test_zinb_equals_scipys_negative_binomial_with_further_zeros():
    counts, mean, dispersion, zero_logit = zinb_parameters()
    losses = []
    for x, mu, r, logit in zip(*(t.flatten().double().tolist() for t in zinb_parameters()), strict=True):
        pi = 1 / (1 + math.exp(-logit))
        losses.append(-math.log((x == 0) * pi + (1 - pi) * scipy.stats.nbinom.pmf(x, r, r / (r + mu))))
    assert 0.2 < (counts == 0).float().mean() < 0.8
    expected = sum(losses) / len(losses)
    assert float(zinb_nll(counts, mean, dispersion, zero_logit)) == pytest.approx(expected, rel=1e-4)


def test_zinb_is_finite_where_probabilities_vanish():
    counts = torch.tensor([[0.0, 0.0, 0.0, 5000.0, 3.0]])
    mean = torch.tensor([[0.0, 1e6, 1e6, 1e-5, 1e6]], requires_grad=True)
    dispersion = torch.tensor([[1e-4, 1e4, 1e4, 1e4, 1e-4]], requires_grad=True)
    zero_logit = torch.tensor([[0.0, -90.0, 90.0, 90.0, -90.0]], requires_grad=True)
    loss = zinb_nll(counts, mean, dispersion, zero_logit)
    loss.backward()
    assert loss.isfinite() and all(t.grad.isfinite().all() for t in (mean, dispersion, zero_logit))


def test_zinb_is_least_at_what_made_the_counts():
    draws = torch.Generator().manual_seed(4)
    r, mu, pi = 3.0, 8.0, 0.3
    rate = torch.distributions.Gamma(torch.tensor(r), torch.tensor(r / mu))
    torch.manual_seed(4)
    counts = torch.poisson(rate.sample((20000, 1)), generator=draws)
    counts[torch.rand(counts.shape, generator=draws) < pi] = 0

    def loss(mu: float, r: float, pi: float) -> float:
        whole = torch.ones_like(counts)
        return float(zinb_nll(counts, mu * whole, r * whole, math.log(pi / (1 - pi)) * whole))

    for other in (
        (mu * 1.2, r, pi),
        (mu / 1.2, r, pi),
        (mu, r * 1.5, pi),
        (mu, r / 1.5, pi),
        (mu, r, 0.4),
        (mu, r, 0.2),
    ):
        assert loss(mu, r, pi) < loss(*other)


def test_zinb_is_computed_in_float32_under_autocast():
    parameters = zinb_parameters()
    with torch.autocast("cpu", torch.bfloat16):
        inside = zinb_nll(*parameters)
    torch.testing.assert_close(inside, zinb_nll(*parameters), rtol=0, atol=0)
    assert zinb_nll(*(t.bfloat16() for t in parameters)).dtype == torch.float32
