"""The wheel, outside the repository: all commands, configs and the demo.

By itself the wheel is laid over the dependencies of the environment that runs the tests. With STEXP_TEST_CONSTRAINTS,
the name of a constraints file, it is installed with its own dependencies into an empty one (``make test-wheel``).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

TOP = Path(__file__).parents[1]
UV = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
CONSTRAINTS = os.environ.get("STEXP_TEST_CONSTRAINTS")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(UV is None, reason="uv is not installed here")]


def output_of(*command: str | Path | None, cwd: Path, **environment: str) -> str:
    """What a command prints that sees nothing of this checkout."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("STEXP_", "PYTHON"))}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env={**kept, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout's source distribution."""
    dist = tmp_path_factory.mktemp("dist")
    output_of(UV, "build", "--quiet", "--out-dir", dist, cwd=TOP)
    assert len(list(dist.glob("*.tar.gz"))) == 1
    (wheel,) = dist.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def bin_(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Commands of an environment that has the wheel and what it depends on."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False, symlinks=True)
    wanted = ["--no-deps"] if CONSTRAINTS is None else ["--constraints", TOP / CONSTRAINTS]
    output_of(UV, "pip", "install", "--quiet", "--python", home / "bin" / "python", *wanted, wheel, cwd=home)
    if CONSTRAINTS is None:
        # a .pth inside a folder that a .pth names, such as that of an editable stexp, is not read
        paths = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
        (site,) = home.glob("lib/python*/site-packages")
        (site / "dependencies.pth").write_text("\n".join(paths) + "\n")
    return home / "bin"


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]


def test_the_wheel_holds_the_package_and_the_configs_whole(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        about = message_from_bytes(archive.read(metadata))
    expected = {path.relative_to(TOP / "src") for path in files_in(TOP / "src")}
    expected |= {"stexp" / path.relative_to(TOP) for path in files_in(TOP / "conf")}
    assert names == {path.as_posix() for path in expected} and {"stexp/py.typed", "stexp/conf/train.yaml"} <= names
    project = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
    assert about["License-Expression"] == "MIT"
    assert set(about.get_all("Provides-Extra")) == set(project["optional-dependencies"])


def test_commands_configs_and_the_demo_work_elsewhere(bin_: Path, wheel: Path, tmp_path: Path):
    project = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
    asked = (
        "import stexp, stexp.files; from importlib.metadata import distribution; "
        "[point.load() for point in distribution('stexp').entry_points]; "
        "print(stexp.__version__, stexp.__file__, stexp.files.CONF)"
    )
    version, *places = output_of(bin_ / "python", "-c", asked, cwd=tmp_path).split()
    assert f"-{version}-" in wheel.name
    assert all(Path(place).is_relative_to(bin_.parent) for place in places)
    assert set(project["scripts"]) == {path.name for path in bin_.glob("stexp-*")}

    arguments = [
        *("data=demo", "data.reader.patients=3", "data.reader.sections_per_patient=1", "image_encoder=tiny"),
        *("trainer.max_epochs=1", "trainer.accelerator=cpu", "hardware.threads=1", "hardware.keep_memory=false"),
    ]
    out = tmp_path / "runs" / "demo"
    here = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}
    output_of(bin_ / "stexp-train", *arguments, f"output_dir={out}", cwd=tmp_path, **here)
    assert "<html" in (out / "report.html").read_text() and (out / "predictions.h5ad").is_file()
    assert (tmp_path / "data" / "demo").is_dir(), "data and caches lie where the command was given"
