"""Predictions made elsewhere: scored as a run's own, whatever file they come in, and never more than is known said."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from demo_run import overrides_of
from sections import make_data, make_section
from tabled import tabulate_all

from stexp import config
from stexp.cli.evaluate import score_files
from stexp.config.compose import compose
from stexp.data.datamodule import SpotDataModule
from stexp.data.digests import file_digest
from stexp.data.duplicates import Copy, count_prints, record_spots
from stexp.data.genes import normalise
from stexp.errors import InputError
from stexp.evaluation.foreign.align import align
from stexp.evaluation.foreign.files import find_files, predictions_of, read_predictions
from stexp.evaluation.foreign.layout import DataNames
from stexp.evaluation.foreign.names import names_of, rename_genes
from stexp.evaluation.foreign.scales import SCALES
from stexp.evaluation.foreign.training import sections_of_training, training_record
from stexp.evaluation.metrics import mean_over_sections, score_section, top_genes
from stexp.inference.export import export
from stexp.inference.predictor import load_model
from stexp.protocol import Protocol
from stexp.reporting.downstream import analyse
from stexp.reporting.report import write_report
from stexp.reporting.tables import markdown
from stexp.runs import foreign
from stexp.runs.scale import put_on_scale
from stexp.runs.scored import read_scored_run
from stexp.runs.scoring import score_run
from stexp.training.machine import Machine

GENES = [f"g{i:02d}" for i in range(30)]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> SpotDataModule:
    """C1 and C2 held out; the panel is every gene, and chosen without them."""
    return make_data(tmp_path_factory.mktemp("sections"), Protocol("strict"), panel_saw_test=False)


@pytest.fixture(scope="module")
def theirs(data: SpotDataModule) -> ad.AnnData:
    """Predictions of C1 and C2 as another tool would hand them over: the truth, blurred by noise."""
    rows = data.rows("test")
    noise = np.random.default_rng(5).normal(0, 0.5, (len(rows), 30))
    obs = data.spots.iloc[rows][["section", "spot"]].reset_index(drop=True)
    obs.index = obs.index.astype(str)
    return ad.AnnData((data.target[rows] + noise).astype(np.float32), obs=obs, var=pd.DataFrame(index=GENES))


@pytest.fixture(scope="module")
def whole(data: SpotDataModule, theirs: ad.AnnData, tmp_path_factory) -> Path:
    """The folder of their predictions, all of them there."""
    folder = tmp_path_factory.mktemp("whole") / "theirs"
    evaluate(theirs, data, folder, name="theirs")
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def names(data: SpotDataModule) -> DataNames:
    return names_of(data.sections)


def evaluate(predicted: ad.AnnData, data: SpotDataModule, folder: Path, **options) -> dict:
    """Score on sections made by hand, whose config is what the data say of themselves."""
    protocol = {"_target_": "stexp.protocol.Protocol", **asdict(data.protocol)}
    of_data = {"name": "data", "digest": data.digest}
    of_run = {"seed": 0, "fold": data.fold, "output_dir": str(folder), "protocol": protocol, "data": of_data}
    machine = Machine({"accelerator": "cpu", "devices": 1}, "32-true")
    thresholds = config.build(compose("evaluate", []).data.quality)
    options = {"sections": data.sections, "thresholds": thresholds, "machine": machine, **options}
    return foreign.evaluate(predicted, data, of_run, **options)


def metrics_of(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def read(files: list[Path], names: DataNames, layer: str | None = None) -> ad.AnnData:
    return rename_genes(read_predictions(files, names, layer), names)[0]


def aligned(predicted: ad.AnnData, data: SpotDataModule):
    unit_of = {section.name: section.patient for section in data.sections}
    return align(predicted, data.spots, data.panel, unit_of, data.fold)


@pytest.mark.slow
def test_predictions_of_a_run_of_ours_get_its_numbers_to_the_last_digit(
    strict: Path, demo: Path, tmp_path: Path
) -> None:
    of_data = [text for text in overrides_of(demo, tmp_path / "again") if not text.startswith(("trainer", "hardware"))]
    file = strict / "predictions.h5ad"
    cfg = compose("evaluate", [*of_data, f"predictions={file}", "name=again", "fold=A", "device=cpu"])
    protocol = config.build(cfg.protocol)
    metrics = score_files(cfg, find_files([str(file)]), config.dataset_of(cfg).read_sections(protocol), protocol)
    ours = metrics_of(strict)
    told = {"model", "chosen", "contrast"}  # of the training
    assert {key: metrics[key] for key in ours if key not in told} == {k: v for k, v in ours.items() if k not in told}
    assert (tmp_path / "again" / "per_gene.csv").read_bytes() == (strict / "per_gene.csv").read_bytes()
    assert metrics["elsewhere"]["scale"]["statement"].endswith("as the file says.")
    assert metrics["evidence"]["structure"]["ssim"] is not None
    again = score_files(cfg, [file], config.dataset_of(cfg).read_sections(protocol), protocol)
    assert again == metrics
    with pytest.raises(InputError, match=r"another config \(predictions\.trained_on\)"):
        other = compose("evaluate", [*of_data, f"predictions={file}", "name=again", "fold=A", "trained_on=[B1]"])
        score_files(other, [file], config.dataset_of(cfg).read_sections(protocol), protocol)
    table = tabulate_all([read_scored_run(folder) for folder in (strict, tmp_path / "again")])[0]
    rows = table.rows.set_index("label")
    assert rows.loc["again", "pearson_acg"] == rows.loc["mclstexp", "pearson_acg"]
    assert table.marks == {"again": " †"} and "† again, fold A: Predicted elsewhere" in markdown(table)


def test_a_run_folder_without_a_model_is_scored_reported_and_analysed(whole: Path, tmp_path: Path) -> None:
    metrics = metrics_of(whole)
    assert score_run(whole) == metrics
    page = write_report(whole).read_text()
    assert "predicted elsewhere" in page and "training sections not stated" in page and "no leak" in page
    wanted = {"exports": ["csv"], "export_genes": None}
    nothing = dict.fromkeys(("domains", "gene_sets", "neighbours", "against", "labels"))
    analyse(whole, {**wanted, "downstream": {**nothing, "variable_genes": True}})
    assert (whole / "downstream" / "variable_genes.csv").is_file()
    for command in (lambda: export(whole, tmp_path / "m"), lambda: load_model(whole)):
        with pytest.raises(InputError, match="made elsewhere, and no model"):
            command()


@pytest.mark.slow
def test_what_is_not_stated_is_unknown_and_what_is_stated_counts(data, theirs, tmp_path: Path) -> None:
    def items(**stated) -> tuple[dict, dict]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        evaluate(theirs, data, folder, name="x", **stated)
        audit = json.loads((folder / "audit.json").read_text())
        return audit, {item["name"]: item for item in audit["items"]}

    audit, by_name = items()
    assert (audit["leaks"], audit["unknown"]) == (0, 1) and by_name["training_sections_not_stated"]["unknown"]
    audit, by_name = items(trained_on=["A1", "B2"])
    assert (audit["leaks"], audit["unknown"]) == (0, 0) and not by_name["same_patient_in_training"]["leak"]
    audit, by_name = items(trained_on=["A1", "C2"])
    assert audit["leaks"] == 2 and by_name["same_section_in_training"]["leak"]
    with pytest.raises(InputError, match="trained_on: C9 is no section of the data set; there are A1, A2"):
        items(trained_on=["C9"])
    audit, by_name = items(own_panel=True, trained_on=[])
    assert by_name["choice_of_genes_not_stated"]["unknown"] and audit["leaks"] == 0
    audit, by_name = items(own_panel=True, trained_on=[], genes_chosen_on=["C1"])
    assert by_name["panel_saw_test"]["leak"] and audit["unknown"] == 0


def test_missing_spots_and_genes_are_scored_on_what_is_there(data, theirs, whole: Path, tmp_path: Path, caplog) -> None:
    """Scores and floors are those of the same spots and genes, computed the slow way."""
    gone = np.arange(50) % 5 == 0
    metrics = evaluate(theirs[~gone, 3:].copy(), data, tmp_path / "part", name="theirs", scale="target")
    coverage = metrics["elsewhere"]["coverage"]
    assert (coverage["n_spots"], coverage["of_spots"], coverage["n_genes"], coverage["of_genes"]) == (40, 50, 27, 30)
    assert coverage["missing_genes"] == GENES[:3] and "3 genes of the panel are not predicted" in caplog.text
    assert metrics["elsewhere"]["left_over"]["spots_not_predicted"]["n"] == 10 and metrics["n_spots"] == 40

    rows, train = data.rows("test"), data.rows("train", "validation")
    observed, names = data.target[rows], data.spots["section"].to_numpy(str)[rows]
    heg = np.isin(np.arange(30), top_genes(data.target[train].mean(axis=0)))[3:]
    floors = ad.read_h5ad(tmp_path / "part" / "floors.h5ad")
    for key, predicted in (("scores", theirs.X), *((f, floors.layers[f"strict:{f}"]) for f in metrics["floors"])):
        of_sections = [
            score_section(observed[at][:, 3:], np.asarray(predicted)[at][:, 3:], heg)
            for at in ((names == name) & ~gone for name in ("C1", "C2"))
        ]
        scored = metrics["scores"] if key == "scores" else metrics["floors"][key]
        for score in ("pearson_acg", "pearson_heg50", "spearman_acg"):
            assert scored[score] == pytest.approx(mean_over_sections(of_sections)[score]), (key, score)
    page = write_report(tmp_path / "part").read_text()
    assert "40 of 50 test spots and 27 of 30 genes" in page
    evaluate(theirs, data, tmp_path / "all", name="whole")
    table = tabulate_all([read_scored_run(tmp_path / folder) for folder in ("part", "all")])[0]
    assert table.marks == {"theirs": " ‡", "whole": " †"} and "40 of 50 test spots" in markdown(table)
    rows = table.rows.set_index("label")["mse"]
    assert rows["floor: mean (where theirs predicts)"] == pytest.approx(metrics["floors"]["mean"]["mse"])
    assert rows["floor: mean"] == pytest.approx(metrics_of(whole)["floors"]["mean"]["mse"])
    assert metrics["ceiling"] != metrics_of(whole)["ceiling"]


def test_a_partial_folder_is_analysed_on_what_is_there(data, theirs, tmp_path: Path) -> None:
    evaluate(theirs[theirs.obs["section"] == "C1", 1:].copy(), data, tmp_path / "one", name="one")
    assert list(metrics_of(tmp_path / "one")["sections"]) == ["C1"]
    nothing = dict.fromkeys(("domains", "gene_sets", "neighbours", "against", "labels"))
    keys = {"exports": [], "export_genes": None, "downstream": {**nothing, "variable_genes": True}}
    assert analyse(tmp_path / "one", keys)
    assert len(pd.read_csv(tmp_path / "one" / "downstream" / "variable_genes.csv")) == 29


# files


def long_of(theirs: ad.AnnData) -> pd.DataFrame:
    wide = pd.DataFrame(theirs.X, columns=GENES).assign(section=theirs.obs["section"].to_numpy(str))
    return wide.assign(spot=theirs.obs["spot"].to_numpy(str)).melt(["section", "spot"], var_name="gene")


def write_wide(theirs: ad.AnnData, path: Path) -> list[Path]:
    table = pd.DataFrame(theirs.X, columns=GENES)
    table.insert(0, "spot", theirs.obs["spot"].to_numpy(str))
    table.insert(0, "section", theirs.obs["section"].to_numpy(str))
    table.insert(2, "cluster", "tumour")
    table.sample(frac=1, random_state=0).to_csv(path / "wide.csv", index=False, float_format="%.9g")
    return [path / "wide.csv"]


def write_index(theirs: ad.AnnData, path: Path) -> list[Path]:
    index = theirs.obs["section"].astype(str) + ":" + theirs.obs["spot"].astype(str)
    pd.DataFrame(theirs.X, index=index.to_numpy(), columns=GENES).to_csv(
        path / "t.tsv.gz", sep="\t", float_format="%.9g"
    )
    return [path / "t.tsv.gz"]


def write_long(theirs: ad.AnnData, path: Path) -> list[Path]:
    long_of(theirs).rename(columns={"value": "Predicted"}).to_csv(path / "long.csv", index=False, float_format="%.9g")
    return [path / "long.csv"]


def write_parquet(theirs: ad.AnnData, path: Path) -> list[Path]:
    long_of(theirs).to_parquet(path / "long.parquet")
    return [path / "long.parquet"]


def write_sections(theirs: ad.AnnData, path: Path) -> list[Path]:
    for name in ("C1", "C2"):
        part = theirs[theirs.obs["section"] == name]
        table = pd.DataFrame(part.X, index=pd.Index(part.obs["spot"].to_numpy(str), name="barcode"), columns=GENES)
        table.to_parquet(path / f"pred_{name}.parquet")
    return find_files([str(path / "pred_*.parquet")])


def write_layer(theirs: ad.AnnData, path: Path) -> list[Path]:
    adata = theirs.copy()
    adata.layers["imputed"], adata.X = sp.csr_matrix(theirs.X), None
    adata.obs_names = adata.obs.pop("section").astype(str) + ":" + adata.obs.pop("spot").astype(str)
    adata.write_h5ad(path / "layer.h5ad")
    return [path / "layer.h5ad"]


@pytest.mark.parametrize("write", [write_wide, write_index, write_long, write_parquet, write_sections, write_layer])
def test_every_kind_of_file_holds_the_same(write, data, theirs, names, tmp_path: Path) -> None:
    files = write(theirs, tmp_path)
    predicted = read(files, names, "imputed" if write is write_layer else None)
    out = aligned(predicted, data)
    np.testing.assert_array_equal(out.predicted, theirs.X)
    assert out.left_over == {}


def damage(write):
    """A file that does not fit, from a table of predictions."""

    def to_file(theirs: ad.AnnData, path: Path) -> list[Path]:
        made = write(theirs.copy())
        if isinstance(made, ad.AnnData):
            made.write_h5ad(path / "x.h5ad")
            return [path / "x.h5ad"]
        made.to_csv(path / "x.csv", index=made.index.dtype != np.int64)
        return [path / "x.csv"]

    return to_file


def changed(theirs: ad.AnnData, row=slice(None), column=slice(None), value=np.nan) -> ad.AnnData:
    theirs.X[row, column] = value
    return theirs


def with_obs(theirs: ad.AnnData, **columns) -> ad.AnnData:
    theirs.obs = theirs.obs.astype(str).assign(**{key: make(theirs.obs.astype(str)) for key, make in columns.items()})
    return theirs


BAD = {
    "transposed": (lambda a: a.T, "is genes x spots: its rows are genes"),
    "transposed table": (lambda a: pd.DataFrame(a.X.T, index=GENES), "is genes x spots"),
    "wrong sections": (lambda a: with_obs(a, section=lambda o: "X" + o["section"]), "of section XC1.*did you mean C1"),
    "wrong fold": (lambda a: with_obs(a, section=lambda o: "A1", spot=lambda o: o.index), "C1, C2; fold=A would fit"),
    "wrong spots": (lambda a: with_obs(a, spot=lambda o: "s" + o.index), "no spot in common with the data: .* like s0"),
    "twice": (lambda a: ad.concat([a, a[:3]], index_unique="-"), "3 rows are of a spot that has one already"),
    "no section": (lambda a: ad.AnnData(a.X, var=a.var), "nothing says the section of its rows"),
    "infinite": (lambda a: changed(a, 4, 2, np.inf), "1 value of 1 genes at 1 spots .first: gene g02.* is infinite"),
    "infinite outside of the panel": (lambda a: ad.AnnData(
        np.column_stack([a.X, np.full(50, np.inf)]), obs=a.obs, var=pd.DataFrame(index=[*GENES, "q"])),
        "50 values of 1 genes .* gene q.* infinite"),
    "holes": (lambda a: changed(a, slice(4, 6), 2), "2 values of 1 genes at 2 spots .* NaN while others"),
    "nothing": (lambda a: changed(a), "every value .* is NaN"),
    "other genes": (lambda a: ad.AnnData(a.X, obs=a.obs, var=pd.DataFrame(index=[f"q{i}" for i in range(30)])),
                    "none of 30 genes is in the data set: they are called like q0"),
    "other case": (lambda a: ad.AnnData(a.X, obs=a.obs, var=pd.DataFrame(index=[g.upper() for g in GENES])),
                   "30 agree but for case .G00, g00."),
    "words": (lambda a: a.obs.astype(str).assign(g01="high").reset_index(drop=True),
              "50 values of gene g01 are no numbers .first: 'high'"),
    "no numbers": (lambda a: pd.DataFrame({"section": ["C1"], "spot": ["0x0"], "k": ["t"]}), "no column of numbers"),
    "one spot": (lambda a: a[:1].copy(), "1 spot of section C1 is predicted"),
    "long twice": (lambda a: pd.concat([long_of(a), long_of(a)[:2]], ignore_index=True), "2 values are of a spot"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_does_not_fit_is_one_line(name, data, theirs, names, tmp_path: Path) -> None:
    make, says = BAD[name]
    with pytest.raises(InputError, match=says) as caught:
        aligned(read(damage(make)(theirs, tmp_path), names), data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.csv", b"", "x.csv is empty; give an h5ad"),
        ("x.csv", b"section,spot,g00\n", "has 0 rows"),
        ("x.csv", b"section,spot,g00,g00\nC1,0x0,1,2\n", "1 columns occur twice .g00"),
        ("x.csv", b"section,spot,g00\n,0x0,1\n", "1 rows have no section"),
        ("x.csv", b"section,g00,g01\nC1,1,2\nC1,2,1\n", "none says the spot"),
        ("x.csv", b"section,gene,value\nC1,g00,1\n", "none says the spot"),
        ("x.parquet", b"PAR1 no", "cannot be read as parquet"),
        ("x.h5ad", b"\x89HDF", "x.h5ad"),
        ("x.pkl", b"1", "ends in .pkl; give an h5ad"),
    ],
)
def test_a_damaged_file_is_one_line(name, content, says, names, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=says) as caught:
        read([tmp_path / name], names)
    assert "\n" not in str(caught.value)


def test_files_and_layers_that_are_not_there(theirs, names, tmp_path: Path) -> None:
    files = write_layer(theirs, tmp_path)
    with pytest.raises(InputError, match="has no X; layer= names"):
        read(files, names)
    with pytest.raises(InputError, match=r"layer=imputd: .* has the layers imputed; did you mean imputed"):
        read(files, names, "imputd")
    with pytest.raises(InputError, match="is a folder; name files"):
        find_files([str(tmp_path)])
    with pytest.raises(InputError, match="there is no such file"):
        find_files([str(tmp_path / "*.npz")])


def test_a_gene_that_is_nan_throughout_or_lacks_in_a_section_is_not_predicted(data, theirs, names, caplog) -> None:
    adata = changed(changed(theirs.copy(), column=4), (theirs.obs["section"] == "C2").to_numpy(), 7)
    out = aligned(rename_genes(adata, names)[0], data)
    assert np.flatnonzero(~out.panel).tolist() == [4, 7] and out.spots.all()
    assert out.left_over["genes_not_predicted"] == {"n": 2, "examples": ["g04", "g07"]}
    assert "2 genes of the panel are not predicted, and are not scored: g04, g07" in caplog.text


def test_what_is_left_over_is_said(data, theirs, names) -> None:
    others = data.spots[data.spots["section"] == "A1"][["section", "spot"]].reset_index(drop=True)
    lost = pd.DataFrame({"section": ["C1", "Q9"], "spot": ["99x99", "1x1"]})
    obs = pd.concat([theirs.obs.astype(str), others, lost], ignore_index=True)
    X = np.concatenate([theirs.X, np.zeros((len(others) + 2, 30), np.float32)])
    more = ad.AnnData(X, obs=obs.set_axis(obs.index.astype(str)), var=theirs.var)
    out = aligned(rename_genes(more, names)[0], data)
    assert {kind: part["n"] for kind, part in out.left_over.items()} == {
        "rows_of_unknown_sections": 1,
        "rows_not_held_out": 25,
        "rows_without_spot": 1,
    }
    np.testing.assert_array_equal(out.predicted, theirs.X)


def test_barcodes_with_a_suffix_join_those_without() -> None:
    codes = ["AAACCCGGGT", "AAACCCGGTA", "TTTCCCGGGA"]
    spots = pd.DataFrame({"section": "S1", "spot": [f"{code}-1" for code in codes], "role": "test"})
    spots.index = spots["section"] + ":" + spots["spot"]
    X = np.arange(3, dtype=np.float32)[::-1, None]
    obs = pd.DataFrame({"section": "S1", "spot": codes[::-1]}, index=list("abc"))
    out = align(ad.AnnData(X, obs=obs, var=pd.DataFrame(index=["g"])), spots, ["g"], {"S1": "P"}, "P")
    assert out.predicted.ravel().tolist() == [0, 1, 2]


def test_genes_are_matched_by_name_id_and_table(tmp_path: Path) -> None:
    names = DataNames(["S"], ["FASN", "ERBB2", "TP53"], {"ENSG00000169710": "FASN", "ENSG00000141736": "ERBB2"})
    var = pd.DataFrame({"gene_ids": ["", "ENSG00000141736", ""]}, index=["ENSG00000169710.9", "NEU", "LFS1"])
    (tmp_path / "t.csv").write_text("id,symbol\nLFS1,TP53\n")
    adata = ad.AnnData(np.ones((1, 3), np.float32), var=var)
    renamed, n = rename_genes(adata, names, tmp_path / "t.csv")
    assert list(renamed.var_names) == ["FASN", "ERBB2", "TP53"] and n == 3
    assert list(rename_genes(adata, names)[0].var_names) == ["FASN", "ERBB2", "LFS1"]
    twice = ad.AnnData(np.ones((1, 2), np.float32), var=pd.DataFrame(index=["FASN", "ENSG00000169710"]))
    with pytest.raises(InputError, match="FASN and ENSG00000169710 are one gene of the data set, FASN"):
        rename_genes(twice, names)


# scales


@pytest.mark.parametrize("name", SCALES)
def test_a_named_scale_is_mapped_exactly_and_an_unnamed_one_recognised(name, data, names) -> None:
    """The counts themselves, on every scale, become the truth itself: all genes are predicted here."""
    rows = data.rows("test")
    counts, total = data.counts[rows].astype(float), data.spots["total_counts"].to_numpy()[rows]
    values = SCALES[name].of_counts(counts, total).astype(np.float32)
    obs = data.spots.iloc[rows][["section", "spot"]]
    predicted = aligned(ad.AnnData(values, obs=obs, var=pd.DataFrame(index=GENES)), data)
    mapped, facts = put_on_scale(predicted, data, name, None)
    assert facts["errors"] and facts["looks_like"] == ("target" if name == "ln_1p_cp10k" else name)
    np.testing.assert_allclose(mapped, data.target[rows], rtol=1e-3, atol=1e-3)
    unnamed, facts = put_on_scale(predicted, data, None, None)
    assert facts["errors"] is (name == "ln_1p_cp10k")
    np.testing.assert_array_equal(unnamed, values)


def test_the_word_of_a_file_counts_and_that_of_the_user_more(data, theirs) -> None:
    predicted, paper = aligned(theirs, data), Protocol("paper", truth="gene")
    assert put_on_scale(predicted, data, None, data.protocol)[1]["errors"]
    facts = put_on_scale(predicted, data, None, paper)[1]
    assert not facts["errors"] and "on the scale of protocol paper" in facts["statement"]
    assert put_on_scale(predicted, data, "target", paper)[1]["errors"]


def test_z_scores_are_recognised_and_have_no_errors_even_when_named(data, theirs, tmp_path: Path) -> None:
    z = theirs.copy()
    z.X = (z.X - z.X.mean(axis=0)) / z.X.std(axis=0)
    for scale in (None, "zscore"):
        metrics = evaluate(z, data, tmp_path / str(scale), name="z", scale=scale)
        assert metrics["elsewhere"]["scale"]["looks_like"] == "zscore"
        assert metrics["scores"]["mse"] is None and metrics["floors"]["mean"]["mse"] is not None
        assert metrics["scores"]["pearson_acg"] > 0.3
        genes = pd.read_csv(tmp_path / str(scale) / "per_gene.csv")
        assert genes["mse"].isna().all() and genes["pearson"].notna().any()
    assert "z-scores have lost the mean" in write_report(tmp_path / "zscore").read_text()
    with pytest.raises(InputError, match=r"scale=zscores: choose .* did you mean zscore"):
        evaluate(z, data, tmp_path / "no", name="z", scale="zscores")
    assert not (tmp_path / "no").exists()


def test_counts_of_some_genes_have_no_library_and_negative_counts_are_refused(data, theirs, tmp_path: Path) -> None:
    counts = theirs.copy()
    counts.X = data.counts[data.rows("test")]
    part = evaluate(counts[:, 2:].copy(), data, tmp_path / "part", name="c", scale="counts")
    assert (
        part["scores"]["mse"] is None
        and "2 measured genes are not predicted" in part["elsewhere"]["scale"]["statement"]
    )
    negative = changed(counts, 0, 0, -1e6)
    with pytest.raises(InputError, match=r"scale=cp10k: 1 values are below what it has .first: -1e.06 of gene g00"):
        evaluate(negative, data, tmp_path / "no", name="c", scale="cp10k")


def test_counts_are_scaled_by_gene_where_the_protocol_does(theirs, tmp_path: Path) -> None:
    protocol = Protocol("by gene", truth="gene", log="log10", heg="test")
    data = make_data(tmp_path, protocol)
    rows = data.rows("test")
    counts = theirs.copy()
    counts.X = data.counts[rows]
    metrics = evaluate(counts, data, tmp_path / "c", name="c", scale="counts")
    assert metrics["scores"]["mse"] == pytest.approx(0, abs=1e-10)
    at = (data.spots["section"].to_numpy()[rows] == "C1").nonzero()[0]
    expected = normalise(data.counts[rows][at], data.spots["total_counts"].to_numpy()[rows][at], protocol)
    predicted = ad.read_h5ad(tmp_path / "c" / "predictions.h5ad").layers["predicted"]
    np.testing.assert_allclose(predicted[at], expected, rtol=1e-6)
    cpm = evaluate(counts, data, tmp_path / "cpm", name="c", scale="cpm")
    assert cpm["scores"]["mse"] is None and "which cpm does not hold" in cpm["elsewhere"]["scale"]["statement"]


def test_constant_predictions_are_no_skill_and_of_no_scale(data, theirs, tmp_path: Path) -> None:
    metrics = evaluate(changed(theirs.copy(), value=3.0), data, tmp_path / "flat", name="flat")
    assert metrics["scores"]["pearson_acg"] == 0 and metrics["scores"]["mse"] is None
    assert metrics["elsewhere"]["scale"]["looks_like"] is None


@pytest.mark.slow
def test_what_a_file_says_of_its_scale_is_said_of_its_predictions_alone(
    strict: Path, demo: Path, tmp_path: Path
) -> None:
    """Another layer, or an X that was changed, is not covered by it; measured values are no predictions."""
    of_data = [text for text in overrides_of(demo, tmp_path / "x") if not text.startswith(("trainer", "hardware"))]
    cfg = compose("evaluate", [*of_data, "predictions=x", "name=x", "fold=A", "device=cpu"])
    protocol = config.build(cfg.protocol)
    dataset = config.dataset_of(cfg)
    data = dataset.serve(dataset.read_sections(protocol), protocol, "A", 0)
    names = names_of(data.sections)
    own = ad.read_h5ad(strict / "predictions.h5ad")
    own.X = np.expm1(own.X)
    own.write_h5ad(tmp_path / "changed.h5ad")
    own.layers["other"] = np.expm1(own.layers["predicted"])
    own.X = own.layers["predicted"]
    own.write_h5ad(tmp_path / "own.h5ad")
    assert "stexp" in read([tmp_path / "own.h5ad"], names).uns
    for file, layer in (("changed.h5ad", None), ("own.h5ad", "other")):
        predicted = read([tmp_path / file], names, layer)
        assert "stexp" not in predicted.uns
        metrics = evaluate(predicted, data, tmp_path / f"{file}-{layer}", name="x")
        assert not metrics["elsewhere"]["scale"]["errors"] and metrics["scores"]["mse"] is None
        assert metrics["evidence"]["structure"]["ssim"] is None, "maps of another scale"
    for layer in ("counts", "observed"):
        with pytest.raises(InputError, match="is what was measured"):
            read([tmp_path / "own.h5ad"], names, layer)
        own.X = own.layers[layer]
        with pytest.raises(InputError, match=r"X .* is what was measured"):
            evaluate(own, data, tmp_path / "measured", name="x")


def test_a_statement_may_be_one_name_and_never_an_empty_one(data: SpotDataModule, theirs: ad.AnnData, tmp_path) -> None:
    with pytest.raises(InputError, match=r"'' names no section"):
        evaluate(theirs, data, tmp_path / "x", name="x", trained_on="")
    metrics = evaluate(theirs, data, tmp_path / "y", name="y", trained_on="A1")
    assert metrics["elsewhere"]["trained_on"] == ["A1"]


def test_a_spot_column_may_hold_section_and_spot(theirs: ad.AnnData, names: DataNames, tmp_path: Path) -> None:
    table = pd.DataFrame(theirs.X, columns=theirs.var_names)
    table.insert(0, "spot", [f"{a}:{b}" for a, b in zip(theirs.obs["section"], theirs.obs["spot"], strict=True)])
    table.to_csv(tmp_path / "theirs.csv", index=False)
    predicted = read([tmp_path / "theirs.csv"], names)
    assert list(predicted.obs["section"]) == list(theirs.obs["section"])
    assert list(predicted.obs["spot"]) == list(theirs.obs["spot"])


def test_ids_of_genes_are_found_in_memory_as_in_files(theirs: ad.AnnData, names: DataNames) -> None:
    adata = theirs.copy()
    adata.var["Ensembl_ID"] = [f"ENSG{i:011d}" for i in range(30)]
    predicted = predictions_of(adata, names, "theirs")
    assert list(predicted.var["gene_ids"]) == list(adata.var["Ensembl_ID"])
    assert predictions_of(predicted, names, "theirs").var.equals(predicted.var), "once more changes nothing"


def test_the_same_command_again_keeps_gene_sets_of_the_users(data, theirs, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    shutil.copytree(whole, folder)
    scored = score_run(folder, {"mine": GENES[:12]})
    again = evaluate(theirs, data, folder, name="theirs")
    assert again == scored and [each["set"] for each in again["evidence"]["gene_sets"]] == ["mine"]
    changed = ad.read_h5ad(folder / "predictions.h5ad")
    changed.layers["predicted"][0] += 1
    changed.write_h5ad(folder / "predictions.h5ad")
    (row,) = evaluate(theirs, data, folder, name="theirs")["evidence"]["gene_sets"]
    assert row["set"] == "mine" and sorted(row["genes"]) == sorted(GENES[:12])


def test_copies_of_the_test_are_audited(data, theirs, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(data, "copies", [Copy("A1", "C1", 0.9, "counts")])
    metrics = evaluate(theirs, data, tmp_path / "x", name="x", trained_on=["A1"])
    assert metrics["leaks"] == ["copies_in_training"]


def test_sections_of_a_training_are_known_by_content_and_never_by_name(data: SpotDataModule, tmp_path: Path) -> None:
    spots = {section.name: record_spots(count_prints(section.spots.X), None) for section in data.sections[:2]}
    roles = {"train": ["A1"], "validation": ["A2"]}
    record = training_record({"sections": roles, "spots": spots, "from": None})
    renamed = [replace(section, name=f"x{section.name}") for section in data.sections]
    assert sections_of_training(record["trainings"], renamed, {}) == ["xA1", "xA2"]
    others = [make_section(tmp_path, name, seed=77 + i) for i, name in enumerate(("A1", "A2"))]
    assert sections_of_training(record["trainings"], others, {}) == []
    bare = training_record({"sections": roles, "data_manifest": {"A1": {}}})
    assert sections_of_training(bare["trainings"], data.sections, {}) is None, "it left nothing to know it by"
    assert sections_of_training(training_record({})["trainings"], data.sections, {}) is None


def test_another_file_proves_no_other_section(data: SpotDataModule, tmp_path: Path) -> None:
    (tmp_path / "a1.csv").write_text("rows in another order")
    manifest = {"A1": {"a1.csv": file_digest(tmp_path / "a1.csv")}}
    few = {"A1": {"counts": record_spots(count_prints(data.sections[0].spots.X), None)["counts"][:4]}}
    for spots in ({}, few):
        record = training_record({"sections": {"train": ["A1"]}, "data_manifest": manifest, "spots": spots})
        assert sections_of_training(record["trainings"], data.sections[1:], {}) is None
    same = [replace(data.sections[0], name="x", files=(tmp_path / "a1.csv",))]
    assert sections_of_training(record["trainings"], same, {}) == ["x"]


def test_files_that_sections_share_tell_none_of_them(data: SpotDataModule, tmp_path: Path) -> None:
    (tmp_path / "sheet.csv").write_text("name")
    (tmp_path / "own.csv").write_text("1,2")
    shared, own = (file_digest(tmp_path / name) for name in ("sheet.csv", "own.csv"))
    spots = {section.name: record_spots(count_prints(section.spots.X), None) for section in data.sections[:2]}
    files = {"B1": (tmp_path / "sheet.csv",), "B2": (tmp_path / "sheet.csv", tmp_path / "own.csv")}
    sections = [replace(section, files=files.get(section.name, ())) for section in data.sections[2:]]

    def trained(manifest: dict, names: list[str], sections: list = sections) -> list[str] | None:
        facts = {
            "sections": {"train": names},
            "data_manifest": manifest,
            "spots": {name: spots[name] for name in names},
        }
        return sections_of_training(training_record(facts)["trainings"], sections, {})

    manifest = {"A1": {"sheet.csv": shared, "own.csv": own}, "A2": {"sheet.csv": shared}}
    assert trained(manifest, ["A1", "A2"]) == ["B2"]
    # a store has one table: its other region, here or held out there, trained nothing
    assert trained({"A1": {"table": shared}}, ["A1"]) == []
    assert trained({"A1": {"table": shared}, "r2": {"table": shared}}, ["A1"], sections[:1]) == []
