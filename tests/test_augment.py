from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from PIL import Image

from stexp.data import augment as module
from stexp.data.augment import AUGMENTATIONS, augment, colour_jitter, hed_jitter
from stexp.errors import InputError


def tiles(n: int = 6, px: int = 12, seed: int = 0) -> torch.Tensor:
    """Tiles no symmetry maps onto themselves, bright and dark enough that jitter clips."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, px, px, 3), dtype=np.uint8))


def slow_jitter(tile: np.ndarray, factors, order) -> np.ndarray:
    """Blends of one tile as torchvision defines them, in float64, neither rounded nor clipped on the way."""
    tile = tile.astype(np.float64) / 255

    def gray(rgb: np.ndarray) -> np.ndarray:
        return 0.299 * rgb[..., 0] + 0.587 * rgb[..., 1] + 0.114 * rgb[..., 2]

    for which in order:
        f = factors[which]
        other = (0.0, gray(tile).mean(), gray(tile)[..., None])[which]
        tile = f * tile + (1 - f) * other
    return tile


def slow_rotation(tile: np.ndarray, angle: float, flip: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each pixel asks where it comes from: tile, inside, and whether rounding decides which pixel that is."""
    tile = tile[:, ::-1] if flip else tile
    side = len(tile)
    centre = (side - 1) / 2
    out, inside, close = np.zeros_like(tile), np.zeros((side, side), bool), np.zeros((side, side), bool)
    for row in range(side):
        for column in range(side):
            # the tile turns clockwise on screen (y points down), so the source lies anticlockwise
            dx, dy = column - centre, row - centre
            x = math.cos(angle) * dx + math.sin(angle) * dy + centre
            y = -math.sin(angle) * dx + math.cos(angle) * dy + centre
            close[row, column] = min(abs(x % 1 - 0.5), abs(y % 1 - 0.5)) < 1e-3
            x, y = round(x), round(y)
            if 0 <= x < side and 0 <= y < side:
                inside[row, column] = True
                out[row, column] = tile[y, x]
    return out, inside, close


def slow_hed(tile: np.ndarray, alpha: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """scikit-image's rgb2hed (without its clipping of negative amounts), the change of Tellez et al., its hed2rgb.

    A level I stands for the intensity (I + 1) / 256, so that black has a density.
    """
    rgb_from_hed = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
    unit = np.log(1e-6)  # six decades of intensity are an amount of 1 there
    hed = np.log(np.maximum((tile + 1) / 256, 1e-6)) / unit @ np.linalg.inv(rgb_from_hed)
    hed = alpha * hed + beta / 6
    return ((256 * np.exp(hed * unit @ rgb_from_hed) - 1) / 255).clip(0, 1)


def symmetries(tile: np.ndarray) -> list[np.ndarray]:
    """The 8 symmetries of a (px, px, 3) tile."""
    return [np.rot90(t, turns) for t in (tile, tile[:, ::-1]) for turns in range(4)]


def test_none_divides_by_255():
    images = tiles()
    got = augment(images, "none", 3)
    assert got.dtype == torch.float32 and got.shape == (6, 3, 12, 12)
    expected = images.numpy().transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
    np.testing.assert_array_equal(got.numpy(), expected)


def test_dihedral_gives_each_of_the_8_symmetries_and_nothing_else():
    images = tiles(200)
    got = (augment(images, "dihedral", 1) * 255).round().permute(0, 2, 3, 1).numpy().astype(np.uint8)
    seen = np.zeros(8, int)
    for image, out in zip(images.numpy(), got, strict=True):
        match = [np.array_equal(out, symmetry) for symmetry in symmetries(image)]
        assert sum(match) == 1
        seen[match.index(True)] += 1
    assert (seen > 8).all()  # 25 expected of each


@pytest.mark.parametrize("order", permutations(range(3)))
def test_colour_jitter_equals_a_loop_of_blends(order):
    images = tiles(4)
    factors = torch.from_numpy(np.random.default_rng(order).uniform(0.5, 1.5, (4, 3))).float()
    matrix, offset = colour_jitter(images, factors, torch.tensor([order] * 4))
    got = torch.einsum("bij,bhwj->bhwi", matrix, images.float()) + offset[:, None, None]
    expected = np.stack([slow_jitter(t, f, order) for t, f in zip(images.numpy(), factors.numpy(), strict=True)])
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-5)


def test_each_tile_has_its_own_order_and_factors():
    images = tiles(6)
    orders = list(permutations(range(3)))
    factors = torch.linspace(0.5, 1.5, 18).view(6, 3)
    together = colour_jitter(images, factors, torch.tensor(orders))
    for i in range(6):
        alone = colour_jitter(images[i : i + 1], factors[i : i + 1], torch.tensor(orders[i : i + 1]))
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(a[0], b[i])
    assert len({tuple(matrix.flatten().tolist()) for matrix in together[0]}) == 6


def test_factors_of_one_change_nothing():
    images = tiles(3)
    matrix, offset = colour_jitter(images, torch.ones(3, 3), torch.tensor([[0, 1, 2]] * 3))
    torch.testing.assert_close(matrix, torch.eye(3).expand(3, 3, 3) / 255)
    assert not offset.any()


@pytest.mark.parametrize("side", [11, 12])
@pytest.mark.parametrize("flip", [False, True])
def test_rotation_equals_a_loop_over_pixels(side, flip):
    angles = torch.tensor([0.0, 0.4, 1.3, -0.7, 2.9, -3.0])
    images = tiles(len(angles), side)
    got, inside = module._rotate(images, angles, torch.full((len(angles),), flip))
    for i, angle in enumerate(angles.tolist()):
        expected, within, close = slow_rotation(images[i].numpy(), angle, flip)
        assert close.mean() < 0.05
        np.testing.assert_array_equal(inside[i].numpy()[~close], within[~close])
        both = within & ~close
        np.testing.assert_array_equal(got[i].numpy()[both], expected[both])


def test_rotation_turns_like_pillows():
    image = np.array(Image.fromarray(tiles(1, 6, 2)[0].numpy()).resize((64, 64), Image.NEAREST))
    for degrees in (25, 110, -160):
        angle, flip = torch.tensor([math.radians(degrees)]), torch.tensor([False])
        got, inside = module._rotate(torch.from_numpy(image)[None], angle, flip)
        expected = np.asarray(Image.fromarray(image).rotate(-degrees, Image.NEAREST))  # anticlockwise there
        shown = (got[0] * inside[0][..., None]).numpy()
        assert (shown == expected).all(-1).mean() > 0.98
        assert (shown == expected[::-1]).all(-1).mean() < 0.7


@pytest.fixture
def recorded(monkeypatch) -> dict:
    """What `augment` draws, by watching what it hands to its parts."""
    seen = {}
    jitter, rotate = module.colour_jitter, module._rotate

    def watched_jitter(images, factors, order):
        seen.update(factors=factors, order=order)
        return jitter(images, factors, order)

    def watched_rotate(images, angle, flip):
        seen.update(angle=angle, flip=flip)
        return rotate(images, angle, flip)

    monkeypatch.setattr(module, "colour_jitter", watched_jitter)
    monkeypatch.setattr(module, "_rotate", watched_rotate)
    return seen


def test_paper_is_jitter_of_the_unrotated_tile_then_flip_and_rotation_on_black(recorded):
    images = tiles(8)
    got = augment(images, "paper", 5)
    assert got.dtype == torch.float32 and got.shape == (8, 3, 12, 12)
    for i, image in enumerate(images.numpy()):
        coloured = slow_jitter(image, recorded["factors"][i].tolist(), recorded["order"][i].tolist()).clip(0, 1)
        expected, inside, close = slow_rotation(coloured, float(recorded["angle"][i]), bool(recorded["flip"][i]))
        assert not expected[~inside].any()
        np.testing.assert_allclose(got[i].permute(1, 2, 0).numpy()[~close], expected[~close], atol=1e-5)
    assert (got == 1).any() and (got == 0).any() and got.min() >= 0 and got.max() <= 1


def test_draws_of_paper_have_the_stated_distribution(recorded):
    augment(tiles(1, 2).expand(4000, 2, 2, 3).contiguous(), "paper", 9)
    factors, angle = recorded["factors"], recorded["angle"]
    assert factors.min() >= 0.5 and factors.max() <= 1.5
    np.testing.assert_allclose(factors.mean(0), 1, atol=0.02)
    np.testing.assert_allclose(factors.std(0), 1 / math.sqrt(12), atol=0.01)
    assert np.abs(np.corrcoef(factors.numpy().T) - np.eye(3)).max() < 0.06
    assert abs(recorded["flip"].float().mean() - 0.5) < 0.04
    np.testing.assert_allclose(torch.histc(angle, 8, -math.pi, math.pi), 500, atol=100)
    orders, counts = recorded["order"].unique(dim=0, return_counts=True)
    assert len(orders) == 6
    np.testing.assert_allclose(counts, 4000 / 6, atol=110)


@pytest.fixture
def hed_drawn(monkeypatch) -> dict:
    """What `augment` draws for the stains."""
    seen = {}

    def watched(alpha, beta):
        seen.update(alpha=alpha, beta=beta)
        return hed_jitter(alpha, beta)

    monkeypatch.setattr(module, "hed_jitter", watched)
    return seen


@pytest.mark.parametrize("sigma", [0.05, 0.2])
def test_hed_is_the_dihedral_tile_with_its_stains_changed_as_scikit_image_defines_them(hed_drawn, sigma):
    images = tiles(8)
    got = augment(images, "hed", 5, sigma)
    assert got.dtype == torch.float32 and got.shape == (8, 3, 12, 12)
    turned = (augment(images, "dihedral", 5) * 255).round().permute(0, 2, 3, 1).numpy()
    for i, tile in enumerate(turned):
        expected = slow_hed(tile, hed_drawn["alpha"][i].double().numpy(), hed_drawn["beta"][i].double().numpy())
        np.testing.assert_allclose(got[i].permute(1, 2, 0).numpy(), expected, atol=1e-5)
    assert got.min() >= 0 and got.max() <= 1


def test_draws_of_hed_have_the_stated_distribution(hed_drawn):
    augment(tiles(1, 2).expand(4000, 2, 2, 3).contiguous(), "hed", 9, 0.1)
    for values, middle in ((hed_drawn["alpha"], 1), (hed_drawn["beta"], 0)):
        assert values.min() >= middle - 0.1 and values.max() <= middle + 0.1
        np.testing.assert_allclose(values.mean(0), middle, atol=0.004)
        np.testing.assert_allclose(values.std(0), 0.1 / math.sqrt(3), atol=0.002)
    assert np.abs(np.corrcoef(torch.cat([*hed_drawn.values()], 1).numpy().T) - np.eye(6)).max() < 0.06


def test_hed_without_strength_is_dihedral():
    images = tiles()
    torch.testing.assert_close(augment(images, "hed", 2, 0.0), augment(images, "dihedral", 2), atol=1e-5, rtol=0)


def test_hed_changes_one_stain_alone():
    # twice the eosin of a pixel that has haematoxylin and eosin, in densities
    haematoxylin, eosin, dab = module.HED
    matrix, offset = hed_jitter(torch.tensor([[1.0, 2.0, 1.0]]), torch.tensor([[0.0, 0.0, 0.1]]))
    expected = 0.4 * haematoxylin + 2 * 0.3 * eosin + 0.1 * math.log(10) * dab
    torch.testing.assert_close(matrix[0] @ (0.4 * haematoxylin + 0.3 * eosin) + offset[0], expected)


@pytest.mark.parametrize("kind", ["dihedral", "paper", "hed"])
def test_draws_are_per_tile_and_follow_the_seed_alone(kind):
    same = tiles(1).expand(16, 12, 12, 3).contiguous()
    torch.manual_seed(0)
    first = augment(same, kind, 11)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    torch.testing.assert_close(augment(same, kind, 11), first, rtol=0, atol=0)
    torch.manual_seed(0)
    augment(same, kind, 11)
    assert torch.equal(torch.get_rng_state(), state)  # nor does it take from the global stream
    assert len(first.flatten(1).unique(dim=0)) >= (5 if kind == "dihedral" else 16)
    assert not torch.equal(augment(same, kind, 12), first)


@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_the_tiles_handed_in_stay_as_they_are(kind):
    images = tiles()
    before = images.clone()
    augment(images, kind, 0)
    assert torch.equal(images, before)


def test_draws_are_made_on_the_cpu_so_that_every_device_gets_the_same(recorded):
    augment(tiles(), "paper", 0)
    assert {name: value.device.type for name, value in recorded.items()} == dict.fromkeys(recorded, "cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_a_gpu_gives_what_the_cpu_gives(kind):
    images = tiles(32, 48)
    different = (augment(images.cuda(), kind, 4).cpu() - augment(images, kind, 4)).abs() > 1e-4
    assert different.float().mean() < 1e-3  # a rounded coordinate may fall on the other side


def test_unknown_augmentation():
    with pytest.raises(InputError, match="augmentation 'papre': choose none, dihedral, paper, hed"):
        augment(tiles(), "papre", 0)
