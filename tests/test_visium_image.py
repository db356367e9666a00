"""Which image the positions of a CytAssist slide are of."""

from __future__ import annotations

import pytest
from fakes import visium as fake
from PIL import Image

from stexp.data.readers.visium import read_visium
from stexp.errors import InputError


def test_with_a_microscope_s_image_positions_are_pixels_of_it(tmp_path):
    fake.write_cytassist(tmp_path / "S", microscope=True)
    (section,) = read_visium(tmp_path / "S")
    assert section.slide.path.name == "image.png"
    apart = tmp_path / "elsewhere" / "he.tif"
    apart.parent.mkdir()
    Image.open(tmp_path / "S" / "image.png").save(apart)
    (tmp_path / "S" / "image.png").unlink()
    assert read_visium(tmp_path / "S", image=apart)[0].slide.path == apart
    # the reduced image of the microscope stands in as ever
    assert read_visium(tmp_path / "S")[0].slide.path.name == "tissue_hires_image.png"
    own = tmp_path / "S" / "spatial" / "cytassist_image.tiff"
    with pytest.raises(InputError, match="by the CytAssist, of eosin alone; its positions are pixels of the micro"):
        read_visium(tmp_path / "S", image=own)
    with pytest.raises(InputError, match=r"cytassist=true, but nothing says that its positions are pixels of cyt"):
        read_visium(tmp_path / "S", cytassist=True)


def test_without_one_the_cytassist_s_picture_is_refused_unless_asked_for(tmp_path, caplog):
    _, positions = fake.write_cytassist(tmp_path / "S", microscope=False)
    own = tmp_path / "S" / "spatial" / "cytassist_image.tiff"
    for image in (None, own):
        with pytest.raises(InputError, match=r"eosin alone at 2.5 um/px, which shows no nuclei; .*data.cytassist=true"):
            read_visium(tmp_path / "S", image=image)
    (section,) = read_visium(tmp_path / "S", cytassist=True)
    assert section.slide.path == own and len(section) == int(positions["in_tissue"].sum())
    assert section.um_per_px == pytest.approx(2.5, rel=1e-2) and "eosin alone" in caplog.text
    fake.picture().resize((900, 700)).save(tmp_path / "he.png")
    with pytest.raises(InputError, match=r"positions are pixels of cytassist_image.tiff, and nothing says where"):
        read_visium(tmp_path / "S", image=tmp_path / "he.png")
    with pytest.raises(InputError, match="leave one out"):
        read_visium(tmp_path / "S", image=tmp_path / "he.png", cytassist=True)


def test_what_is_no_cytassist_slide_has_no_such_picture(tmp_path):
    fake.write_section(tmp_path / "S", 2)
    with pytest.raises(InputError, match=r"data.cytassist=true, but there is no .*cytassist_image.tiff"):
        read_visium(tmp_path / "S", cytassist=True)
