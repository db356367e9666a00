"""The command that predicts slides: several at once, over kills, and what it leaves."""

from __future__ import annotations

import json
import shutil

import anndata as ad
import hydra
import numpy as np
import pytest
from exported_model import exported, finished_run, killed_after, slide
from hydra import initialize_config_dir

from stexp import hardware
from stexp.cli.predict import main
from stexp.cli.prediction import check_settings, find_slides, predict, slides_of
from stexp.config import to_plain
from stexp.config.compose import compose
from stexp.errors import InputError
from stexp.files import CONF
from stexp.inference import model_folder


def configure(out, *overrides: str):
    model = exported()  # before Hydra is at work here, which it may be once
    with initialize_config_dir(str(CONF), version_base="1.3"):
        common = [f"run={model}", f"output_dir={out}", "um_per_px=2", "spacing_um=200", "batch_size=16"]
        return hydra.compose("predict", [*common, *overrides])


def run(out, *overrides: str) -> None:
    cfg = to_plain(configure(out, *overrides))
    predict(cfg, find_slides(cfg["slide"]))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("predictions")
    run(out, f"slide={slide()}")
    return out / "A1"


def test_a_finished_slide_says_where_its_numbers_come_from(finished):
    record = json.loads((finished / "provenance.json").read_text())
    model = model_folder.read(exported())
    assert record["model"]["digest"] == model.digest and record["model"]["method"] == "mclstexp"
    assert {"command", "date", "seconds", "versions", "hardware", "commit", "settings"} <= set(record)
    adata = ad.read_h5ad(finished / "predictions.h5ad")
    assert (record["n_spots"], record["n_genes"]) == adata.shape
    assert adata.uns["stexp"]["model_digest"] == model.digest
    assert not (finished / ".work").exists(), "what was kept against a kill is not needed any more"


def test_after_a_kill_the_same_command_ends_with_the_same_bytes(finished, monkeypatch, tmp_path):
    monkeypatch.setattr("stexp.inference.parts.SAVE_EVERY", -1)
    killed_after(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, f"slide={slide()}")
    assert not (tmp_path / "A1" / "predictions.h5ad").exists()
    seen = killed_after(monkeypatch, 100)
    run(tmp_path, f"slide={slide()}")
    assert 0 < sum(seen) < ad.read_h5ad(finished / "predictions.h5ad").n_obs
    assert (tmp_path / "A1" / "predictions.h5ad").read_bytes() == (finished / "predictions.h5ad").read_bytes()


def test_a_finished_slide_is_skipped_and_other_settings_need_a_word(finished, monkeypatch):
    seen = killed_after(monkeypatch, 100)
    before = (finished / "predictions.h5ad").stat().st_mtime_ns
    run(finished.parent, f"slide={slide()}")
    assert not seen and (finished / "predictions.h5ad").stat().st_mtime_ns == before
    with pytest.raises(InputError, match=r"holds a prediction with another genes, spacing_um; choose another"):
        run(finished.parent, f"slide={slide()}", "spacing_um=250", "genes=all")
    assert (finished / "predictions.h5ad").stat().st_mtime_ns == before
    monkeypatch.setattr("stexp.inference.predictor.load_model", lambda _: pytest.fail("the model is loaded"))
    listed: list[dict] = []
    monkeypatch.setattr("stexp.cli.prediction.write_index", lambda _, lacking: listed.append(lacking) or [])
    with pytest.raises(InputError, match="another spacing_um"):
        run(finished.parent, f"slide={slide()}", "spacing_um=250")
    assert listed == [{}], "its prediction stands, and the index does not call it failed"


def test_a_run_and_its_exported_model_are_one_model(finished):
    before = (finished / "predictions.h5ad").stat().st_mtime_ns
    cfg = to_plain(configure(finished.parent, f"slide={slide()}")) | {"run": str(finished_run())}
    predict(cfg, find_slides(cfg["slide"]))
    assert (finished / "predictions.h5ad").stat().st_mtime_ns == before, "it was predicted by the exported model"


def test_genes_are_judged_before_weights_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("stexp.inference.model_folder.read_weights", lambda _: pytest.fail("weights are read"))
    with pytest.raises(InputError, match="1 of 1 genes are not among the 200 that this model predicts: NONE"):
        run(tmp_path / "out", f"slide={slide()}", "genes=[NONE]")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("um_per_px", -1, "um_per_px=-1: a number above 0"),
        ("um_per_px", "fine", "um_per_px=fine: a number above 0"),
        ("grid", "round", "grid=round: choose"),
        ("spacing_um", 0, "spacing_um=0: a number above 0"),
        ("batch_size", 0, "batch_size=0: a whole number of at least 1"),
        ("coordinates", "nowhere.csv", r"coordinates nowhere\.csv do not exist"),
        ("exports", ["geojsn"], "did you mean geojson"),
        ("device", "tpu", "device=tpu: choose"),
    ],
)
def test_keys_that_fit_no_slide_are_refused_before_one_is_read(tmp_path, key, value, says):
    with pytest.raises(InputError, match=says):
        check_settings(to_plain(compose("predict", ["run=x", "slide=y"])) | {key: value})
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        check_settings(to_plain(compose("predict", ["run=x", "slide=y"])) | {"output_dir": str(tmp_path / "file")})


def test_a_kill_before_or_after_the_report_leaves_nothing(monkeypatch, tmp_path):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("stexp.cli.prediction.write_report", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, f"slide={slide()}", "spacing_um=400")
    folder = tmp_path / "A1"
    assert (folder / "provenance.json").exists() and (folder / ".work").exists()
    monkeypatch.undo()
    seen = killed_after(monkeypatch, 100)
    run(tmp_path, f"slide={slide()}", "spacing_um=400")
    assert not seen and (folder / "report.html").exists() and not (folder / ".work").exists()


def test_a_record_from_before_a_key_was_there_is_of_its_default(tmp_path):
    run(tmp_path, f"slide={slide()}", "spacing_um=400")
    record = tmp_path / "A1" / "provenance.json"
    facts = json.loads(record.read_text())
    del facts["settings"]["exclude_slide"]
    record.write_text(json.dumps(facts))
    run(tmp_path, f"slide={slide()}", "spacing_um=400")
    with pytest.raises(InputError, match="another exclude_slide"):
        run(tmp_path, f"slide={slide()}", "spacing_um=400", "exclude_slide=true")


def test_a_slide_that_fails_leaves_no_folder(tmp_path):
    (tmp_path / "cut.jpg").write_bytes(slide().read_bytes()[:5000])
    with pytest.raises(InputError):
        run(tmp_path / "out", f"slide={tmp_path / 'cut.jpg'}")
    assert not (tmp_path / "out").exists()


def test_a_prediction_is_recorded_where_no_figure_of_the_machine_is_to_be_had(tmp_path, monkeypatch):
    def nothing(*_):
        raise OSError("no such figure")

    monkeypatch.setattr(hardware, "_peak_resident_bytes", nothing)
    monkeypatch.setattr(hardware, "usable_cores", nothing)
    run(tmp_path, f"slide={slide()}", "spacing_um=400")
    record = json.loads((tmp_path / "A1" / "provenance.json").read_text())
    assert "peak_memory_gb" not in record and "cores" not in record["hardware"] and record["verdict"]
    assert (tmp_path / "A1" / "report.html").exists()


def test_a_sheet_says_the_scale_of_each_slide(tmp_path):
    sheet = tmp_path / "sheet.csv"
    shutil.copy(slide("B1"), tmp_path / "B1.jpg")
    sheet.write_text(f"slide,um_per_px\n{slide()},\nB1.jpg,1.25\n")
    cfg = to_plain(configure(tmp_path / "out", f"slide={sheet}", "spacing_um=400"))
    slides, scales = slides_of(cfg["slide"])
    assert slides == {"A1": slide(), "B1": tmp_path / "B1.jpg"} and scales == {"B1": 1.25}
    predict(cfg, slides, scales)
    um = {name: ad.read_h5ad(tmp_path / "out" / name / "predictions.h5ad").uns["stexp"]["um_per_px"] for name in slides}
    assert um == {"A1": 2.0, "B1": 1.25}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("slide,um_per_px\nnone.jpg,1\n", "line 2: there is no image"),
        ("slide,um_per_pixel\nA.jpg,1\n", "column 'um_per_pixel'.*did you mean um_per_px"),
        ("slide,um_per_px\nA.jpg,coarse\n", "line 2: um_per_px is 'coarse'"),
        ("slide,um_per_px\nA.jpg,-1\n", "line 2: um_per_px is '-1'"),
        ("slide,um_per_px\nA.jpg,1\nA.jpg,2\n", "line 3: .* have one name"),
        ("um_per_px,\n1,\n", "slide"),
    ],
)
def test_a_sheet_that_does_not_fit_is_refused(tmp_path, text, says):
    (tmp_path / "A.jpg").write_bytes(b"")
    (tmp_path / "s.csv").write_text(text)
    with pytest.raises(InputError, match=says):
        slides_of(str(tmp_path / "s.csv"))


def test_overwrite_predicts_anew(tmp_path):
    run(tmp_path, f"slide={slide()}", "spacing_um=400")
    run(tmp_path, f"slide={slide()}", "spacing_um=400", "genes=all", "overwrite=true")
    assert ad.read_h5ad(tmp_path / "A1" / "predictions.h5ad").n_vars == 200


def test_a_bad_slide_is_told_at_the_end_and_stops_no_other(tmp_path):
    slides = tmp_path / "slides"
    slides.mkdir()
    shutil.copy(slide("B1"), slides / "fine.jpg")
    (slides / "cut.jpg").write_bytes(slide().read_bytes()[:5000])
    (slides / "notes.txt").write_text("no slide")
    with pytest.raises(InputError, match=r"^1 of 2 slides failed: cut: image .*cut.jpg is truncated") as caught:
        run(tmp_path / "out", f"slide={slides}", "spacing_um=400")
    assert "\n" not in str(caught.value)
    assert np.isfinite(ad.read_h5ad(tmp_path / "out" / "fine" / "predictions.h5ad").X).all()
    assert not (tmp_path / "out" / "cut" / "predictions.h5ad").exists()


def test_slides_are_found_by_name_folder_pattern_and_list(tmp_path):
    for name in ("a.svs", "b.TIF", "c.ome.tiff", "d.csv"):
        (tmp_path / name).write_bytes(b"")
    assert list(find_slides(str(tmp_path))) == ["a", "b", "c"]
    assert find_slides(str(tmp_path / "a.svs")) == {"a": tmp_path / "a.svs"}
    assert list(find_slides([str(tmp_path / "*.TIF"), str(tmp_path / "a.svs")])) == ["b", "a"]
    with pytest.raises(InputError, match=r"slide=.*z.svs: there is no such file"):
        find_slides(str(tmp_path / "z.svs"))
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(InputError, match="have one name"):
        find_slides(str(tmp_path))


def test_what_lies_beside_slides_is_no_slide(tmp_path, monkeypatch):
    for name in ("slide.tif", "._slide.tif", ".DS_Store", "Thumbs.db", "desktop.ini", "hd.btf", "readme.txt"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "hd").mkdir()
    both = {"hd": tmp_path / "hd.btf", "slide": tmp_path / "slide.tif"}
    for given in (str(tmp_path), str(tmp_path / "*"), [str(tmp_path / "*.tif"), str(tmp_path / "*.btf")]):
        assert find_slides(given) == both
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_slides("~/hd.btf") == {"hd": tmp_path / "hd.btf"} and find_slides("~/") == both
    assert find_slides(str(tmp_path / "readme.t*")) == {"readme": tmp_path / "readme.txt"}  # as it was named
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "._a.tif").write_bytes(b"")
    with pytest.raises(InputError, match=r"there is no image; .*images end with \.bif, "):
        find_slides(str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["run=???"], "run is not given"),
        (["slide=???"], "slide is not given"),
        (
            [f"slide=[{slide()},{slide('B1')}]", "coordinates=xy.csv"],
            "coordinates are of one slide, and slide= names 2",
        ),
        ([f"slide={slide()}", "um_per_px=null"], "give um_per_px="),
        (["run=nowhere", f"slide={slide()}"], "nowhere is no folder"),
    ],
)
def test_bad_input_ends_with_one_line(tmp_path, capsys, overrides, says):
    with pytest.raises(SystemExit) as ended:
        main.__wrapped__(configure(tmp_path, *overrides))
    assert ended.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("stexp: error:")]
    assert says in line
