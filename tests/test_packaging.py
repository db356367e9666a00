"""What stands around the package says what the Makefile, pyproject.toml and the commands say."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

TOP = Path(__file__).parents[1]
PROJECT = tomllib.loads((TOP / "pyproject.toml").read_text())
MAKEFILE = (TOP / "Makefile").read_text()
WORKFLOWS = sorted((TOP / ".github" / "workflows").glob("*.yml"))
CONTAINERS = [TOP / "containers" / "Dockerfile", TOP / "containers" / "stexp.def"]
CLUSTER = TOP / "examples" / "cluster"


def commands_in(path: Path) -> list[str]:
    """Shell lines of a workflow or of a container's recipe, without comments."""
    if path.suffix == ".yml":
        jobs = yaml.safe_load(path.read_text())["jobs"].values()
        return [step["run"] for job in jobs for step in job["steps"] if "run" in step]
    return [line for line in path.read_text().splitlines() if not line.startswith("#")]


@pytest.mark.parametrize("path", [*WORKFLOWS, *CONTAINERS], ids=lambda path: path.name)
def test_what_is_made_is_a_target_with_its_variables(path: Path):
    calls = [call for line in commands_in(path) for call in re.findall(r"\bmake ([a-z].*)", line)]
    assert calls
    targets = re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE)
    for call in calls:
        assert {word for word in call.split() if re.fullmatch("[a-z-]+", word)} <= {*targets}, call
        assert all(f"$({name})" in MAKEFILE for name in re.findall(r"\b([A-Z_]+)=", call)), call


def test_pythons_of_the_workflow_are_those_of_the_package():
    jobs = yaml.safe_load((TOP / ".github" / "workflows" / "test.yml").read_text())["jobs"]
    pythons = jobs["test"]["strategy"]["matrix"]["python"]
    prefix = "Programming Language :: Python :: "
    assert [prefix + python for python in pythons] == [
        entry for entry in PROJECT["project"]["classifiers"] if entry.startswith(prefix)
    ]
    lowest, _, above = PROJECT["project"]["requires-python"].removeprefix(">=").partition(",<")
    assert lowest.rpartition(".")[0] == pythons[0] and above == f"3.{int(pythons[-1].removeprefix('3.')) + 1}"
    for path in CONTAINERS:
        assert re.search(r"PYTHON=(\S+)", path.read_text())[1] in pythons


def test_only_the_job_that_publishes_may_do_more_than_read():
    for path in WORKFLOWS:
        workflow = yaml.safe_load(path.read_text())
        assert workflow["permissions"] == {"contents": "read"}
        more = {name: job["permissions"] for name, job in workflow["jobs"].items() if "permissions" in job}
        assert more == ({"publish": {"id-token": "write"}} if path.name == "release.yml" else {})


def test_containers_are_built_of_all_that_an_installation_reads():
    docker, apptainer = (path.read_text() for path in CONTAINERS)
    copied = {name for line in re.findall(r"^COPY (.*) \S+$", docker, re.MULTILINE) for name in line.split()}
    assert copied == set(re.findall(r"^    (\S+) /opt/stexp/", apptainer, re.MULTILINE))
    assert copied == set(re.findall(r"^!(.*)$", (TOP / ".dockerignore").read_text(), re.MULTILINE))
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    read = {"Makefile", "pyproject.toml", "constraints.txt", PROJECT["project"]["readme"]}
    read |= {*PROJECT["project"]["license-files"], *wheel["force-include"]}
    assert copied == read | {package.partition("/")[0] for package in wheel["packages"]}
    assert all((TOP / name).exists() for name in copied)


def test_the_lowest_versions_are_those_that_are_allowed():
    pins = dict(line.split("==") for line in (TOP / "constraints-min.txt").read_text().split())
    for requirement in map(Requirement, PROJECT["project"]["dependencies"]):
        lowest = next((part.version for part in requirement.specifier if part.operator == ">="), None)
        pin = pins[requirement.name.replace("_", "-")]
        assert lowest and pin in requirement.specifier, f"{requirement}: make minimum"
        assert (pin + ".").startswith(lowest + "."), f"{requirement}, and {pin} is pinned: make minimum"


def test_the_changelog_has_the_release_that_is_cited():
    cited = yaml.safe_load((TOP / "CITATION.cff").read_text())
    releases = re.findall(r"^## (\d\S*) - (\S+)$", (TOP / "CHANGELOG.md").read_text(), re.MULTILINE)
    newest = releases[0] if releases else (None, "None")  # nothing is cited before the first release
    assert newest == (cited.get("version"), str(cited.get("date-released")))
    assert releases == sorted(releases, key=lambda release: [int(part) for part in release[0].split(".")], reverse=True)


@pytest.fixture
def slides(tmp_path: Path) -> Path:
    folder = tmp_path / "slides"
    (folder / "b").mkdir(parents=True)  # the parts of b.mrxs
    for name in ("a (1).svs", "b.mrxs", "c.ome.tif"):
        (folder / name).touch()
    (tmp_path / "m.stexp").mkdir()
    (tmp_path / "m.stexp" / "model.json").touch()
    return folder


@pytest.mark.parametrize(("task", "slide"), [("1", "a (1).svs"), ("2", "b.mrxs"), ("3", "c.ome.tif"), ("4", None)])
def test_a_job_of_slurm_predicts_the_slide_of_its_number(task: str, slide: str | None, slides: Path, tmp_path: Path):
    command = tmp_path / "stexp-predict"
    command.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    command.chmod(0o755)
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": task}
    arguments = ["bash", str(CLUSTER / "predict.sbatch"), "m.stexp", "slides", "out", "spacing_um=50"]
    done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    if slide is None:
        assert done.returncode == 2 and "no slide" in done.stderr
        return
    assert done.stdout.splitlines() == ["run=m.stexp", f"slide='slides/{slide}'", "output_dir=out", "spacing_um=50"]


def test_the_examples_use_keys_of_the_command():
    keys = yaml.safe_load((TOP / "conf" / "predict.yaml").read_text())
    for path in (CLUSTER / "predict.sbatch", CLUSTER / "Snakefile"):
        used = set(re.findall(r"\b([a-z_]+)=", path.read_text().rpartition("stexp-predict ")[2]))
        assert {"run", "slide", "output_dir"} <= used <= set(keys), path.name


@pytest.mark.skipif(shutil.which("snakemake") is None, reason="snakemake is not installed here")
def test_snakemake_plans_a_job_a_slide(slides: Path, tmp_path: Path):
    command = ["snakemake", "-s", str(CLUSTER / "Snakefile"), "--dry-run", "--printshellcmds", "--config"]
    done = subprocess.run([*command, "model=m.stexp"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, slide in {"a (1)": "a (1).svs", "b": "b.mrxs", "c": "c.ome.tif"}.items():
        assert f"slide='slides/{slide}'" in done.stdout + done.stderr
        assert f"predictions/{name}/report.html" in done.stdout + done.stderr
