"""Plug-ins: what they bring, what they may not, and that a config alone runs no code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import warm
import yaml
from commands import SHORT, environment, prediction

from stexp import construct
from stexp.config import build, to_plain
from stexp.config.compose import compose, entry, groups_of, split
from stexp.config.help import help_text
from stexp.config.plugins import Sources
from stexp.errors import InputError
from stexp.inference.predictor import load_model
from stexp.models.adapter import as_method
from stexp.models.method import Method, Prediction
from stexp.protocol import Protocol
from stexp.runs.plugins import load_plugins, record, require_as_recorded
from stexp.sweeps.jobs import jobs

EXAMPLE = Path(__file__).parents[1] / "examples" / "plugin"

METHOD = """
import os
import pytorch_lightning as pl
from torch import nn

class Mine(pl.LightningModule):
    def __init__(self, n_genes, lr=0.01, sizes=(3, 4), kind="a"):
        super().__init__()
        self.lr, self.layer = lr, nn.Linear(3, n_genes)

    def training_step(self, batch, batch_idx): ...
    def predict_step(self, batch): return self.layer(batch.image.mean(dim=(2, 3)))
    def configure_optimizers(self): ...

class Box:
    def __init__(self, value=None):
        self.value = value

def read_mine(root):
    return [root]

def remove(path): ...

class Popen: ...
from subprocess import Popen as Imported
"""


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder to be in, with a method in ``mymethod.py`` and a package ``mine`` with configs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(construct, "_allowed", {})
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", ".")])
    (tmp_path / "mymethod.py").write_text(METHOD)
    (tmp_path / "mine" / "conf" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "__init__.py").write_text(METHOD)
    node = {"_target_": "mine.Mine", "name": "ours", "lr": 0.5}
    (tmp_path / "mine" / "conf" / "model" / "ours.yaml").write_text(yaml.safe_dump(node))
    before = set(sys.modules)
    yield tmp_path
    for name in {"mymethod", "mine"} | {
        name for name in set(sys.modules) - before if name.startswith(("plug_", "mine."))
    }:
        sys.modules.pop(name, None)


def refused(function, *arguments) -> str:
    with pytest.raises(InputError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# which modules may be plug-ins


def test_a_file_of_the_current_folder_is_imported_and_its_classes_may_be_named(here):
    assert "plugins=[mymethod]" in refused(construct.build, {"_target_": "mymethod.Box"})
    assert "mymethod" not in sys.modules
    assert load_plugins(["mymethod", "mymethod"]) == ["mymethod"]
    inner = {"_target_": "mymethod.read_mine", "root": 7}
    assert construct.build({"_target_": "mymethod.Box", "value": inner}).value == [7]


@pytest.mark.parametrize("name", ["os.system", "remove", "Imported", "nn.Linear", "pl.Trainer", "os"])
def test_of_a_plugin_only_classes_and_readers_that_it_defines(here, name):
    load_plugins(["mymethod"])
    assert "not allowed" in refused(construct.build, {"_target_": f"mymethod.{name}"})


def test_a_plugin_does_not_allow_what_begins_like_it(here):
    (here / "mymethod2.py").write_text(METHOD)
    load_plugins(["mymethod"])
    assert "not allowed" in refused(construct.build, {"_target_": "mymethod2.Box"})
    assert "mymethod2" not in sys.modules


@pytest.mark.parametrize("name", ["os", "subprocess", "random", "sys", "os.path"])
def test_the_standard_library_is_no_plugin_even_beside_a_file_of_its_name(here, name):
    (here / "random.py").write_text(METHOD)
    assert "Python itself" in refused(load_plugins, [name])
    assert construct.plugins() == []


@pytest.mark.parametrize("name", ["torch", "numpy", "torch.nn", "pytorch_lightning", "yaml"])
def test_an_installed_library_is_no_plugin(here, name):
    assert "entry point" in refused(load_plugins, [name])


def test_stexp_is_no_plugin(here):
    assert "stexp itself" in refused(load_plugins, ["stexp.models"])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("mymethd", "did you mean mymethod"),
        ("mymethod.py", ": mymethod"),
        ("mine.inner", "mine is there and has no inner"),
        ("../mine", "no name of a module"),
        ("empty", "no module empty"),
    ],
)
def test_an_absent_module_is_one_line_with_what_would_fit(here, name, text):
    (here / "empty").mkdir()
    assert text in refused(load_plugins, [name])


def test_what_a_plugin_raises_while_it_is_imported_comes_as_it_is(here):
    (here / "plug_a.py").write_text("import package_that_is_nowhere\n")
    (here / "plug_b.py").write_text("raise KeyError('a typo')\n")
    with pytest.raises(ModuleNotFoundError, match="package_that_is_nowhere"):
        load_plugins(["plug_a"])
    with pytest.raises(KeyError, match="a typo"):
        load_plugins(["plug_b"])


# what they bring


def test_a_package_brings_choices_and_the_config_says_so(here):
    cfg = compose("train", ["plugins=[mine]", "model=ours", "model.lr=0.25"])
    assert cfg.model._target_ == "mine.Mine" and cfg.model.lr == 0.25 and cfg.plugins == ["mine"]
    assert "plugins" not in compose("train", [])
    assert "did you mean model.lr" in refused(compose, "train", ["plugins=[mine]", "model=ours", "model.lrr=1"])
    assert "choose " in refused(compose, "train", ["model=ours"])


def test_a_class_without_a_config_is_a_choice_with_its_arguments(here):
    cfg = compose("train", ["plugins=mymethod", "model=Mine"])
    expected = {"_target_": "mymethod.Mine", "name": "Mine", "lr": 0.01, "sizes": [3, 4], "kind": "a"}
    assert to_plain(cfg.model) == expected
    method = as_method(build({key: value for key, value in cfg.model.items() if key != "name"}, n_genes=5))
    assert isinstance(method, Method)


@pytest.mark.parametrize(
    "line", ['_target_: "mine.Mine"', "_target_:   mine.Mine  # ours", "_target_: mine.again.Mine"]
)
def test_a_class_that_a_config_describes_is_one_choice_however_it_is_written(here, line):
    (here / "mine" / "again.py").write_text("from mine import Mine\n")
    (here / "mine" / "conf" / "model" / "ours.yaml").write_text(f"{line}\nname: ours\n")
    sources = Sources.of(["mine"], [])
    assert sources.classes == () and list(sources.choices("model")) == ["ours"]


def test_a_config_that_names_nothing_or_is_damaged_hides_no_class(here):
    (here / "mine" / "conf" / "model" / "ours.yaml").write_text("_target_: mine.Absent\nname: ours\n")
    (here / "mine" / "conf" / "model" / "more.yaml").write_text("a: [\n")
    assert Sources.of(["mine"], []).classes == (("Mine", "mine.Mine"),)


def test_two_classes_of_one_name_are_refused(here):
    (here / "plug_twin.py").write_text(METHOD)
    assert "of mymethod.Mine and of plug_twin.Mine" in refused(compose, "train", ["plugins=[mymethod,plug_twin]"])
    (here / "mine" / "conf" / "model" / "ours.yaml").rename(here / "mine" / "conf" / "model" / "Mine.yaml")
    assert "is of mine and of mymethod.Mine" in refused(compose, "train", ["plugins=[mine,mymethod]"])


def test_help_lists_choices_with_where_they_are_from(here):
    arguments = ["plugins=[mine,mymethod]"]
    cfg = compose("train", arguments, with_hydra=True)
    text = help_text(cfg, "train", groups_of("train", arguments), split(arguments)[0])
    lines = {line.split()[0]: line.split()[1] for line in text.splitlines() if line.startswith("model=")}
    assert lines == {"model=ours": "mine", "model=Mine": "mymethod.Mine"}


def test_a_protocol_is_brought_as_values_and_a_class_of_one_is_refused_before_anything_is_read(here):
    (here / "mine" / "conf" / "protocol").mkdir()
    path = here / "mine" / "conf" / "protocol" / "halves.yaml"
    node = {"_target_": "stexp.protocol.Protocol", "name": "halves", "hold_out": "section", "n_hvg": 7}
    path.write_text(yaml.safe_dump(node))
    cfg = compose("train", ["plugins=[mine]", "protocol=halves"])
    assert build(cfg.protocol) == Protocol("halves", hold_out="section", n_hvg=7) and cfg.plugins == ["mine"]
    path.write_text(yaml.safe_dump({**node, "_target_": "mine.Box"}))
    for command in ("train", "evaluate", "floors"):
        assert "mine.Box" in refused(compose, command, ["plugins=[mine]", "protocol=halves"])
    assert "values of stexp.protocol.Protocol" in refused(compose, "train", ["plugins=[mine]", "protocol=halves"])


@pytest.mark.parametrize("relative", ["model/mean", "data/default", "protocol/strict"])
def test_a_choice_of_our_name_is_refused_with_both_named(here, relative):
    path = here / "mine" / "conf" / f"{relative}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text("name: x\n")
    text = refused(compose, "train", ["plugins=[mine]"])
    assert relative in text and "of stexp and of mine" in text


def test_two_plugins_with_one_choice_are_refused(here):
    (here / "plug_other").mkdir()
    (here / "plug_other" / "__init__.py").write_text("")
    (here / "mine" / "conf").rename(here / "plug_other" / "conf")
    (here / "mine" / "conf" / "model").mkdir(parents=True)
    (here / "mine" / "conf" / "model" / "ours.yaml").write_text("name: x\n")
    assert "of mine and of plug_other" in refused(compose, "train", ["plugins=[mine,plug_other]"])


def test_the_search_path_brings_choices_from_folders_and_packages(here):
    (here / "more" / "model").mkdir(parents=True)
    (here / "more" / "model" / "other.yaml").write_text("_target_: stexp.models.mean.Mean\nname: other\n")
    assert compose("train", ["hydra.searchpath=[file://more]", "model=other"]).model.name == "other"
    cfg = compose("train", ["hydra.searchpath=[file://more,pkg://mine.conf]", "model=ours"])
    assert cfg.model.name == "ours" and "mine" not in sys.modules
    node = {key: value for key, value in to_plain(cfg.model).items() if key != "name"}
    assert "plugins=[mine]" in refused(construct.build, node)  # a place of configs allows no classes
    assert "no folder" in refused(compose, "train", ["hydra.searchpath=[file://nowhere]"])
    assert "file://" in refused(compose, "train", ["hydra.searchpath=[more]"])
    assert "for sweeps" in refused(compose, "train", ["hydra.job.name=x"])


@pytest.mark.parametrize("flag", [["--config-dir", "more"], ["--config-dir=more"], ["-cd", "more"]])
def test_config_dir_is_a_place_of_choices(here, monkeypatch, flag):
    (here / "more" / "model").mkdir(parents=True)
    (here / "more" / "model" / "other.yaml").write_text("_target_: stexp.models.mean.Mean\nname: other\n")
    made = []
    monkeypatch.setattr(sys, "argv", ["stexp-train", "model=other", *flag])
    entry("train")(made.append)()
    assert made[0].model.name == "other"


def test_an_installed_plugin_need_not_be_named(here, monkeypatch):
    from stexp.config import compose as composing
    from stexp.config import plugins

    monkeypatch.syspath_prepend(here)
    monkeypatch.setattr(construct, "installed_plugins", lambda: {"mine": "mine-dist"})
    for cached in (plugins._installed, plugins.default_sources, composing._groups):
        cached.cache_clear()
    try:
        assert "plugins" not in compose("train", []) and "mine" not in sys.modules
        cfg = compose("train", ["model=ours"])
        assert cfg.plugins == ["mine"] and "mine" in sys.modules
        assert construct.build({"_target_": "mine.Box"}).value is None
    finally:
        for cached in (plugins._installed, plugins.default_sources, composing._groups):
            cached.cache_clear()


def test_jobs_of_a_sweep_inherit_plugins_and_search_path(here):
    (here / "more").mkdir()
    sources = ["plugins=[mine]", "hydra.searchpath=[file://more]"]
    each = jobs(None, [*sources, "model=ours,mean", "fold=A", "output_dir='r/${model.name}'"])
    assert [job.model for job in each] == ["ours", "mean"]
    assert all(split(job.overrides)[0] == split(sources)[0] for job in each)
    assert [compose("train", job.overrides).get("plugins") for job in each] == [["mine"], ["mine"]]


# what was made with them


@pytest.mark.parametrize(
    "names", [["mymethod"], ["os"], {"mymethod": {}}, ["stexp"], ["mymethod", "os.system"], ["torch"]]
)
def test_what_names_a_plugin_is_refused_unless_it_is_named_again(here, names):
    text = refused(construct.require_plugins, names, "runs/x")
    assert "runs/x" in text and f"plugins=[{','.join(names)}]" in text
    assert "mymethod" not in sys.modules


@pytest.mark.parametrize("names", [["a b"], [7], "x\ny", ["x\ny"], [["os"]], 3, ["__import__('os')"], ["a" * 5000]])
def test_names_that_are_none_are_refused(here, names):
    assert "no names of modules" in refused(construct.require_plugins, names, "runs/x")


def test_no_plugins_need_none(here):
    for names in (None, [], {}):
        construct.require_plugins(names, "runs/x")


def test_a_config_cannot_allow_itself(here):
    (here / "run").mkdir()
    config = to_plain(compose("train", ["fold=A"])) | {"plugins": ["mymethod"]}
    config["model"]["_target_"] = "mymethod.Box"
    (here / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    from stexp.runs.finished import FinishedRun
    from stexp.runs.folder import RunFolder

    assert "plugins=[mymethod]" in refused(FinishedRun, RunFolder(here / "run"))
    assert "not allowed" in refused(construct.build, RunFolder(here / "run").config["model"])
    assert "mymethod" not in sys.modules


def test_a_plugin_that_changed_is_warned_of(here, caplog):
    load_plugins(["mine"])
    then = record(["mine"])
    require_as_recorded(then, "model.stexp")
    assert not caplog.records and then["mine"]["version"] is None
    (here / "mine" / "conf" / "model" / "ours.yaml").write_text("name: changed\n")
    require_as_recorded(then, "model.stexp")
    assert "mine changed" in caplog.text


# a LightningModule as a method


def test_a_plain_module_becomes_a_method_and_stays_itself():
    class Plain(pl.LightningModule):
        batching, predicts_slides = "section", False

        def __init__(self):
            super().__init__()
            self.layer, self.validated = torch.nn.Linear(2, 3), 0

        def training_step(self, batch, batch_idx): ...
        def configure_optimizers(self): ...
        def validation_step(self, batch):
            self.validated += 1

        def predict_step(self, batch):
            return self.layer(batch)

    module = Plain()
    weight, method = module.layer.weight, as_method(module)
    assert method is module and isinstance(method, Method) and isinstance(method, Plain)
    assert method.layer.weight is weight and list(method.state_dict()) == ["layer.weight", "layer.bias"]
    assert (method.batching, method.predicts_slides, method.closed_form) == ("section", False, False)
    made = method.validation_step(torch.ones(4, 2), 0)
    assert isinstance(made, Prediction) and made.predicted.shape == (4, 3) and method.validated == 1
    assert as_method(method) is method


def test_a_module_that_predicts_nothing_is_refused_with_what_it_lacks():
    class Half(pl.LightningModule):
        def training_step(self, batch, batch_idx): ...

    text = refused(as_method, Half())
    assert "Half has no predict_step and no configure_optimizers" in text and "Method" in text


# the template


def stexp(home: Path, command: str, *arguments: str, cwd: Path = EXAMPLE) -> subprocess.CompletedProcess:
    started = [sys.executable, "-m", f"stexp.cli.{command}", *arguments]
    return warm.run(started, cwd=cwd, env=environment(home), capture_output=True, text=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with ``run``: the template, trained from its own folder."""
    home = tmp_path_factory.mktemp("template")
    data = ["data=strips", f"data.root={home / 'strips'}", f"data.cache_dir={home / 'cache'}"]
    short = [each for each in SHORT if not each.startswith(("image_encoder", "trainer.max_epochs"))]
    more = ["model=two_layers", "model.lr=0.01", "trainer.max_epochs=4", f"output_dir={home / 'run'}"]
    done = stexp(home, "train", "plugins=[strips]", *data, *short, *more)
    assert done.returncode == 0, done.stderr
    return home


@pytest.mark.slow
def test_the_template_trains_from_its_own_folder_and_says_what_it_is_of(trained):
    metrics = json.loads((trained / "run" / "metrics.json").read_text())
    assert metrics["scores"]["pearson_acg"] > metrics["floors"]["mean"]["pearson_acg"] + 0.3
    config = yaml.safe_load((trained / "run" / "config.yaml").read_text())
    assert config["plugins"] == ["strips"] and config["image_encoder"]["name"] == "colours"


@pytest.mark.slow
def test_the_template_predicts_where_it_is_named_and_only_there(trained, monkeypatch):
    monkeypatch.setattr(construct, "_allowed", {})
    assert "plugins=[strips]" in refused(load_model, trained / "run")
    arguments = prediction(trained / "run", trained / "strips" / "S1.png", out := trained / "predicted")
    done = stexp(trained, "predict", "plugins=[strips]", *arguments)
    assert done.returncode == 0, done.stderr
    assert (out / "S1" / "predictions.h5ad").is_file()

    exported = trained / "run" / "model.stexp"
    facts = json.loads((exported / "model.json").read_text())
    assert set(facts["plugins"]) == {"strips"} and len(facts["plugins"]["strips"]["digest"]) == 32
    assert "plugins=['strips']" in refused(load_model, exported)
    monkeypatch.chdir(EXAMPLE)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert load_model(exported, plugins=["strips"]).facts["method"] == "two_layers"
