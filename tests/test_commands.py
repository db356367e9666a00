"""The commands, as a shell calls them, and what they say to bad input."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import warm
import yaml
from demo_run import configure
from omegaconf import OmegaConf

from stexp import __version__, config
from stexp.cli.fold import train
from stexp.cli.train import DEMO
from stexp.config.compose import compose, entry, groups_of
from stexp.config.help import help_text, whole_help_text
from stexp.config.plugins import default_sources
from stexp.errors import InputError
from stexp.reporting import exports
from stexp.reporting.downstream import check
from stexp.runs.rescore import choose_genes


def command(name: str, *overrides: str, **environment: str) -> subprocess.CompletedProcess:
    arguments = [sys.executable, "-m", f"stexp.{name}", *overrides]
    return warm.run(arguments, capture_output=True, text=True, env={**os.environ, **environment})


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["fold=Z"], "fold=Z is no patient with an image; choose one of A, B, C, or all"),
        (["fold=A1"], "A1 is a section of patient A"),
        (["data.sections=[A1]", "fold=A"], "no section with an image is left to train on"),
        (["data.sections=[A1,X9]"], "X9 not in demo"),
        (["model.k=100000"], "reference spots; choose 1 to"),
        (["model.distance=l3"], "choose cosine, l1 or l2"),
        (["fold=2_0"], "fold=20 is no patient with an image"),
        (["trainer.max_epochs=0"], "trainer.max_epochs=0: a whole number of at least 1 would fit"),
        (["trainer.max_epochs=-1"], "trainer.max_epochs=-1: a whole number of at least 1 would fit"),
        (["hardware.threads=-1"], "hardware.threads=-1: a whole number of at least 1"),
        (["seed=-1"], "seed=-1: a whole number of at least 0 would fit"),
        (["seed=99999999999"], "seed=99999999999: a whole number from 0"),
        (["+trainer.fast_dev_run=true"], "trainer.fast_dev_run: a run takes all its spots"),
        (["model.reference=null"], "model.reference=null: image, all or a list of sections"),
        (["data.tile_um=-5"], "data.tile_um=-5: a number above 0 or null"),
        (["data.tile_um=wide"], "data.tile_um=wide: a number above 0 or null"),
        (["data.tile_um=1e6"], "a tile of 500000 px is larger than the image (1750 x"),
        (["trainer.accelerator=gpu"], "no GPU here; take cpu or auto"),
        (["trainer.accelerator=tpu"], "choose auto, cpu"),
        (["data.augmentation=all"], "choose none, dihedral, paper"),
        (["image_encoder.name=densnet121"], "timm has no model 'densnet121'"),
        (["image_encoder.pretrained=true", "image_encoder.checkpoint=nowhere.safetensors"], "does not exist"),
        (["data.panel_file=nowhere.txt"], "panel file nowhere.txt does not exist"),
        (["+model.kk=3"], "takes no key 'kk'; did you mean k?"),
    ],
)
def test_bad_input_is_one_clear_line(demo: Path, tmp_path: Path, overrides: list[str], says: str) -> None:
    cfg = configure(demo, tmp_path / "run", *overrides)
    with pytest.raises(InputError) as error:
        sections = config.dataset_of(cfg).read_sections(config.build(cfg.protocol))
        train(cfg, sections, str(cfg.fold or "A"), tmp_path / "run")
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("out", "status"), [("/dev/null", 3), ("/dev/full", 120)])
def test_the_quick_end_keeps_the_status_and_what_others_say_at_the_end(out: str, status: int) -> None:
    code = (
        "import atexit, logging.handlers, sys; from stexp.config.ending import end_quickly; "
        "logging.getLogger().addHandler(logging.handlers.MemoryHandler(9, target=logging.StreamHandler())); "
        "end_quickly(); end_quickly(); atexit.register(print, 'tidied', file=sys.stderr); "
        "logging.warning('logged'); print('printed'); sys.exit(3)"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    with open(out, "w") as stdout:
        streams = {"stdout": stdout, "stderr": subprocess.PIPE}
        done = subprocess.run([sys.executable, "-c", code], text=True, env=environment, **streams)
    assert done.returncode == status and {"tidied", "logged"} <= set(done.stderr.splitlines())
    assert ("No space left" in done.stderr) == (status == 120)


def test_command_line_ends_with_status_2_and_one_line(demo: Path, tmp_path: Path) -> None:
    done = command(
        "train",
        f"data.root={demo / 'data'}",
        "data.reader.patients=3",
        "data.reader.sections_per_patient=1",
        f"data.cache_dir={demo / 'cache'}",
        "fold=Z",
        f"output_dir={tmp_path / 'run'}",
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("stexp: error: fold=Z")
    assert "Traceback" not in done.stderr


HELPFUL = ("train", "score", "floors", "evaluate", "prepare", "report", "predict", "export", "analyse", "complete")
COMMANDS = {"table": "table"} | {name: name for name in HELPFUL}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_teaches_and_imports_little(name: str) -> None:
    code = (
        f"import sys, runpy\nsys.argv = ['stexp-{name}', '--help']\n"
        f"try:\n    runpy.run_module('stexp.{name}', run_name='__main__')\n"
        "except SystemExit:\n    pass\nheavy = {'torch', 'pandas', 'anndata', 'scipy', 'sklearn', 'matplotlib'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"stexp-{COMMANDS[name]}" in done.stdout and len(done.stdout.splitlines()) > 3


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_its_version(name: str) -> None:
    done = command(name, "--version")
    assert (done.returncode, done.stdout) == (0, f"stexp {__version__}\n")


def test_a_flag_for_a_key_says_how_keys_are_given() -> None:
    done = command("train", "--fold", "A")
    assert done.returncode == 2
    assert done.stderr == "stexp: error: --fold: what changes is given as key=value, as in fold=VALUE\n"


@pytest.mark.parametrize("name", ["train", "predict", "prepare", "score", "evaluate"])
def test_help_ends_with_the_keys_that_people_change_and_their_values(name: str) -> None:
    import_module(f"stexp.cli.{name}")  # prepare makes a group of its own
    cfg = compose(name, [], with_hydra=True)
    _, _, keys = help_text(cfg, name, groups_of(name, []), default_sources()).partition("== Keys that people change")
    lines = re.findall(r"^  ([\w.]+=\S+) +(\S.*)$", keys, re.M)
    assert len(lines) == {"score": 8, "evaluate": 11}.get(name, 10) and all(text for _, text in lines)
    for key, _ in lines:
        path, _, value = key.partition("=")
        node = OmegaConf.select(cfg, path)
        if not value.isupper():  # FOLDER and the like stand for a name
            changed = compose(name, [key])
            assert OmegaConf.select(changed, path) == node, key
        else:
            assert node is None or isinstance(node, str)


def test_the_help_names_every_method() -> None:
    cfg = compose("train", [], with_hydra=True)
    text = help_text(cfg, "train", groups_of("train", []), default_sources())
    listed = re.search(r"model=mclstexp +method: ([^=]+)\n", text)
    assert listed is not None
    assert {"mclstexp", *re.findall(r"\w+", listed[1])} >= set(groups_of("train", [])["model"])


def test_the_whole_help_has_every_key_with_the_comment_of_its_yaml() -> None:
    cfg = compose("train", ["data=her2st"], with_hydra=True)
    text = whole_help_text(cfg, "train", groups_of("train", []), default_sources())
    listed = text[text.index("== Keys") :]
    assert yaml.safe_load(listed.partition("\n")[2]) == OmegaConf.to_container(compose("train", ["data=her2st"]))
    assert re.search(r"^  position: learnable +# none, sinusoid, naive, learnable$", listed, re.M)
    assert re.search(r"^    min_counts: 50 +# counts of a spot$", listed, re.M), "of data/default.yaml"
    assert re.search(r"^model=mclstexp +of bleep, .*triplex$", text, re.M)
    assert "--help-all" not in text and "--help-all" in help_text(
        cfg, "train", groups_of("train", []), default_sources()
    )


def test_a_bare_train_says_that_it_is_the_demo(monkeypatch, caplog) -> None:
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)
    ran = []
    main = entry("train", bare="this is the demo")(lambda cfg: ran.append(cfg.data.name))
    caplog.set_level("INFO")
    for arguments, says in (([], True), (["data=her2st"], False)):
        caplog.clear()
        monkeypatch.setattr(sys, "argv", ["stexp-train", *arguments])
        main()
        assert ("this is the demo" in caplog.text) is says
    assert ran == ["demo", "her2st"]
    assert "90 epochs" in DEMO and "minutes" in DEMO and compose("train", []).trainer.max_epochs == 90


def test_names_of_closed_sets_are_offered() -> None:
    with pytest.raises(InputError, match="did you mean geojson"):
        exports.check(["geojsn"])
    with pytest.raises(InputError, match="did you mean FASN"):
        choose_genes(["FASM"], [SimpleNamespace(genes=["FASN", "ACTB"])])
    for key, value, nearest in (("domains", "jont", "joint"), ("method", "kmean", "kmeans")):
        cfg = OmegaConf.to_container(compose("analyse", ["run=x", f"downstream.{key}={value}"]))
        with pytest.raises(InputError, match=f"did you mean {nearest}"):
            check(cfg)


@pytest.mark.parametrize(
    ("name", "key", "meant"),
    [
        ("train", "model.kk", "model.k"),
        ("score", "genez", "genes"),
        ("floors", "protocoll", "protocol"),
        ("prepare", "data.sectons", "data.sections"),
        ("predict", "slid", "slide"),
        ("export", "outputs", "output"),
        ("analyse", "export", "exports"),
        ("table", "baselin", "baseline"),
    ],
)
def test_a_misspelt_key_is_one_line_with_the_one_meant(name: str, key: str, meant: str) -> None:
    done = command(name, f"{key}=1")
    assert done.returncode == 2 and done.stderr == f"stexp: error: there is no key {key}; did you mean {meant}?\n"


@pytest.mark.slow
def test_prepare_and_floors_print_what_they_found(demo: Path, tmp_path: Path) -> None:
    common = [f"data.root={demo / 'data'}", "data.reader.patients=3", "data.reader.sections_per_patient=1"]
    folder = tmp_path / "prepared"
    prepared = command("prepare", *common, f"data.cache_dir={demo / 'cache'}", f"output_dir={folder}")
    assert {path.name for path in folder.iterdir()} == {"qc.csv", "spots.csv.gz", "overlay", "overlay.png"}
    assert prepared.returncode == 0 and "demo: 3 sections of 3 patients" in prepared.stdout
    floors = command("floors", *common)
    assert floors.returncode == 0 and "depth_oracle (oracle)" in floors.stdout


@pytest.mark.slow
@pytest.mark.data
def test_floors_of_her2st_are_those_of_the_docs(real_data: Path) -> None:
    done = command("floors", "data=her2st", "protocol=paper", STEXP_DATA=str(real_data))
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines()[2:]}
    assert rows["depth_oracle"][2:4] == ["0.3037", "0.5810"]
    assert rows["mean"][3:5] == ["0.7115", "0.6716"]
