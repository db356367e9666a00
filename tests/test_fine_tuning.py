"""A training that begins at a trained model: what is carried over gene by gene, what is said, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from demo_run import configure
from exported_model import SHORT, exported, finished_run, root

import stexp
from stexp import config
from stexp.api.features import frozen_encoder, machine_of
from stexp.cli.fold import train
from stexp.construct import build
from stexp.data.digests import file_digest
from stexp.errors import InputError
from stexp.evaluation import predictions
from stexp.inference import model_folder
from stexp.inference.base import Base, check_data, check_method, read_base
from stexp.inference.carried import CarriedWeights, check_features
from stexp.inference.description import without_weights
from stexp.inference.export import export

BEFORE = 12  # rows of the base's table of positions


def node_of(method: str, *overrides: str) -> dict:
    return config.to_plain(configure(Path("unused"), Path("unused"), f"model={method}", *overrides))["model"]


def make(node: dict, n_genes: int, n_positions: int, n_features: int, seed: int):
    torch.manual_seed(seed)
    arguments = {key: value for key, value in node.items() if key != "name"}
    return build(arguments, n_genes=n_genes, n_positions=n_positions, n_features=n_features)


def base_of(method: str, panel: list[str], data, n_features: int = 8, n_positions: int = BEFORE) -> Base:
    node = node_of(method)
    weights = make(node, len(panel), n_positions, n_features, seed=1).state_dict()
    node = {key: value for key, value in node.items() if key != "name"}
    record = {"model": "m", "digest": "d", "data_manifest": {}, "sections": {}, "looks": {}, "from": None}
    tile = (data.tile.px, data.tile.um)
    return Base("m", method, node, panel, weights, None, None, tile, data.stain, data.protocol, record)


@pytest.fixture
def panels(data) -> tuple[list[str], list[str]]:
    """Of the base: all but three of ours, turned around, and two that we lack; and ours."""
    return [*data.panel[3:][::-1], "GONE1", "GONE2"], data.panel


def carried(method: str, data, panel: list[str], **changes):
    base = base_of(method, panel, data, **changes)
    node = node_of(method)
    own = make(node, len(data.panel), data.array_size, 8, seed=2)
    fresh = {key: value.clone() for key, value in own.state_dict().items()}
    return base, own, fresh, CarriedWeights(base, own, node, data)


def test_heads_are_carried_over_gene_by_gene(data, panels):
    before, now = panels
    base, own, fresh, made = carried("stnet", data, before)
    assert made.new == now[:3] and made.gone == ["GONE1", "GONE2"]
    for i, gene in enumerate(now):
        old = base.weights["head.weight"][before.index(gene)] if gene in before else fresh["head.weight"][i]
        assert torch.equal(own.head.weight[i], old)
    for key, value in own.state_dict().items():
        if not key.startswith("head."):
            assert torch.equal(value, base.weights[key])


def test_both_axes_of_a_weight_among_genes_and_positions_are_carried_over(data, panels):
    before, now = panels
    base, own, fresh, _ = carried("mclstexp", data, before)
    key = "spot_encoder.blocks.0.ff.0.weight"
    got = own.state_dict()[key]
    for i, one in enumerate(now):
        for j, other in enumerate(now):
            known = one in before and other in before
            old = base.weights[key][before.index(one), before.index(other)] if known else fresh[key][i, j]
            assert got[i, j] == old
    table, n = "spot_encoder.x_embed.weight", min(BEFORE, data.array_size)
    gene = now[5]
    assert torch.equal(own.state_dict()[table][:n, 5], base.weights[table][:n, before.index(gene)])
    assert torch.equal(own.state_dict()[table][n:], fresh[table][n:])


def test_all_that_no_gene_stands_for_is_kept(data, panels):
    base, own, _, _ = carried("bleep", data, panels[0])
    same = [key for key, value in own.state_dict().items() if value.shape == base.weights[key].shape]
    assert len(same) > 50 and all(torch.equal(own.state_dict()[key], base.weights[key]) for key in same)


def test_a_method_with_the_same_panel_is_the_base(data):
    base, own, _, made = carried("mclstexp", data, data.panel, n_positions=data.array_size)
    assert made.new == made.gone == []
    assert all(torch.equal(value, base.weights[key]) for key, value in own.state_dict().items())


def test_weights_come_back_behind_the_start_from_the_data(data, panels):
    base, own, _, made = carried("stnet", data, panels[0])
    own.start_from(data)
    mean = own.head.bias.detach().clone()
    made.on_train_start(type("Trainer", (), {"ckpt_path": None})(), own)
    assert torch.equal(own.head.bias[:3], mean[:3]), "new genes begin at their mean"
    assert torch.equal(own.head.bias[3], base.weights["head.bias"][panels[0].index(data.panel[3])])
    own.head.bias.data.zero_()
    made.on_train_start(type("Trainer", (), {"ckpt_path": "last.ckpt"})(), own)
    assert not own.head.bias.any(), "a resumed training has its weights"


def test_what_does_not_fit_is_refused_with_what_would(data, panels):
    def refused(pattern: str, base: Base, *overrides: str) -> None:
        node = node_of("mclstexp", *overrides)
        own = make(node, len(data.panel), data.array_size, 8, seed=2)
        with pytest.raises(InputError, match=pattern) as error:
            CarriedWeights(base, own, node, data)
        assert "\n" not in str(error.value)

    base = base_of("mclstexp", panels[0], data)
    refused(
        r"tensors do not fit \(.*: 256 x .*, here 128 x .*\); model.embedding_dim=256 would fit",
        base,
        "model.embedding_dim=128",
    )
    refused(r"image_encoder.name=test_resnet", base, "image_encoder.name=test_vit", "image_encoder.input_size=64")
    refused(r"none of its 2 genes \(like X\) is in the panel", base_of("mclstexp", ["X", "Y"], data))
    other = {**base.node, "image_encoder": {**base.node["image_encoder"], "mean": [0.0, 0.0, 0.0]}}
    refused(r"image_encoder.mean was \[0.0, 0.0, 0.0\]", replace(base, node=other))
    with pytest.raises(InputError, match=r"its method is mclstexp, not stnet; model=mclstexp would fit"):
        check_method(base, node_of("stnet"))
    for method in ("hest_ridge", "sepal", "mean"):
        node = node_of(method)
        with pytest.raises(InputError, match=r"is fitted anew to all its data"):
            check_method(replace(base, method=method, node=node), node)


def test_a_model_that_saw_what_is_held_out_is_refused(data, caplog):
    def base(seen: dict, protocol=data.protocol) -> Base:
        one = base_of("stnet", data.panel, data)
        return replace(one, record={**one.record, **seen}, protocol=protocol)

    held_out, by_name = data.names("test")[0], {section.name: section for section in data.sections}

    def manifest(name: str) -> dict:
        files = {"image": file_digest(by_name[name].image.path)}
        return {"data_manifest": {"theirs": files}, "sections": {"train": ["theirs"]}}

    by_name = {name: replace(section, files=(section.image.path,)) for name, section in by_name.items()}
    sections, data.sections = data.sections, list(by_name.values())
    try:
        with pytest.raises(InputError, match=rf"trained on {held_out} \(by its files\), and fold=.* a patient of them"):
            check_data(base(manifest(held_out)), data)
        with pytest.raises(InputError, match=r"by its files"):
            check_data(base({"from": manifest(held_out)}), data)  # the model that it began at itself
        check_data(base(manifest(data.names("train")[0])), data)
        table = by_name[held_out].image.path  # of a store, which each of its regions has among its files
        data.sections = [replace(section, files=(table,)) for section in data.sections]
        check_data(base(manifest(held_out)), data)
        data.sections = list(by_name.values())
        assert not caplog.text
        check_data(base(manifest(data.names("validation")[0])), data)
        assert "now validate" in caplog.text
        caplog.clear()
        check_data(base({}, replace(data.protocol, log="log10")), data)
        assert "scale of the expression was" in caplog.text
        check_data(base({"data_manifest": [], "sections": 3, "looks": {"a": 1}, "from": "x"}), data)  # of anyone
    finally:
        data.sections = sections


def tuned(out: Path, source: Path, *overrides: str, fold: str = "A") -> dict:
    arguments = [*SHORT[:3], f"from={source}", "trainer.max_epochs=1", *overrides]
    cfg = configure(root(), out, *arguments)
    sections = config.dataset_of(cfg).read_sections(config.build(cfg.protocol))
    return train(cfg, sections, fold, out)


@pytest.fixture(scope="module")
def still(tmp_path_factory) -> Path:
    """A run that begins at the exported model and hardly moves away from it."""
    out = tmp_path_factory.mktemp("tuned") / "run"
    tuned(out, exported(), "model.lr=1e-12", "model.weight_decay=0", "image_encoder.frozen_norm=true")
    return out


@pytest.mark.slow
def test_a_run_that_does_not_move_predicts_as_the_model_it_began_at(still):
    before, after = (predictions.read(run / "predictions.h5ad") for run in (finished_run(), still))
    assert list(before.var_names) == list(after.var_names)
    np.testing.assert_allclose(after.layers["predicted"], before.layers["predicted"], atol=1e-4)


def test_the_run_says_what_it_began_at(still, tmp_path):
    digest = model_folder.read(exported()).digest
    audit = json.loads((still / "audit.json").read_text())
    assert audit["leaks"] == 0 and audit["items"][-1]["name"] == "base_saw_test"
    assert "saw no file" in audit["items"][-1]["detail"]
    stated = json.loads((still / "provenance.json").read_text())["from"]
    assert stated["digest"] == digest and stated["new_genes"] == stated["gone_genes"] == []
    assert yaml.safe_load((still / "config.yaml").read_text())["from"] == {"model": str(exported()), "digest": digest}
    shutil.copytree(exported(), tmp_path / "moved.stexp")
    options = ("model.lr=1e-12", "model.weight_decay=0", "image_encoder.frozen_norm=true")
    tuned(still, tmp_path / "moved.stexp", *options)  # the same model elsewhere: the run is finished
    with pytest.raises(InputError, match=r"another config \(from"):
        tuned(still, finished_run(), *options)


def test_a_model_of_a_model_knows_what_both_were_trained_on(still, tmp_path):
    facts = export(still, tmp_path / "m")
    assert facts["trained"]["from"]["data_manifest"].keys() == {"A1", "B1", "C1"}
    with pytest.raises(InputError, match=r"trained on B1 \(by its files\), and fold=B holds out"):
        tuned(tmp_path / "run", tmp_path / "m", fold="B")


def test_a_base_is_read_from_all_that_holds_one(tmp_path):
    model, run = read_base(exported()), read_base(finished_run())
    assert model.panel == run.panel and model.tile == run.tile and model.protocol == run.protocol
    assert all(torch.equal(value, run.weights[key]) for key, value in model.weights.items())
    assert model.node["image_encoder"] == run.node["image_encoder"]
    assert run.record["sections"]["train"] == model.record["sections"]["train"]
    for source in (tmp_path / "none", "nothing"):
        with pytest.raises(InputError, match=r"no such folder; a model of stexp-export, a run, or owner/name"):
            read_base(source)
    with pytest.raises(InputError, match="no exported model"):
        read_base(tmp_path)


def test_frozen_features_are_those_of_the_base_or_refused(data, panels):
    """TRIPLEX reads them; with random weights they are those of a seed."""
    cfg = config.to_plain(configure(root(), root() / "unused", "model=triplex", "seed=3"))
    encoder = frozen_encoder(cfg, machine_of(cfg))
    width, (before, now) = encoder.num_features, panels
    base = base_of("triplex", before, data, n_features=width)
    base = replace(base, encoder=(cfg["image_encoder"], None), seed=3)
    served = SimpleNamespace(encoder=encoder, panel=now, array_size=data.array_size, n_features=width)
    own = make(cfg["model"], len(now), data.array_size, width, seed=2)
    CarriedWeights(base, own, cfg["model"], served)
    for head in ("fused", "whole"):
        row = own.state_dict()[f"heads.{head}.weight"][now.index(before[0])]
        assert torch.equal(row, base.weights[f"heads.{head}.weight"][0])

    weights = {f"features.{key}": value for key, value in encoder.encoder.state_dict().items()}
    exported_encoder = without_weights(cfg["image_encoder"], encoder.encoder)
    check_features(replace(base, encoder=(exported_encoder, weights)), served)
    other = {key: value + 1 if value.is_floating_point() else value for key, value in weights.items()}
    for changed in ({"seed": 4}, {"encoder": (exported_encoder, other)}):
        with pytest.raises(InputError, match=r"frozen features of test_resnet at other weights .*the same seed"):
            check_features(replace(base, **changed), served)


def test_fit_begins_at_a_model_as_the_command_does(tmp_path):
    sections = stexp.datasets.demo(root() / "data", patients=3, sections_per_patient=1)
    data = stexp.SpotDataModule(sections, fold="B", cache_dir=root() / "cache")
    for method, fits in (("stnet", "model=mclstexp would fit"), ("mclstexp", r"trained on B1 \(by its files\)")):
        with pytest.raises(InputError, match=fits):
            stexp.fit(method, data, begin_at=exported(), accelerator="cpu", threads=1)
    own = make(node_of("stnet"), len(data.panel), data.array_size, 8, seed=0)
    with pytest.raises(InputError, match="given as an object brings its own weights"):
        stexp.fit(own, data, begin_at=exported(), accelerator="cpu", threads=1)
