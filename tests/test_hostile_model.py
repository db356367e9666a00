"""A model folder from a stranger, its checksums right: refused in one line; nothing is run, written or fetched."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image
from safetensors import safe_open

from stexp import load_model
from stexp.errors import InputError

KEPT = Path(__file__).parent / "kept"
ENCODER = "stexp.models.encoders.image.ImageEncoder"


def seal(folder: Path, facts: dict) -> Path:
    """Give a folder the checksums of what it holds."""
    facts["files"] = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name != "model.json"
    }
    facts.pop("digest", None)
    facts["digest"] = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    (folder / "model.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture
def model(tmp_path, monkeypatch) -> tuple[Path, dict]:
    """A copy of a kept model and its facts; no socket can be opened."""

    def refuse(*_, **__):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    folder = tmp_path / "m"
    shutil.copytree(KEPT / "mclstexp", folder)
    return folder, json.loads((folder / "model.json").read_text())


def refused(folder: Path, match: str) -> None:
    before = {path for path in folder.parent.rglob("*")}
    with pytest.raises(InputError, match=match) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert {path for path in folder.parent.rglob("*")} == before


def test_what_is_sealed_again_unchanged_loads(model):
    assert load_model(seal(*model)).panel


@pytest.mark.parametrize(
    "target",
    [
        "stexp.data.readers.demo.read",
        "stexp.training.loggers.WandbRun",
        "stexp.sweeps.launching.Launcher",
        "pytorch_lightning.loggers.CSVLogger",
        "pytorch_lightning.callbacks.ModelCheckpoint",
        "stexp.models.retrieval.ReferenceIndex",
        "stexp.models.encoders.weights.timm.create_model",
        "stexp.models.encoders.weights.torch.load",
        "stexp.models.mclstexp.MclSTExp.from_authors",
        "os.system",
        7,
        None,
        {"_target_": "os.system"},
    ],
)
@pytest.mark.parametrize("place", ["method", "encoder", "argument", "deep"])
def test_only_methods_and_encoders_are_built(model, target, place):
    folder, facts = model
    node = {"_target_": target, "root": str(folder.parent / "WRITTEN")}
    if place == "method":
        facts["model"] = node
    elif place == "encoder":
        facts["model"]["image_encoder"] = node
    elif place == "argument":
        facts["model"]["lr"] = node
    else:
        facts["model"]["image_encoder"]["card"] = {"dim": [node]}
    refused(seal(folder, facts), "which is no (method|encoder) of stexp")


def test_a_method_is_no_encoder_and_an_encoder_no_method(model):
    folder, facts = model
    encoder, facts["model"]["image_encoder"] = facts["model"]["image_encoder"], dict(facts["model"])
    refused(seal(folder, facts), "which is no encoder")
    facts["model"] = encoder | {"_target_": ENCODER}
    refused(seal(folder, facts), "which is no method")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"pretrained": True}, "names weights outside of its folder"),
        ({"checkpoint": "evil.pth"}, "names weights outside of its folder"),
        ({"model_args": {"checkpoint_path": "evil.pth"}}, "checkpoint_path is not taken"),
        ({"model_args": {"pretrained": True}}, "pretrained is not taken"),
        ({"model_args": {"pretrained_cfg": {"url": "http://x"}}}, "pretrained_cfg is not taken"),
        ({"name": "hf-hub:x/y"}, "timm has no model"),
        ({"download": True}, "takes no key 'download'"),
        ({"mirror": "http://x"}, "takes no key 'mirror'"),
    ],
)
def test_nothing_is_fetched(model, arguments, match):
    folder, facts = model
    facts["model"]["image_encoder"] |= arguments
    refused(seal(folder, facts), match)


def test_a_hub_of_an_encoder_is_not_asked(model):
    folder, facts = model
    facts["model"]["image_encoder"] |= {"hub": "owner/name", "hub_file": "x.bin"}
    load_model(seal(folder, facts))  # older exports keep where the weights were from


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("tile.px", 0),
        ("tile.px", 10**9),
        ("tile.px", float("nan")),
        ("tile.px", 64.5),
        ("tile.um", float("nan")),
        ("tile.um", 0),
        ("tile.um", "120"),
        ("tile.um_per_px", [1.25]),
        ("k", -3),
        ("k", 10**30),
        ("k", None),
        ("k", "5"),
        ("panel", []),
        ("panel", ["FAT01", "FAT01"]),
        ("panel", [1, 2]),
        ("panel", ["NOWHERE"]),
        ("sizes.n_genes", 19),
        ("sizes.n_positions", 10**12),
        ("protocol.truth", "x"),
        ("protocol.colour", "x"),
        ("protocol", None),
        ("stain", {"method": "macenko", "target": {"glass": [1, 2]}}),
        ("stain", {"method": "x"}),
        ("interval.spread", 3),
        ("interval", {"alpha": 0.1}),
        ("known_tiles.limit", float("inf")),
        ("known_tiles", None),
        ("looks", {}),
        ("looks", {"B1": {"tissue": float("nan")}}),
        ("precision", None),
        ("channels_last", "yes"),
        ("expected", []),
        ("expected", -0.5),
        ("expected.flags", {"patients": 3}),
        ("trained.sections.train", -1),
        ("trained.data_manifest", 1.5),
        ("trained.data_manifest.B1", 0),
        ("trained.sections", None),
        ("looks.B1.stains", [[2**70, 0, 0], [1, 0, 0]]),
        ("looks.B1.thumbnail", {}),
        ("interval.coverage_by_group", {"A": True}),
        ("licences.data", None),
        ("reference_tiles", {"a": 1}),
        ("reproduces", None),
        ("trained", "x"),
        ("method", ["x"]),
        ("model.embedding_dim", 10**9),
        ("model.embedding_dim", 10**30),
        ("model.depth", 10**8),
        ("model.heads", 0),
        ("model.head_dim", 2**40),
        ("model.distance", "l7"),
        ("model.dropout", float("nan")),
        ("model.image_encoder.input_size", 10**7),
        ("model.image_encoder.model_args", {"channels": [8, 12, 12, 10**9]}),
        ("features_by", {"_target_": ENCODER, "name": "test_resnet"}),
    ],
)
def test_values_that_no_export_writes_are_refused(model, path, value):
    folder, facts = model
    *parents, key = path.split(".")
    part = facts
    for name in parents:
        part = part[name]
    part[key] = value
    refused(seal(folder, facts), ".")


def rewrite(folder: Path, name: str, change) -> None:
    path = folder / name
    with safe_open(path, "np") as file:
        texts = file.metadata()
    arrays = dict(safetensors.numpy.load_file(path))
    change(arrays, texts)
    safetensors.numpy.save_file(arrays, path, metadata=texts)


def fill(key: str, value: float):
    def change(arrays, texts):
        arrays[key] = arrays[key].copy()
        arrays[key].flat[3] = value

    return change


def replaced(key: str, make):
    def change(arrays, texts):
        arrays[key] = make(arrays[key])

    return change


def named(key: str, make):
    def change(arrays, texts):
        texts[key] = json.dumps(make(json.loads(texts[key])))

    return change


def drop_a_weight(arrays, texts):
    del arrays[next(key for key in arrays if key.endswith("weight"))]


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("bank.safetensors", fill("embedding", np.nan), "embedding holds values that are no finite"),
        ("bank.safetensors", fill("total_counts", np.inf), "total_counts holds values that are no finite"),
        ("bank.safetensors", fill("total_counts", -1), "below 0"),
        ("bank.safetensors", fill("section", 9), "section has codes"),
        ("bank.safetensors", fill("patient", -1), "patient has codes"),
        ("bank.safetensors", fill("counts.indices", 250), "genes beyond"),
        ("bank.safetensors", fill("counts.indptr", 0), "no matrix"),
        ("bank.safetensors", replaced("counts.data", lambda x: x[:-1]), "no matrix"),
        ("bank.safetensors", replaced("embedding", lambda x: x[:-1]), "spots, embedding of"),
        ("bank.safetensors", replaced("embedding", lambda x: x[:, :5].copy()), "references in 5"),
        ("bank.safetensors", replaced("embedding", lambda x: x.astype(np.int64)), "embedding is of type I64"),
        ("bank.safetensors", replaced("section", lambda x: x[None]), "section is of type"),
        ("bank.safetensors", named("genes", lambda x: x[:-1] + x[:1]), "names a gene twice"),
        ("bank.safetensors", named("genes", lambda x: x[:-1]), "genes beyond|no matrix|named and not predicted"),
        ("bank.safetensors", named("genes", lambda x: [[name] for name in x]), "no list of names"),
        ("bank.safetensors", named("spot", lambda x: x[:-1]), "names .* spots"),
        ("bank.safetensors", named("section", lambda x: ["x" * 10**6]), "no list of names"),
        ("known.safetensors", fill("embedding", np.nan), "no finite"),
        ("known.safetensors", fill("distance", 9), "do not ascend"),
        ("known.safetensors", replaced("k", lambda x: np.array(10**9)), "nearest"),
        ("known.safetensors", replaced("embedding", lambda x: x[:, :5].copy()), "known ones in 5"),
        (
            "model.safetensors",
            lambda arrays, _: arrays.pop(next(key for key in arrays if key.endswith("weight"))),
            "do not fit",
        ),
        (
            "model.safetensors",
            lambda arrays, _: arrays.update({key: np.full_like(value, np.nan) for key, value in arrays.items()}),
            "no finite",
        ),
    ],
)
def test_arrays_that_do_not_fit_each_other_are_refused(model, name, change, match):
    folder, facts = model
    rewrite(folder, name, change)
    refused(seal(folder, facts), match)


@pytest.mark.parametrize("name", ["model.safetensors", "bank.safetensors", "known.safetensors"])
def test_headers_that_claim_more_than_the_file_are_refused(model, name):
    folder, facts = model
    header = json.dumps({"embedding": {"dtype": "F32", "shape": [2**31, 2**20], "data_offsets": [0, 2**53]}}).encode()
    for data in (len(header).to_bytes(8, "little") + header, (2**62).to_bytes(8, "little") + header, b""):
        (folder / name).write_bytes(data)
        refused(seal(folder, facts), "is damaged")


@pytest.mark.slow
def test_an_image_bomb_is_not_decoded(model):
    folder, facts = model
    Image.new("L", (30_000, 30_000)).save(folder / "references.jpg")
    refused(seal(folder, facts), "references.jpg is damaged")
    Image.new("RGB", (1536, 96)).save(folder / "references.jpg", "PNG")
    refused(seal(folder, facts), "references.jpg is damaged")


def test_json_without_end_is_refused(model):
    folder, facts = model
    text = json.dumps(facts)
    for deep in ("[" * 100_000 + "]" * 100_000, "[" * 900 + "]" * 900):
        (folder / "model.json").write_text(text[:-1] + ', "x": ' + deep + "}")
        refused(folder, "is damaged")
    (folder / "model.json").write_text("[1]")
    refused(folder, "holds no object")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda text: text.replace("FAT02", "FAT01"), "one twice"),
        (lambda text: "\n".join(text.split("\n")[:3]) + "\n", "named and not predicted"),
        (lambda text: text.replace("True", "maybe", 1), "damaged"),
        (lambda text: text.replace(",0.", ",inf,", 1), "damaged"),
        (lambda text: text.replace("interval_quantile", "other"), "lacks interval_quantile"),
        (lambda text: "", "damaged"),
    ],
)
def test_a_table_of_genes_that_does_not_fit_is_refused(model, change, match):
    folder, facts = model
    path = folder / "genes.csv"
    path.write_text(change(path.read_text()))
    refused(seal(folder, facts), match)


def test_files_outside_of_the_folder_are_not_read(model):
    folder, facts = model
    seal(folder, facts)
    facts["files"]["../../etc/passwd"] = "0"
    facts.pop("digest")
    facts["digest"] = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    (folder / "model.json").write_text(json.dumps(facts))
    refused(folder, r"model\.json: files\.\.\./\.\./etc/passwd.* should be 'model.safetensors'")
