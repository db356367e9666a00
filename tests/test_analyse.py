"""The command that makes more of predictions, alone and after stexp-predict."""

from __future__ import annotations

import anndata as ad
import pandas as pd
import pytest
from fake_run import write_run
from hydra import compose, initialize_config_dir
from predicted import predicted

from stexp.cli.analyse import main
from stexp.config import to_plain
from stexp.errors import InputError
from stexp.evaluation import predictions
from stexp.files import CONF
from stexp.reporting.downstream import analyse, check, folders, wanted


def configure(*overrides: str, name: str = "analyse"):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, list(overrides))


def run(folder, *overrides: str) -> list[str]:
    plain = to_plain(configure(f"run={folder}", *overrides))
    check(plain)
    return analyse(folder, plain)


def test_everything_at_once_leaves_its_tables_and_no_other_prediction(tmp_path):
    folder = write_run(tmp_path / "run", spots=64, genes=60)
    (tmp_path / "sets.gmt").write_text("signature\tx\tGENE1\tGENE5\tGENE9\n")
    before = (folder / "predictions.h5ad").read_bytes()
    said = run(
        folder,
        "downstream.domains=expression",
        "downstream.n_domains=3",
        "downstream.labels=neighbour_section",
        "downstream.variable_genes=true",
        f"downstream.gene_sets={tmp_path / 'sets.gmt'}",
        f"downstream.against={folder}",
        "exports=[geojson,h5ad]",
        "export_genes=[GENE4]",
    )
    names = {path.name for path in (folder / "downstream").iterdir()}
    assert names == {
        *(f"{name}.csv" for name in ("domains", "domains_agreement", "variable_genes", "gene_sets")),
        *("gene_set_scores.csv", "differences.csv", "differences.h5ad", "differences.png", "settings.json"),
    }
    assert (folder / "predictions.h5ad").read_bytes() == before
    domains = pd.read_csv(folder / "downstream" / "domains.csv", index_col="spot", dtype=str)
    exported = ad.read_h5ad(folder / "exports" / "spots.h5ad")
    assert list(exported.var_names) == ["GENE4"] and "score_signature" in exported.obs
    assert (exported.obs["domain"].astype(str) == domains["domain"]).all() and domains["domain"].nunique() == 3
    assert '"Domain 1"' in (folder / "exports" / "B1.geojson").read_text()
    text = "\n".join(said)
    assert "3 domains by expression" in text and "with the labels of B2: ARI" in text
    assert "gene set signature: 3 of 3 genes, Pearson with the observed score" in text
    assert "median Pearson 1.000, median RMSD 0" in text


def test_a_folder_of_slides_is_taken_slide_by_slide(tmp_path):
    for root in ("one", "two"):
        for name in ("a", "b"):
            (tmp_path / root / name).mkdir(parents=True)
            predictions.write(predicted(name=name), tmp_path / root / name / "predictions.h5ad")
    found = folders(tmp_path / "one")
    assert found == [tmp_path / "one" / "a", tmp_path / "one" / "b"] and folders(found[0]) == found[:1]
    for folder in found:
        run(folder, "downstream.neighbours=all", f"downstream.against={tmp_path / 'two'}")
        table = pd.read_csv(folder / "downstream" / "differences.csv")
        assert (table["section"] == folder.name).all() and (table["rmsd"] == 0).all()
        assert set(pd.read_csv(folder / "downstream" / "neighbours.csv")["rank"]) == {1, 2, 3}
    with pytest.raises(InputError, match=r"holds no predictions\.h5ad"):
        folders(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ([], "run is not given"),
        (["run=x"], "nothing is asked for"),
        (["run=nowhere", "exports=csv"], "nowhere holds no predictions.h5ad"),
        (["run=x", "exports=[xls]"], "exports=xls: choose of geojson"),
        (["run=x", "downstream.domains=tissue"], "downstream.domains=tissue: choose image, expression, joint"),
        (["run=x", "downstream.domains=image", "downstream.method=ward"], "choose kmeans, leiden, mixture"),
        (["run=x", "downstream.gene_sets=none.gmt"], "none.gmt does not exist"),
        (["run=x", "downstream.against=none"], "downstream.against=none is no folder"),
    ],
)
def test_bad_input_ends_with_one_line(capsys, overrides, says):
    with pytest.raises(SystemExit) as ended:
        main.__wrapped__(configure(*overrides))
    assert ended.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("stexp: error:")]
    assert says in line


@pytest.mark.slow
def test_a_finished_slide_is_exported_without_predicting_it_again(tmp_path, monkeypatch):
    from exported_model import exported, killed_after, slide

    from stexp.cli.prediction import find_slides, predict

    def command(*overrides: str) -> None:
        common = [f"run={exported()}", f"slide={slide()}", f"output_dir={tmp_path}", "um_per_px=2", "spacing_um=300"]
        cfg = to_plain(configure(*common, *overrides, name="predict"))
        check(cfg)
        predict(cfg, find_slides(cfg["slide"]))

    assert not wanted(to_plain(configure("run=x", "slide=y", name="predict")))
    command("exports=[csv]")
    before = (tmp_path / "A1" / "predictions.h5ad").read_bytes()
    seen = killed_after(monkeypatch, 0)
    command("exports=geojson", "downstream.domains=joint", "downstream.neighbours=all")
    assert not seen and (tmp_path / "A1" / "predictions.h5ad").read_bytes() == before
    names = {path.relative_to(tmp_path / "A1").as_posix() for path in (tmp_path / "A1").glob("*s*/*")}
    assert names >= {"exports/predicted.csv.gz", "exports/A1.geojson", "downstream/domains.csv"}
    table = pd.read_csv(tmp_path / "A1" / "downstream" / "neighbours.csv")
    assert set(table["reference_patient"]) <= {"B", "C"} and (table.groupby("spot")["weight"].sum() <= 1.001).all()
