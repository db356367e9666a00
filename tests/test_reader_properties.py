"""Whatever files of a section look like, it is read right or refused in one line."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from fakes import visium as visium_layout
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stexp.data.join import join
from stexp.data.readers import cscc, her2st, samplesheet, visium
from stexp.data.readers.formats import read_counts, read_positions
from stexp.errors import InputError

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
# ids that a table reader may take for numbers, missing values or booleans
IDS = st.one_of(
    st.sampled_from(["007", "7", "7.0", "1e3", "NA", "nan", "None", "TRUE", "0x1", "1x2", "-1", "a b", "é", "inf"]),
    st.from_regex(r"[ACGT]{8}-1", fullmatch=True),
)
UNIQUE_IDS = st.lists(IDS, min_size=1, max_size=8, unique=True)
GENES = ["ACTB", "CD74", "MT-CO1", "nan.", "NA"]


def positions_of(ids: list[str]) -> pd.DataFrame:
    n = np.arange(len(ids))
    return pd.DataFrame(
        {"array_x": n, "array_y": 2 * n, "pixel_x": 10.5 * n + 3, "pixel_y": 7 * n}, index=pd.Index(ids, dtype=object)
    )


def counts_of(ids: list[str], seed: int) -> ad.AnnData:
    values = np.random.default_rng(seed).poisson(1.0, (len(ids), len(GENES)))
    return ad.AnnData(
        sp.csr_matrix(values, dtype=np.float32),
        obs=pd.DataFrame(index=pd.Index(ids, dtype=object)),
        var=pd.DataFrame(index=GENES),
    )


def outcome(call):
    """What `call` returns, or None where it refused in one line; anything else it raises fails the test."""
    try:
        return call()
    except InputError as error:
        assert "\n" not in str(error) and str(error)
        return None


@quick
@given(data=st.data(), seed=st.integers(0, 99))
def test_a_join_keeps_what_both_sides_have_and_refuses_the_rest(data, seed):
    known = st.sampled_from(data.draw(UNIQUE_IDS))
    left, right = data.draw(st.lists(known, min_size=1, max_size=9)), data.draw(st.lists(known, min_size=1, max_size=9))
    counts, positions = counts_of(left, seed), positions_of(right)
    joined = outcome(lambda: join(counts, positions, "section"))
    both = [name for name in left if name in right]
    if len(set(left)) < len(left) or len(set(right)) < len(right) or 2 * len(both) <= max(len(left), len(right)):
        assert joined is None
        return
    assert list(joined.obs_names) == both
    for i, name in enumerate(both):
        np.testing.assert_array_equal(joined.X[i].toarray()[0], counts.X[left.index(name)].toarray()[0])
        np.testing.assert_array_equal(joined.obsm["spatial"][i], positions.loc[name, ["pixel_x", "pixel_y"]])


@st.composite
def sections(draw):
    """Ids of counts and positions, and how their files are written."""
    pool = draw(UNIQUE_IDS)
    some = st.lists(st.sampled_from(pool), min_size=1, max_size=len(pool), unique=True)
    return {
        "counts": draw(some),
        "positions": draw(some),
        "seed": draw(st.integers(0, 99)),
        "ending": draw(st.sampled_from([".csv", ".tsv", ".csv.gz", ".tsv.gz"])),
        "turned": draw(st.booleans()),
        "quoting": draw(st.sampled_from([0, 1, 2])),
        "kind": draw(st.sampled_from(["int", "float", "text"])),
        "newline": draw(st.sampled_from(["\n", "\r\n"])),
        "mark": draw(st.booleans()),
    }


def write_table(path: Path, table: pd.DataFrame, how: dict) -> None:
    separator = "," if ".csv" in path.name else "\t"
    text = table.to_csv(sep=separator, quoting=how["quoting"], lineterminator=how["newline"])
    content = text.encode("utf-8-sig" if how["mark"] else "utf-8")
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@quick
@given(how=sections())
def test_a_table_means_the_same_however_it_is_written(how):
    counts, positions = counts_of(how["counts"], how["seed"]), positions_of(how["positions"])
    both = [name for name in how["counts"] if name in how["positions"]]
    table = pd.DataFrame(counts.X.toarray().astype(int), counts.obs_names, GENES)
    if how["kind"] != "int":
        table = table.astype(float)  # 3 is written 3.0
    if how["kind"] == "text":
        table = table.astype(int).astype(object)
    with TemporaryDirectory() as folder:
        root = Path(folder)
        write_table(root / f"counts{how['ending']}", table.T if how["turned"] else table, how)
        write_table(root / f"spots{how['ending']}", positions.astype(float if how["kind"] == "float" else object), how)
        (root / "sheet.csv").write_text(
            f"section,patient,counts,spots\nS1,P1,counts{how['ending']},spots{how['ending']}\n"
        )
        found = outcome(lambda: samplesheet.read_samplesheet(root / "sheet.csv"))
    if 2 * len(both) <= max(len(how["counts"]), len(how["positions"])) or "NA" in how["positions"]:
        assert found is None
        return
    (section,) = found
    assert list(section.spots.obs_names) == both and list(section.genes) == GENES
    np.testing.assert_array_equal(section.counts(GENES), table.loc[both].astype(float))
    np.testing.assert_array_equal(section.xy_px, positions.loc[both, ["pixel_x", "pixel_y"]])
    np.testing.assert_array_equal(section.array_xy, positions.loc[both, ["array_x", "array_y"]])


GOOD = {
    "sheet.csv": "section,patient,counts,spots,um_per_px\nS1,P1,c.tsv,s.csv,0.5\n",
    "c.tsv": "\tACTB\tCD74\nA\t1\t0\nB\t2\t3\n",
    "s.csv": "id,array_x,array_y,pixel_x,pixel_y\nA,0,0,5,6\nB,1,0,9,6\n",
}


@quick
@given(
    file=st.sampled_from(list(GOOD)),
    at=st.integers(0, 80),
    remove=st.integers(0, 20),
    put=st.one_of(st.text("\t,;\n\r\"'AB.1-eN\x00é ", max_size=4), st.just(None)),
)
def test_a_damaged_file_is_refused_or_read_as_a_section(file, at, remove, put):
    with TemporaryDirectory() as folder:
        root = Path(folder)
        for name, text in GOOD.items():
            if name == file:
                text = None if put is None else text[:at] + put + text[at + remove :]
            if text is not None:
                (root / name).write_bytes(text.encode())
        found = outcome(lambda: samplesheet.read_samplesheet(root / "sheet.csv"))
    if put is None:
        assert found is None
    elif found is not None:
        for section in found:
            # whatever was read is spots of both files with whole counts
            assert 1 <= len(section) <= 3 and section.counts(section.genes).min() >= 0
            assert (section.counts(section.genes) % 1 == 0).all()


@quick
@given(content=st.binary(max_size=200), ending=st.sampled_from([".csv", ".tsv.gz", ".h5ad", ".h5", ".parquet", ".txt"]))
def test_bytes_of_any_kind_are_refused_in_one_line(content, ending):
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"file{ending}"
        path.write_bytes(content)
        counts = outcome(lambda: read_counts(path))
        positions = outcome(lambda: read_positions(path))
    if ending in (".h5ad", ".h5", ".parquet", ".txt"):
        assert counts is None and positions is None


@quick
@given(
    missing=st.sets(st.sampled_from(["stdata", "selection", "image"])),
    order=st.permutations(range(6)),
    dropped=st.sets(st.integers(0, 5), max_size=6),
    as_float=st.booleans(),
)
def test_legacy_sections_are_joined_by_coordinates_or_refused(missing, order, dropped, as_float):
    x, y = np.array([2, 4, 3, 5, 2, 4]), np.array([2, 2, 3, 3, 4, 4])
    ids = [f"{a}x{b}" for a, b in zip(x, y, strict=True)]
    values = np.arange(12).reshape(6, 2)
    counts = pd.DataFrame(values, ids, ["ACTB", "CD74"]).iloc[list(order)]
    spots = pd.DataFrame({"x": x, "y": y, "new_x": x + 0.01, "new_y": y, "pixel_x": 30 * x, "pixel_y": 30 * y})
    spots = spots.astype(float) if as_float else spots
    kept = [i for i in range(6) if i not in dropped]
    with TemporaryDirectory() as folder:
        root, her2 = Path(folder) / "cscc", Path(folder) / "her2st"
        for place in (root, her2 / "ST-cnts", her2 / "ST-spotfiles"):
            place.mkdir(parents=True)
        if "stdata" not in missing:
            counts.to_csv(root / "GSM1_P2_ST_rep1_stdata.tsv", sep="\t")
            counts.to_csv(her2 / "ST-cnts" / "B1.tsv", sep="\t")
        if "selection" not in missing:
            spots.iloc[kept].to_csv(root / "GSM1_spot_data-selection-P2_ST_rep1.tsv", sep="\t", index=False)
            spots.iloc[kept].to_csv(her2 / "ST-spotfiles" / "B1_selection.tsv", sep="\t", index=False)
        results = [outcome(lambda: cscc.read_cscc(root, cache_dir=folder)), outcome(lambda: her2st.read_her2st(her2))]
    # counts of cSCC cover the whole array, those of HER2+ the tissue: there half of them must not be left over
    for found, step_um, least in zip(results, (100, 200), (1, 4), strict=True):
        if {"stdata", "selection"} & missing or len(kept) < least:
            assert found is None
            continue
        (section,) = found
        assert list(section.spots.obs_names) == [ids[i] for i in order if i in kept]
        np.testing.assert_array_equal(section.counts(["ACTB", "CD74"]), values[[i for i in order if i in kept]])
        line = len(set(x[kept])) < 2 or len(set(y[kept])) < 2
        assert section.um_per_px is None if line else abs(section.um_per_px - step_um / 30) < 0.02


@settings(quick, max_examples=40)
@given(
    version=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 99),
    kept=st.integers(1, 34),
    twice=st.booleans(),
    missing=st.sampled_from([None, "matrix", "positions", "factors", "image"]),
)
def test_spaceranger_folders_are_joined_by_barcode_or_refused(version, seed, kept, twice, missing):
    with TemporaryDirectory() as name:
        folder = Path(name) / "s"
        counts, positions = visium_layout.write_section(folder, version, seed)
        rows = positions.sample(frac=1, random_state=seed)
        outside = rows["in_tissue"].to_numpy() == 0
        inside = rows[~outside].assign(in_tissue=[1] * kept + [0] * (int((~outside).sum()) - kept))
        rows = pd.concat([rows[outside], inside, inside[:1]] if twice else [rows[outside], inside])
        written = {
            1: lambda: rows.to_csv(folder / "spatial/tissue_positions_list.csv", index=False, header=False),
            2: lambda: rows.to_csv(folder / "spatial/tissue_positions.csv", index=False),
            3: lambda: rows.to_parquet(folder / "spatial/tissue_positions.parquet", index=False),
        }
        written[version]()
        gone = {"matrix": "*matrix*", "positions": "spatial/tissue_positions*", "factors": "spatial/*.json"}
        for path in folder.glob(gone.get(missing, "image.*")) if missing else []:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        read = outcome(lambda: visium.read_visium(folder))
        if twice or missing in ("matrix", "positions"):
            assert read is None
        elif read is not None:
            (section,) = read
            assert sorted(section.spots.obs_names) == sorted(inside["barcode"][:kept])
            place = positions.set_index("barcode").loc[section.spots.obs_names]
            scale = visium_layout.HIRES if missing == "image" else 1
            pixels = place[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy() * scale
            np.testing.assert_allclose(section.xy_px, pixels)
            np.testing.assert_array_equal(section.counts(counts.columns), counts.loc[section.spots.obs_names])
        else:
            assert missing in ("factors", "image")
