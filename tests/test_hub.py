"""HEST-1k from a stand-in for the Hugging Face hub: by section, verified, and one line where terms or network lack."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from huggingface_hub import constants
from unreliable import Site, content, left_over, status

from stexp.data.download.fetch import fetch
from stexp.data.download.record import RECORD
from stexp.errors import InputError

API, RESOLVE = "api/datasets/MahmoodLab/hest", "datasets/MahmoodLab/hest/resolve/main"
FILES = {
    **{
        f"{path.format(id)}": content(path + id) for id in ("TENX95", "NCBI1") for path in ("st/{}.h5ad", "wsis/{}.tif")
    },
    "HEST_v1_0_0.csv": b"id\nNCBI1\n",
    "HEST_v1_1_0.csv": b"id\nNCBI1\nTENX95\n",
    "README.md": b"not needed",
}


@pytest.fixture
def hub(site: Site, monkeypatch: pytest.MonkeyPatch) -> Site:
    """The data set at a local address; slides are large files there, of which the hub states SHA-256."""
    site.tags = lambda body: {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": "a" * 40}
    site.files = {f"{API}/auth-check": b"{}"} | {f"{RESOLVE}/{path}": body for path, body in FILES.items()}
    listed: dict[str, list] = {}
    for path, body in FILES.items():
        facts = {"type": "file", "path": path, "size": len(body)}
        facts["oid"] = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
        if path.endswith(".tif"):
            digest = hashlib.sha256(body).hexdigest()
            facts |= {"oid": "0" * 40, "lfs": {"size": len(body), "oid": digest, "pointerSize": 100}}
        listed.setdefault("/" + path.rpartition("/")[0] if "/" in path else "", []).append(facts)
    site.files |= {f"{API}/tree/main{folder}": json.dumps(facts).encode() for folder, facts in listed.items()}
    monkeypatch.setattr(constants, "ENDPOINT", site.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", site.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    return site


def there(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file() and path.name[0] != "."}


def test_a_section_comes_with_its_slide_and_the_metadata(hub: Site, tmp_path: Path) -> None:
    fetch("hest", tmp_path, ["TENX95"])
    wanted = {"st/TENX95.h5ad", "wsis/TENX95.tif", "HEST_v1_0_0.csv", "HEST_v1_1_0.csv"}
    assert there(tmp_path) == wanted and left_over(tmp_path) == []
    assert all((tmp_path / path).read_bytes() == FILES[path] for path in wanted)
    before = len(hub.asked)
    fetch("hest", tmp_path, "TENX95")
    fetch("hest", tmp_path)  # what is there
    assert len(hub.asked) == before, "a whole copy does not need the hub"
    (tmp_path / "wsis/TENX95.tif").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"wsis/TENX95.tif .*data.download=replace"):
        fetch("hest", tmp_path, ["TENX95"])
    fetch("hest", tmp_path, ["TENX95"], mode="replace")
    assert (tmp_path / "wsis/TENX95.tif").read_bytes() == FILES["wsis/TENX95.tif"]
    fetch("hest", tmp_path, ["TENX95", "NCBI1"])
    assert there(tmp_path) == {*FILES} - {"README.md"}


def test_a_copy_brought_by_hand_is_taken_and_verified_from_then_on(hub: Site, tmp_path: Path) -> None:
    for path in ("st/TENX95.h5ad", "wsis/TENX95.tif", "HEST_v1_0_0.csv"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(b"of an earlier version")
    fetch("hest", tmp_path, ["TENX95"])
    assert hub.asked == [] and {*json.loads((tmp_path / RECORD).read_text())} == there(tmp_path)
    (tmp_path / "st/TENX95.h5ad").write_bytes(b"of an earlier versioN")
    with pytest.raises(InputError, match=r"do not verify: st/TENX95.h5ad"):
        fetch("hest", tmp_path, ["TENX95"])


def test_other_bytes_than_the_hub_states_are_refused(hub: Site, tmp_path: Path) -> None:
    slide = f"{RESOLVE}/wsis/TENX95.tif"
    hub.files[slide] = hub.files[slide][::-1]
    with pytest.raises(InputError, match=r"1 of 4 files .*wsis/TENX95.tif \(wrong bytes .*sha256") as error:
        fetch("hest", tmp_path, ["TENX95"])
    assert "\n" not in str(error.value) and "wsis/TENX95.tif" not in there(tmp_path)
    hub.files[slide] = FILES["wsis/TENX95.tif"]
    fetch("hest", tmp_path, ["TENX95"])
    assert (tmp_path / "wsis/TENX95.tif").read_bytes() == FILES["wsis/TENX95.tif"]


@pytest.mark.parametrize("answer", [status(403, X_Error_Code="GatedRepo"), status(401)])
def test_terms_that_were_not_accepted_are_one_line_that_says_how(answer, hub: Site, tmp_path: Path) -> None:
    hub.mishaps[f"{API}/auth-check"] = [answer]
    with pytest.raises(InputError, match=r"accepted its terms.*huggingface.co/datasets/MahmoodLab/hest.*hf auth"):
        fetch("hest", tmp_path, ["TENX95"])
    assert there(tmp_path) == set()


def test_without_a_network_one_line_says_so(hub: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"cannot be had from the hub .*offline mode.*data.download=never") as error:
        fetch("hest", tmp_path, ["TENX95"])
    assert "\n" not in str(error.value) and hub.asked == []


def test_sections_are_named_and_exist(hub: Site, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no section of MahmoodLab/hest is in .* data.sections="):
        fetch("hest", tmp_path)
    with pytest.raises(InputError, match=r"no section TENX59; did you mean TENX95"):
        fetch("hest", tmp_path, ["TENX59"])
    assert there(tmp_path) == set()
