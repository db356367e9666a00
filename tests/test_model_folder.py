"""An exported folder: what is written is read, what is damaged is refused, references normalise as in training."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from stexp.data.genes import normalise
from stexp.errors import InputError
from stexp.inference import model_folder
from stexp.inference.model_folder import ACCURACY, Bank, ExportedModel
from stexp.protocol import Protocol

RNG = np.random.default_rng(0)
GENES = ["NA", "nan", "MT-CO1", *(f"G{i}" for i in range(9))]  # names that a table reads as missing
SECTION = np.repeat(["S2", "S1", "S3"], [20, 15, 11])  # in no alphabetical order


def make_bank(rest: bool = False) -> Bank:
    counts = sp.csr_matrix(RNG.poisson(1.0, (46, len(GENES))) * RNG.choice([1, 300], (46, len(GENES))))
    return Bank(
        embedding=RNG.normal(size=(46, 8)).astype(np.float32),
        section=SECTION,
        patient=np.array([name.replace("S", "P") for name in SECTION]),
        spot=np.array([f"{i}x1" for i in range(46)]),
        counts=counts,
        total_counts=np.asarray(counts.sum(axis=1), dtype=np.float64).ravel() + 100,
        genes=GENES,
        rest=sp.csr_matrix(RNG.poisson(5.0, (3, len(GENES)))) if rest else None,
    )


def write(folder, bank=None, **facts) -> dict:
    """Write a model with the description of one that is kept, but for some facts; returns its weights."""
    kept = json.loads((Path(__file__).parent / "kept" / "mclstexp" / "model.json").read_text())
    kept = {key: value for key, value in kept.items() if key not in ("format", "files", "digest")}
    facts = {**kept, "panel": ["NA"], "sizes": {"n_genes": 1}, **facts}
    genes = pd.DataFrame({"in_panel": True, "expected_floor_name": ""}, index=pd.Index(GENES, name="gene"))
    genes[list(ACCURACY)] = np.nan
    genes.iloc[3, genes.columns.get_loc("expected_pearson")] = 0.25
    weights = {"model.w": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), "model.n": torch.tensor(7)}
    model_folder.write(folder, ExportedModel(facts, weights, bank, genes))
    return weights


@pytest.mark.parametrize("rest", [False, True])
def test_what_is_written_is_read(tmp_path, rest):
    bank = make_bank(rest)
    weights = write(tmp_path / "m", bank, method="x")
    found = model_folder.read(tmp_path / "m")
    assert found.facts["method"] == "x" and found.facts["panel"] == ["NA"]
    assert {key: value.tolist() for key, value in found.weights.items()} == {k: v.tolist() for k, v in weights.items()}
    assert found.bank.spots().index[20] == "S1:20x1"
    for key in ("embedding", "section", "patient", "spot", "total_counts"):
        np.testing.assert_array_equal(getattr(found.bank, key), getattr(bank, key))
    assert (found.bank.counts != bank.counts).nnz == 0 and found.bank.genes == GENES
    assert (found.bank.rest is not None) == rest and (not rest or (found.bank.rest != bank.rest).nnz == 0)
    assert list(found.genes.index) == GENES and found.genes["expected_floor_name"].tolist() == [""] * len(GENES)
    assert found.genes["expected_pearson"].isna().sum() == len(GENES) - 1 and found.genes.iloc[3, 2] == 0.25
    assert {path.suffix for path in (tmp_path / "m").iterdir()} == {".json", ".csv", ".safetensors"}
    assert not [path for path in tmp_path.glob(".*") if path.suffix != ".lock"]


@pytest.mark.parametrize("name", ["model.json", "model.safetensors", "bank.safetensors", "genes.csv"])
def test_a_file_that_is_changed_cut_or_gone_is_refused(tmp_path, name):
    write(tmp_path / "m", make_bank())
    path = tmp_path / "m" / name
    whole = path.read_bytes()
    changed = bytearray(whole)
    where = whole.index(b'"NA"') + 1 if name == "model.json" else len(whole) // 2
    changed[where] ^= 1
    for content in (bytes(changed), whole[:-5], b""):
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"{name} (was changed|is damaged)") as caught:
            model_folder.read(tmp_path / "m")
        assert "\n" not in str(caught.value)
        with pytest.raises(InputError, match=f"{name} (was changed|is damaged)"):
            model_folder.copy(tmp_path / "m", tmp_path / "copy")
        assert not (tmp_path / "copy").exists()
    path.unlink()
    with pytest.raises(InputError, match=f"(lacks|has no) {name}"):
        model_folder.read(tmp_path / "m")


def test_another_format_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(model_folder, "FORMAT", "stexp-model 9")
    write(tmp_path / "m")
    monkeypatch.undo()
    with pytest.raises(InputError, match="is of format 'stexp-model 9', this stexp reads 'stexp-model 2'"):
        model_folder.read(tmp_path / "m")


def test_half_a_folder_is_never_in_its_place(tmp_path, monkeypatch):
    write(tmp_path / "m", run="before")
    digest = model_folder.read(tmp_path / "m").digest

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    for name in ("m", "new"):
        with pytest.raises(OSError, match="No space"):
            write(tmp_path / name, run="after")
    monkeypatch.undo()
    assert model_folder.read(tmp_path / "m").digest == digest and not (tmp_path / "new").exists()
    write(tmp_path / "m", run="after")  # past what the failure left
    assert model_folder.read(tmp_path / "m").facts["run"] == "after"
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith("m")] == ["m"]


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    with pytest.raises(InputError, match="is there and no exported model"):
        write(tmp_path / "thesis")
    assert os.listdir(tmp_path / "thesis") == ["chapter.tex"]


@pytest.mark.parametrize("genes", [GENES, ["G3", "NA"]])
def test_expression_is_that_of_training(genes):
    where = [GENES.index(gene) for gene in genes]
    bank, spot = make_bank(), Protocol("x", log="log10")
    found = bank.expression(genes, spot, GENES[:4])
    expected = np.log10(1 + 1e4 * bank.counts.toarray() / bank.total_counts[:, None])[:, where]
    np.testing.assert_allclose(found, expected, rtol=1e-6)

    panel = bank.counts.toarray()[:, :4].sum(axis=1, keepdims=True)  # the library stays that of the panel
    found = bank.expression(genes, Protocol("x", library="panel"), GENES[:4])
    expected = np.log1p(1e4 * bank.counts.toarray() / np.maximum(panel, 1))[:, where]
    np.testing.assert_allclose(found[panel[:, 0] > 0], expected[panel[:, 0] > 0], rtol=1e-6)


def test_genes_scaled_over_a_section_count_the_spots_that_are_no_references():
    protocol, whole = Protocol("x", truth="gene"), make_bank()
    whole = Bank(**{**vars(whole), "rest": sp.csr_matrix((3, len(GENES)))})
    expected = np.concatenate(
        [
            normalise(whole.counts[name == SECTION].toarray(), np.zeros((name == SECTION).sum()), protocol)
            for name in ("S2", "S1", "S3")
        ]
    )
    np.testing.assert_allclose(whole.expression(GENES, protocol, []), expected, rtol=1e-6)
    rows = np.array([0, 3, 19, 21, 34, 40])
    some = whole.take(rows)
    assert len(some) == 6 and some.section.tolist() == SECTION[rows].tolist()
    np.testing.assert_allclose(some.expression(GENES, protocol, []), expected[rows], rtol=1e-6)
    with pytest.raises(InputError, match="would lose all its references"):
        whole.take(rows[:4])


def test_embeddings_beyond_float16_are_refused(tmp_path):
    bank = make_bank()
    bank.embedding[3, 2] = 1e6
    with pytest.raises(InputError, match="beyond what float16 holds; take bank=float32"):
        model_folder.write(tmp_path / "m", ExportedModel({}, {}, bank, pd.DataFrame(index=GENES)), "float16")


def test_the_digest_tells_models_apart(tmp_path):
    write(tmp_path / "a", seed=1)
    write(tmp_path / "b", seed=2)
    a, b = (model_folder.read(tmp_path / name) for name in "ab")
    assert a.digest != b.digest and a.facts["files"] == b.facts["files"]
    assert json.loads((tmp_path / "a" / "model.json").read_text())["digest"] == a.digest


def test_the_same_model_is_the_same_bytes_and_has_the_same_digest(tmp_path):
    bank = make_bank()
    for name in "abcd":  # four texts of a bank have 24 orders
        write(tmp_path / name, bank)
    assert len({model_folder.read(tmp_path / name).digest for name in "abcd"}) == 1
    assert len({(tmp_path / name / "bank.safetensors").read_bytes() for name in "abcd"}) == 1
