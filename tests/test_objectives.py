"""Objectives against loops over pairs, published definitions, and Gaussians whose mutual information is known."""

from __future__ import annotations

import math

import pytest
import torch

from stexp.errors import InputError
from stexp.models.losses import info_nce
from stexp.models.negatives import Negatives, Origin
from stexp.models.objectives import (
    Candidates,
    Objective,
    chance_level,
    check_objective,
    contrastive_loss,
    dv,
    infonce,
    jsd,
    nwj,
)

BOUNDS = {"jsd": jsd, "dv": dv, "nwj": nwj}
ALL: list[Objective] = ["infonce", "soft", "jsd", "dv", "nwj"]


def embeddings(n: int = 7, dim: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(n)
    image, spot = (torch.randn(n, dim, generator=draws) for _ in range(2))
    return torch.nn.functional.normalize(image), torch.nn.functional.normalize(spot)


def softplus(x: float) -> float:
    return math.log(1 + math.exp(x))


def slow_loss(objective: str, queries, candidates, negative, temperature: float) -> float:
    """Of one direction, a pair at a time; the i-th candidate is the i-th query's own."""
    critic = [[float(q @ c) / temperature for c in candidates] for q in queries]
    own = [critic[i][i] for i in range(len(queries))]
    apart = [(i, critic[i][j]) for i in range(len(queries)) for j in range(len(candidates)) if negative[i][j]]
    mean_own = sum(own) / len(own)
    if objective == "infonce":
        sums = [math.exp(own[i]) + sum(math.exp(t) for k, t in apart if k == i) for i in range(len(own))]
        return sum(math.log(total) - t for total, t in zip(sums, own, strict=True)) / len(own)
    if objective == "jsd":
        return sum(softplus(-t) for t in own) / len(own) + sum(softplus(t) for _, t in apart) / len(apart)
    if objective == "dv":
        return -mean_own + math.log(sum(math.exp(t) for _, t in apart) / len(apart))
    return -mean_own + sum(math.exp(t) for _, t in apart) / len(apart) / math.e


@pytest.mark.parametrize("image_weight", [0.0, 0.3])
@pytest.mark.parametrize("objective", ["infonce", "jsd", "dv", "nwj"])
def test_equals_a_loop_over_pairs_with_some_left_out_and_others_from_before(objective, image_weight):
    image, spot = embeddings(6)
    before_image, before_spot = embeddings(4)
    all_image, all_spot = torch.cat([image, before_image]), torch.cat([spot, before_spot])
    negative = torch.rand(6, 10, generator=torch.Generator().manual_seed(0)) < 0.7
    negative[:, :6] &= ~torch.eye(6, dtype=torch.bool)
    slow = [
        slow_loss(objective, a.double(), b.double(), negative.tolist(), 0.4)
        for a, b in ((image, all_spot), (spot, all_image))
    ]
    loss = contrastive_loss(
        objective, Candidates(image, spot, all_image, all_spot, negative), 0.4, image_weight=image_weight
    )
    assert float(loss) == pytest.approx(image_weight * slow[0] + (1 - image_weight) * slow[1], rel=1e-5)


def test_infonce_of_all_pairs_is_what_it_was():
    image, spot = embeddings()
    logits = spot @ image.T / 0.3
    own = torch.arange(7)
    cross_entropy = torch.nn.functional.cross_entropy
    expected = 0.3 * cross_entropy(logits.T, own) + 0.7 * cross_entropy(logits, own)
    torch.testing.assert_close(info_nce(image, spot, 0.3, 0.3), expected)


# bounds of mutual information


@pytest.fixture(scope="module")
def gaussians() -> tuple[float, torch.Tensor, torch.Tensor]:
    """Mutual information of pairs with correlation 0.8 in each of 2 dimensions, and the log ratio of their densities.

    2,000 pairs: the ratio of each x with each y, (2000, 2000), the matched ones on the diagonal; and the negatives.
    """
    n, dims, rho = 2000, 2, 0.8
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(n, dims, generator=draws, dtype=torch.float64)
    y = rho * x + math.sqrt(1 - rho**2) * torch.randn(n, dims, generator=draws, dtype=torch.float64)
    a, b = x[:, None], y[None]
    density = -((b - rho * a) ** 2) / (2 * (1 - rho**2)) + b**2 / 2 - math.log(1 - rho**2) / 2
    return -dims / 2 * math.log(1 - rho**2), density.sum(dim=2), ~torch.eye(n, dtype=torch.bool)


def test_bounds_reach_the_mutual_information_of_gaussians_with_the_best_critic(gaussians):
    information, ratio, negative = gaussians
    assert -float(dv(ratio, negative)) == pytest.approx(information, rel=0.05)
    assert -float(dv(ratio + 7, negative)) == pytest.approx(-float(dv(ratio, negative))), "of no offset"
    assert -float(nwj(ratio + 1, negative)) == pytest.approx(information, rel=0.05)
    bound = math.log(len(ratio)) - float(infonce(ratio, negative))
    assert bound == pytest.approx(information, rel=0.05) and bound <= math.log(len(ratio))


def test_no_critic_is_above_the_mutual_information_and_nwj_is_not_above_dv(gaussians):
    information, ratio, negative = gaussians
    above = information * 1.05  # of 2,000 pairs
    least = float(jsd(ratio, negative))
    for critic in (0.3 * ratio, 0.7 * ratio + 1, 1.5 * ratio, ratio.clamp(-2, 2), ratio**2 / 10, ratio.roll(1, 0)):
        values = {name: -float(function(critic, negative)) for name, function in BOUNDS.items()}
        assert values["nwj"] <= values["dv"] + 1e-9
        assert values["dv"] <= above
        assert math.log(len(ratio)) - float(infonce(critic, negative)) <= above
        assert -values["jsd"] > least, "the log ratio of densities is the best critic"


def test_jensen_shannon_is_the_divergence_of_pairs_and_shuffled_pairs(gaussians):
    _, ratio, negative = gaussians
    paired, shuffled = ratio.diagonal(), ratio[negative]

    def to_mean(log_ratio: torch.Tensor) -> float:
        """E log of the density at pairs over the mean of both densities."""
        return float((math.log(2) - torch.nn.functional.softplus(-log_ratio)).mean())

    divergence = (to_mean(paired) + to_mean(-shuffled)) / 2
    assert 2 * math.log(2) - float(jsd(ratio, negative)) == pytest.approx(2 * divergence, rel=1e-6)
    assert 0 < divergence < math.log(2)


@pytest.mark.parametrize("objective", ["infonce", "jsd", "dv", "nwj"])
def test_the_chance_level_is_the_least_loss_of_a_critic_that_says_the_same_of_all(objective):
    negative = torch.rand(6, 9, generator=torch.Generator().manual_seed(1)) < 0.6
    negative[:, :6] &= ~torch.eye(6, dtype=torch.bool)
    function = {"infonce": infonce, **BOUNDS}[objective]
    losses = [float(function(torch.full((6, 9), float(c)), negative)) for c in torch.linspace(-2, 2, 401)]
    assert min(losses) == pytest.approx(float(chance_level(objective, negative)), abs=1e-5)
    if objective == "infonce":
        others = ~torch.eye(6, dtype=torch.bool)
        assert float(chance_level(objective, others)) == pytest.approx(math.log(6))
    assert chance_level("soft", negative) is None


# which pairs are negatives


def origin(n: int, first: int = 0, *, apart: float = 100.0) -> Origin:
    xy = torch.stack([apart * torch.arange(n), torch.zeros(n)], dim=1)
    return Origin(torch.arange(first, first + n), torch.zeros(n, dtype=torch.int64), xy)


@pytest.mark.parametrize("objective", ALL)
def test_without_memory_and_mask_all_others_of_the_batch_are_negatives(objective):
    image, spot = embeddings()
    plain = contrastive_loss(objective, Candidates.of_batch(image, spot), 0.2)
    empty, far = Negatives(5, memory=4), Negatives(5, mask_within_um=99.0)
    assert torch.equal(contrastive_loss(objective, far.candidates(image, spot, origin(7)), 0.2), plain)
    if objective != "soft":
        memory = contrastive_loss(objective, empty.candidates(image, spot, origin(7)), 0.2)
        torch.testing.assert_close(memory, plain)


def test_the_mask_leaves_out_pairs_of_one_section_that_lie_near_and_no_others():
    image, spot = embeddings(6)
    where = origin(6)
    where.section[3:] = 1  # 3 lies 100 um from 2, in another section
    candidates = Negatives(5, mask_within_um=150.0).candidates(image, spot, where)
    near = {(i, j) for i in range(6) for j in range(6) if abs(i - j) <= 1 and (i < 3) == (j < 3)}
    assert {(i, j) for i, j in (~candidates.negative).nonzero().tolist()} == near
    losses = []
    for i in range(6):  # each tile against its own spot and those that are left
        left = [i, *(j for j in range(6) if (i, j) not in near)]
        losses.append(torch.nn.functional.cross_entropy((spot[left] @ image[i] / 0.2)[None], torch.zeros(1).long()))
    loss = contrastive_loss("infonce", candidates, 0.2, image_weight=1.0)
    torch.testing.assert_close(loss, torch.stack(losses).mean())


@pytest.mark.parametrize("objective", ALL)
def test_gradients_are_finite_where_a_spot_or_a_whole_batch_has_no_negatives(objective):
    for reach in (250.0, 1e6):
        image, spot = (x.requires_grad_() for x in embeddings(4))
        candidates = Negatives(5, mask_within_um=reach).candidates(image, spot, origin(4))
        loss = contrastive_loss(objective, candidates, 0.2)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(image.grad).all() and torch.isfinite(spot.grad).all()


def test_the_memory_holds_the_latest_spots_and_never_a_spots_own_earlier_embedding():
    negatives = Negatives(5, memory=5)
    (image, spot), where = embeddings(3), origin(3)
    negatives.keep(image, spot, where)
    (image, spot), where = embeddings(4), origin(4, first=2)
    candidates = negatives.candidates(image, spot, where)
    assert candidates.negative[:, :4].tolist() == (~torch.eye(4, dtype=torch.bool)).tolist()
    assert candidates.negative[:, 4:].tolist() == [[True, True, False, False, False]] + 3 * [[True] * 3 + [False] * 2]
    torch.testing.assert_close(candidates.all_spot[4:7], embeddings(3)[1])
    torch.testing.assert_close(candidates.all_image[4:7], embeddings(3)[0])
    negatives.keep(image, spot, where)
    assert negatives.rows.tolist() == [2, 3, 4, 5, 0]
    negatives.forget()
    assert not negatives.candidates(image, spot, where).negative[:, 4:].any()


def test_the_memory_is_part_of_the_state_and_only_where_there_is_one():
    negatives, again = Negatives(5, memory=5), Negatives(5, memory=5)
    negatives.keep(*embeddings(3), origin(3))
    again.load_state_dict(negatives.state_dict())
    ours, theirs = (each.candidates(*embeddings(4), origin(4, first=9)) for each in (negatives, again))
    assert torch.equal(ours.negative, theirs.negative) and torch.equal(ours.all_spot, theirs.all_spot)
    assert ours.negative[:, 4:7].all()
    assert not Negatives(5).state_dict()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("nwj", False, 1.0, 0), "objective=nwj.*model.normalise=true"),
        (("nwj", True, 0.01, 0), "temperature=0.01"),
        (("soft", True, 0.1, 9), "negatives_memory=9: .*0 would fit"),
    ],
)
def test_objectives_that_do_not_go_with_the_rest_are_refused(arguments, says):
    with pytest.raises(InputError, match=says):
        check_objective(*arguments)
    check_objective("nwj", True, 0.02, 9)
    check_objective("soft", False, 1.0, 0)
