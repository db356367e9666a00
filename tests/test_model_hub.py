"""Models shared through a stand-in for the Hugging Face hub: what is uploaded, fetched, checked and refused."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from exported_model import exported, finished_run, slide
from huggingface_hub import constants
from unreliable import Site, status

import stexp
from stexp.errors import InputError
from stexp.inference import hub, model_facts, model_folder
from stexp.inference.card import describe

COMMIT = "c" * 40


class Api:
    """The part of the hub's client that writes, into the files that `site` serves."""

    def __init__(self, site: Site) -> None:
        self.site, self.private = site, {}

    def create_repo(self, repository: str, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        self.private.setdefault(repository, private)

    def repo_info(self, repository: str) -> SimpleNamespace:
        return SimpleNamespace(private=self.private[repository])

    def list_repo_files(self, repository: str) -> list[str]:
        prefix = f"{repository}/resolve/main/"
        return [path.removeprefix(prefix) for path in self.site.files if path.startswith(prefix)]

    def create_commit(self, repository: str, operations: list, commit_message: str) -> SimpleNamespace:
        for operation in operations:
            for revision in ("main", COMMIT):
                path = f"{repository}/resolve/{revision}/{operation.path_in_repo}"
                if isinstance(operation, hub.CommitOperationDelete):
                    del self.site.files[path]
                else:
                    content = operation.path_or_fileobj
                    self.site.files[path] = content if isinstance(content, bytes) else Path(content).read_bytes()
        return SimpleNamespace(commit_url=f"{self.site.url}/{repository}/commit/{COMMIT}")


@pytest.fixture
def api(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Api:
    site.tags = lambda body: {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
    api = Api(site)
    monkeypatch.setattr(hub, "HfApi", lambda token: api)
    monkeypatch.setattr(constants, "ENDPOINT", site.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", site.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.chdir(tmp_path)
    return api


@pytest.mark.slow
def test_a_model_comes_back_from_the_hub_as_it_was_shared(api, monkeypatch):
    url = hub.push_to_hub(exported(), "lab/model")
    assert url.endswith(COMMIT) and api.private == {"lab/model": True}, "private unless asked for otherwise"
    model = stexp.load_model("lab/model")
    own = stexp.load_model(exported())
    assert model.facts == own.facts
    place = np.array([[150.0, 160.0], [220.0, 180.0]])
    options = {"um_per_px": 1.25, "coordinates": place, "device": "cpu", "progress": False}
    one, other = (each.predict(slide(), **options) for each in (model, own))
    np.testing.assert_array_equal(one.X, other.X)
    fetched = {path.rpartition("/")[2] for path, _ in api.site.asked if path.startswith("lab/")}
    assert fetched == {"model.json", *own.facts["files"]}, "nothing else of the repository is fetched"
    before = len(api.site.asked)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert stexp.load_model("lab/model").facts == own.facts, "from the client's cache"
    assert len(api.site.asked) == before


def test_a_shared_model_replaces_the_one_before(api, tmp_path):
    hub.push_to_hub(exported(), "lab/model", private=False)
    model_folder.write(tmp_path / "m", replace(model_folder.read(exported()), tiles=None), "float32")
    hub.push_to_hub(tmp_path / "m", "lab/model", private=False)
    others = {"references.jpg", "prototypes.safetensors"}  # without tiles, and of a bank of spots
    assert set(api.list_repo_files("lab/model")) == {"README.md", "model.json", *model_facts.FILES} - others
    assert stexp.load_model("lab/model").reference_tiles is None


def test_a_folder_goes_before_a_repository_of_its_name(api, tmp_path):
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "model").symlink_to(exported())
    assert stexp.load_model("lab/model").facts["method"] == "mclstexp" and api.site.asked == []


def test_files_of_the_hub_are_checked_as_any_other(api):
    hub.push_to_hub(exported(), "lab/model")
    for revision in ("main", COMMIT):
        path = f"lab/model/resolve/{revision}/genes.csv"
        api.site.files[path] = api.site.files[path].replace(b"0.", b"1.", 1)
    with pytest.raises(InputError, match=r"genes.csv was changed or damaged"):
        stexp.load_model("lab/model")


def test_what_cannot_be_had_is_one_line(api, monkeypatch):
    def refused(name: str) -> str:
        with pytest.raises(InputError) as error:
            stexp.load_model(name)
        assert "\n" not in str(error.value)
        return str(error.value)

    ask = "lab/model/resolve/main/model.json"
    api.site.files[ask] = b"{}"
    heads = []
    monkeypatch.setattr("unreliable.Handler.do_HEAD", lambda handler: heads[0](handler))
    heads[:] = [status(404, X_Error_Code="RepoNotFound")]
    assert "neither a folder here nor a model" in refused("lab/model")
    heads[:] = [status(403, X_Error_Code="GatedRepo")]
    assert "accepted its terms: do so at https://huggingface.co/lab/model" in refused("lab/model")
    heads[:] = [status(404, X_Error_Code="RevisionNotFound")]
    assert "no such revision" in refused("lab/model@v9")
    heads[:] = [status(404, X_Error_Code="EntryNotFound")]
    assert "no exported model: it lacks model.json" in refused("lab/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "cannot be had from the hub" in refused("lab/other")
    monkeypatch.setattr(hub, "hub_answers", lambda: False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert "cannot be had from the hub" in refused("lab/other")
    assert "is no folder" in refused("a/b/c") and "is no folder" in refused("nothing")


def test_what_may_not_be_shared_is_refused(api, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="owner/name would fit"):
        hub.push_to_hub(exported(), "model")
    with pytest.raises(InputError, match="without a revision"):
        hub.push_to_hub(exported(), "lab/model@v1")
    with pytest.raises(InputError, match="no exported model"):
        hub.push_to_hub(finished_run(), "lab/model")
    api.private["lab/open"] = False
    with pytest.raises(InputError, match=r"lab/open is public, and it holds counts of \d+ spots x 200 genes"):
        hub.push_to_hub(exported(), "lab/open")
    assert api.site.files == {}
    monkeypatch.setattr(hub, "hub_answers", lambda: False)
    with pytest.raises(InputError, match="does not answer"):
        hub.push_to_hub(exported(), "lab/model")


def test_the_card_says_what_the_model_says_of_itself():
    model = model_folder.read(exported())
    card = describe(model, "lab/model")
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == "stexp" and "mclstexp" in header["tags"]
    metrics = json.loads((finished_run() / "metrics.json").read_text())
    lines = {line.split("|")[1].strip(): line for line in card.splitlines() if line.startswith("| ")}
    rows = {"**this model**": metrics["scores"], "ceiling: counting noise": metrics["ceiling"]}
    rows |= {f"floor: {name.replace('_', ' ')}": metrics["floors"][name] for name in ("mean", "colour_ridge")}
    for name, scores in rows.items():
        assert f"{scores['pearson_acg']:.3f} | {scores['pearson_heg50']:.3f}" in lines[name]
    assert model.facts["licences"]["data"] in card and model.digest in card
    assert "B1, C1" in card and "fold A was held out by patient" in card


def test_text_of_the_model_is_no_markup():
    model = model_folder.read(exported())
    model.facts["data"] = "<img src=x>\n# [me](http://x) | more"
    model.facts["scores"][0]["fold"] = "`A`|B"
    card = describe(model, "lab/model")
    body = card.split("## Scores")[0]
    assert "<img" not in card and "\n# \\[" not in card and "[me](" not in card
    rows = [line.replace("\\|", "") for line in body.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {3} and "Fold \\`A\\`\\|B" in card


def test_a_private_repository_stays_private_and_is_called_so(api, caplog):
    api.private["lab/model"] = True
    with caplog.at_level("INFO"):
        hub.push_to_hub(exported(), "lab/model", private=False)
    assert "lab/model is private" in caplog.text and "public" not in caplog.text


def test_a_bug_is_no_polite_line_and_the_disk_is(api, monkeypatch):
    def fails(error: Exception):
        def download(*args, **options):
            raise error

        return download

    monkeypatch.setattr(hub, "hf_hub_download", fails(KeyError("of ours")))
    with pytest.raises(KeyError, match="of ours"):
        stexp.load_model("lab/model")
    monkeypatch.setattr(hub, "hf_hub_download", fails(OSError(28, "No space left on device")))
    with pytest.raises(InputError, match="No space left"):
        stexp.load_model("lab/model")


def test_floors_of_the_card_are_ranked_and_those_without_a_score_are_last():
    model = model_folder.read(exported())
    floors = {"mean": None, "colour_ridge": -0.3, "knn_features": -0.1}
    model.facts["scores"][0]["floors"] = {name: {"pearson_acg": value} for name, value in floors.items()}
    lines = [line.split("|")[1].strip() for line in describe(model, "lab/model").splitlines() if "| floor" in line]
    assert lines == ["floor: knn features", "floor: colour ridge", "floor: mean"]
