from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sections import make_section, make_sections

from stexp.data.slides.tiles import corners
from stexp.data.splits import ROLES, assign_roles, folds, role_lines, spatial_blocks, spot_table
from stexp.errors import InputError, UnknownName
from stexp.protocol import Protocol

STRICT = Protocol("strict")
PAPER = Protocol("paper", hold_out="section", validation=False)


class Stub(SimpleNamespace):
    """What the splits look at in a section: name, patient, slide, positions, length."""

    def __len__(self) -> int:
        return len(self.xy_px)


def stub(name: str, n: int = 20, slide: bool = True, xy: np.ndarray | None = None) -> Stub:
    xy = np.random.default_rng(n).uniform(0, 100, (n, 2)) if xy is None else xy
    return Stub(name=name, patient=name[0], slide=SimpleNamespace(path=Path(name)) if slide else None, xy_px=xy)


@st.composite
def data_sets(draw) -> list[Stub]:
    names = draw(st.lists(st.tuples(st.sampled_from("ABCDE"), st.integers(1, 4)), min_size=2, max_size=9, unique=True))
    return [stub(f"{p}{i}", draw(st.integers(8, 40)), draw(st.booleans())) for p, i in names]


@given(sections=data_sets(), data=st.data())
def test_strict_keeps_the_test_patients_apart(sections, data):
    known = folds(sections, STRICT)
    if not known:
        return
    fold = data.draw(st.sampled_from(known))
    by_name = {section.name: section for section in sections}
    try:
        roles = assign_roles(sections, STRICT, fold)
    except InputError as error:
        assert "no section with an image is left to train on" in str(error)
        assert {section.patient for section in sections if section.slide is not None} == {fold}
        return
    patients = {
        role: {by_name[name].patient for name, of_spots in roles.items() if (of_spots == role).any()} for role in ROLES
    }
    assert patients["test"] == {fold}
    for role in ("train", "validation", "reference"):
        assert fold not in patients[role]
    assert patients["train"] and patients["validation"]
    training = {section.patient for section in sections if section.slide is not None} - {fold}
    if len(training) >= 3:
        assert patients["train"].isdisjoint(patients["validation"])
    for name, of_spots in roles.items():
        assert of_spots.shape == (len(by_name[name]),) and set(of_spots) <= set(ROLES)
        assert (of_spots == "reference").all() == (by_name[name].slide is None)
    left_out = set(by_name) - set(roles)
    assert left_out == {s.name for s in sections if s.patient == fold and s.slide is None}


@given(sections=data_sets(), data=st.data())
def test_paper_holds_out_one_section_and_keeps_the_rest_of_its_patient(sections, data):
    known = folds(sections, PAPER)
    if len(known) < 2:
        return
    fold = data.draw(st.sampled_from(known))
    roles = assign_roles(sections, PAPER, fold)
    for section in sections:
        expected = "test" if section.name == fold else "reference" if section.slide is None else "train"
        assert set(roles[section.name]) == {expected}


def test_folds_are_units_with_an_image_in_their_order():
    sections = [stub("B1"), stub("A1", slide=False), stub("C1", slide=False), stub("C2"), stub("B2")]
    assert folds(sections, STRICT) == ["B", "C"]
    assert folds(sections, PAPER) == ["B1", "C2", "B2"]


@pytest.mark.parametrize("name", ["all", "null", "None"])
def test_a_patient_that_fold_cannot_name_is_refused(name):
    patients = [stub("A1"), stub("B1"), stub("C1")]
    patients[1].patient = name
    with pytest.raises(InputError, match=rf"a patient is called {name}, which fold= takes for something else"):
        folds(patients, STRICT)
    assert folds(patients, PAPER) == ["A1", "B1", "C1"]


def test_an_unknown_fold_says_what_there_is_and_how_it_is_typed():
    patients = [stub("A1"), stub("B1")]
    patients[1].patient = "10_1"
    with pytest.raises(UnknownName, match="fold=101 is no patient") as error:
        assign_roles(patients, STRICT, "101")
    assert (error.value.names, error.value.choices, error.value.typed) == (["101"], ["A", "10_1"], "fold={}")


# validation


def validated(sections, fold) -> dict[str, int]:
    roles = assign_roles(sections, STRICT, fold)
    return {name: int((of == "validation").sum()) for name, of in roles.items() if (of == "validation").any()}


def test_validation_is_the_patient_of_median_size():
    sizes = {"T1": 20, "A1": 10, "A2": 10, "B1": 50, "C1": 30, "D1": 8, "E1": 90}
    sections = [stub(name, n) for name, n in sizes.items()]
    assert validated(sections, "T") == {"C1": 30}
    assert validated(sections[::-1], "T") == {"C1": 30}
    assert validated([*sections, stub("C2", 5)], "T") == {"C1": 30, "C2": 5}


def test_with_two_training_patients_validation_is_the_last_section():
    sections = [stub("T1"), stub("A1", 10), stub("B1", 50), stub("B2", 30)]
    assert validated(sections, "T") == {"B2": 30}


def test_with_one_training_section_validation_is_a_quarter_beyond_a_line():
    section = stub("A1", 40)
    roles = assign_roles([stub("T1"), section], STRICT, "T")["A1"]
    x = section.xy_px[:, 0]
    assert (roles == "validation").sum() == 10
    assert x[roles == "validation"].min() > x[roles == "train"].max()


@pytest.mark.parametrize(
    ("patients", "says"),
    [
        ("AB", "validation spots are a block of A1, the rest of which trains"),
        ("AAB", "validation section is of A, of whom others train"),
        ("ABCD", None),
    ],
)
def test_it_is_said_where_validation_is_little_apart_from_training(patients, says, tmp_path):
    names = [f"{patient}{patients[:i].count(patient) + 1}" for i, patient in enumerate(patients)]
    sections = [make_section(tmp_path, name, name[0]) for name in names]
    text = "\n".join(role_lines(spot_table(sections, assign_roles(sections, STRICT, patients[-1]))))
    assert text.count("validation: ") == 1
    assert says in text if says else "of whom" not in text and "a block of" not in text


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_a_narrow_section_still_gives_a_quarter(columns):
    """With few columns no vertical line cuts off a quarter; all spots of the rightmost may share the quantile."""
    xy = np.array([(x, y) for x in range(columns) for y in range(12)], float)
    roles = assign_roles([stub("T1"), stub("A1", xy=xy)], STRICT, "T")["A1"]
    chosen = roles == "validation"
    assert chosen.sum() == len(xy) // 4
    assert xy[chosen, 0].min() >= xy[~chosen, 0].max()  # beyond a line, if a slightly leaning one
    last = xy[chosen & (xy[:, 0] == xy[chosen, 0].min()), 1]
    assert np.ptp(last) == len(last) - 1  # and neighbours stay together


def test_too_few_spots_to_keep_some():
    with pytest.raises(InputError, match="A1 alone trains and has 7 spots"):
        assign_roles([stub("T1"), stub("A1", 7)], STRICT, "T")


def test_no_validation_where_the_protocol_wants_none():
    sections = [stub("T1"), stub("A1"), stub("B1"), stub("C1")]
    assert not validated_under(sections, Protocol("x", validation=False), "T")


def validated_under(sections, protocol, fold) -> bool:
    return any((of == "validation").any() for of in assign_roles(sections, protocol, fold).values())


# bad input


@pytest.mark.parametrize(
    ("protocol", "fold", "parts"),
    [
        (STRICT, "Q", ["fold=Q is no patient with an image", "choose one of A, B", "or all"]),
        (STRICT, "A2", ["A2 is a section of patient A", "protocol strict holds out patients"]),
        (STRICT, "C", ["fold=C is no patient", "C has counts but no image"]),
        (
            PAPER,
            "A",
            ["fold=A is no section", "choose one of A1, A2, B1", "A is a patient", "paper holds out sections"],
        ),
        (PAPER, "C1", ["C1 has counts but no image"]),
    ],
)
def test_an_unknown_fold_is_answered_with_what_there_is(tmp_path, protocol, fold, parts):
    sections = [
        *(make_section(tmp_path, name, name[0]) for name in ("A1", "A2", "B1")),
        make_section(tmp_path, "C1", "C", image=False),
    ]
    with pytest.raises(InputError) as caught:
        assign_roles(sections, protocol, fold)
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def test_nothing_left_to_train_on(tmp_path):
    sections = make_sections(tmp_path, patients=1)
    with pytest.raises(InputError, match="fold A: no section with an image is left to train on"):
        assign_roles(sections, STRICT, "A")
    assign_roles(sections, PAPER, "A1")
    with pytest.raises(InputError, match="fold A1: no section with an image"):
        assign_roles([sections[0], make_section(tmp_path, "B1", "B", image=False)], PAPER, "A1")


def test_a_held_out_section_of_one_spot_is_refused_and_a_training_one_is_not(tmp_path):
    sections = [*make_sections(tmp_path), make_section(tmp_path, "Z1", "Z", 1)]
    with pytest.raises(InputError, match="section Z1 has 1 spot; a correlation"):
        assign_roles(sections, STRICT, "Z")
    assert assign_roles(sections, PAPER, "A1")["Z1"].tolist() == ["train"]


def test_two_sections_of_one_name_are_refused(tmp_path):
    sections = [*make_sections(tmp_path), make_section(tmp_path, "A1", "D", n=9)]
    with pytest.raises(InputError, match="2 sections are called A1"):
        assign_roles(sections, STRICT, "B")


BLOCKS = Protocol("blocks", hold_out="block")


@given(n=st.integers(3, 9), n_spots=st.integers(60, 200), seed=st.integers(0, 99))
def test_blocks_are_of_one_size_and_compact(n, n_spots, seed):
    xy = np.random.default_rng(seed).uniform(0, (300, 100), (n_spots, 2))
    block = spatial_blocks(xy, n)
    size = np.bincount(block, minlength=n)
    assert len(size) == n and size.max() - size.min() <= n  # each cut rounds
    for i in range(n):
        low, high = xy[block == i].min(axis=0), xy[block == i].max(axis=0)
        inside = ((xy > low) & (xy < high)).all(axis=1)
        assert (block[inside] == i).all()  # a rectangle of its own
    shuffled = np.random.default_rng(seed + 1).permutation(n_spots)
    assert np.array_equal(spatial_blocks(xy[shuffled], n), block[shuffled])


@pytest.mark.parametrize("side", [1, 24, 25])
@pytest.mark.parametrize("validation", [True, False])
def test_tiles_of_different_roles_share_no_pixel_where_blocks_are_held_out(side, validation):
    protocol = Protocol("blocks", hold_out="block", validation=validation)
    xy = np.random.default_rng(0).uniform(0, 300, (400, 2))
    sections = [stub("A1", xy=xy), stub("A2", xy=xy[:200] + 7.5), stub("B1", slide=False)]
    tested = np.zeros(400, int)
    for fold in folds(sections, protocol):
        roles = assign_roles(sections, protocol, fold, lambda section: side)
        assert (roles["B1"] == "reference").all()
        tested += roles["A1"] == "test"
        painted = {}
        for role in ("train", "validation", "test"):
            canvas = np.zeros((400, 400), bool)
            for x, y in np.floor(xy[roles["A1"] == role]).astype(int) + 50:
                canvas[y - side // 2 : y - side // 2 + side, x - side // 2 : x - side // 2 + side] = True
            painted[role] = canvas
        assert painted["train"].any() and painted["test"].any() and painted["validation"].any() == validation
        if side > 1:  # two points may share a pixel
            assert (roles["A1"] == "gap").any()
        assert not (painted["test"] & (painted["train"] | painted["validation"])).any()
        assert not (painted["validation"] & painted["train"]).any()
    assert (tested == 1).all()


@given(
    pitch=st.floats(1.5, 9.0),
    side=st.integers(2, 40),
    angle=st.floats(0, 90),
    rows=st.integers(8, 16),
    validation=st.booleans(),
)
def test_bins_nearer_than_a_tile_share_no_pixel_across_roles(pitch, side, angle, rows, validation):
    """Turned arrays of bins, diagonal neighbours included, with the very squares that tiles are cut from."""
    row, column = (grid.ravel() for grid in np.mgrid[0:rows, 0:16])
    turn = np.array([[np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))], [-1, 1]])
    turn[1] = -turn[0, 1], turn[0, 0]
    xy = np.column_stack([column, row]) * pitch @ turn + 400
    protocol = Protocol("blocks", hold_out="block", validation=validation)
    for fold in ("block1", "block3"):
        try:
            roles = assign_roles([stub("A1", xy=xy)], protocol, fold, lambda section: side)["A1"]
        except InputError as error:  # nothing is left between blocks that a tile spans
            assert "left to train on" in str(error)
            continue
        low = {role: corners(xy[roles == role], side) for role in ("train", "validation", "test")}
        for role, other in (("test", "train"), ("test", "validation"), ("validation", "train")):
            apart = np.abs(low[role][:, None] - low[other])
            assert (apart.max(axis=2, initial=side) >= side).all()  # in x or in y
        # no more is left out than has to be: every spot of the gap overlaps with one of another role
        kept = np.concatenate([low["test"], low["validation"]])
        gap = np.abs(corners(xy[roles == "gap"], side)[:, None] - kept).max(axis=2, initial=0)
        assert (gap.min(axis=1, initial=side) < side).all() or not len(gap)


def test_a_section_beside_a_tested_one_on_the_same_slide_keeps_a_tile_apart():
    protocol = Protocol("sections", hold_out="section", validation=False)
    xy = np.column_stack([grid.ravel() for grid in np.mgrid[20:140:8, 20:180:20]]).astype(float)
    left, right, elsewhere = stub("A1", xy=xy), stub("B1", xy=xy + np.array([121.5, 0.5])), stub("C1", xy=xy)
    right.slide = left.slide
    for side in (1, 9, 20, 32):
        roles = assign_roles([left, right, elsewhere], protocol, "A1", lambda section, side=side: side)
        assert (roles["C1"] == "train").all() and (roles["A1"] == "test").all()
        apart = np.abs(corners(right.xy_px, side)[:, None] - corners(left.xy_px, side)).max(axis=2).min(axis=1)
        np.testing.assert_array_equal(roles["B1"] == "gap", apart < side)
        assert (roles["B1"] == "gap").any() == (side > 9)


def test_block_folds_are_named_and_refused_by_name():
    sections = [stub("A1", 40)]
    assert folds(sections, BLOCKS) == ["block1", "block2", "block3", "block4"]
    assert folds([stub("A1", 40, slide=False)], BLOCKS) == []
    with pytest.raises(InputError, match=r"fold=A1 is no block.*choose one of block1, block2"):
        assign_roles(sections, BLOCKS, "A1")
    with pytest.raises(InputError, match="7 spots cannot be cut into 4 blocks of two or more"):
        assign_roles([stub("A1", 7)], BLOCKS, "block1")
    with pytest.raises(InputError, match="no section with an image is left to train on; protocol=blocks"):
        assign_roles(sections, STRICT, "A")
    with pytest.raises(InputError, match=r"protocol\.blocks=2: 3 to 1000"):
        Protocol("blocks", hold_out="block", blocks=2)
