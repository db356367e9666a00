"""Collect into one folder what experiments/gpu.sh needs on a machine without network: ``experiments/gpu.sh pack -h``.

Five sections of HER2+ with images, their counts and gene list; DenseNet-121's ImageNet weights rounded to float16; and
wheels (x86-64, Python 3.12) of what the measured commands import and the machine has not. By itself the machine has
what experiments/gpu_image.txt lists; ``--have`` names another list, such as its ``pip freeze``. Together with the
checkout the folder stays under a limit, or this ends with an error.

Needs uv and pip beside the interpreter, and safetensors and torch in it.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path

from gpu_machine import NOT_CALLED, SECTIONS, source_digest, write_half
from safetensors.torch import load_file

from stexp.runs.provenance import git_state, now

TOP = Path(__file__).resolve().parents[1]
PYTHON = "3.12"
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 26, 24, 17, 12, 5)] + ["manylinux2014_x86_64"]
CODECS = ("_shared", "_shared_cython", "_imcd", "_jpeg8")
"""Extension modules of imagecodecs that reading JPEG slides takes, a twentieth of its wheel."""


def copy_data(data: Path, folder: Path) -> None:
    """The five sections, as HER2+ lays them out, and the gene list of the paper."""
    root = data / "her2st"
    files = [data / "gene_lists" / "her2st_785.txt"]
    for name in SECTIONS:
        files += [root / "ST-cnts" / f"{name}.tsv.gz", root / "ST-spotfiles" / f"{name}_selection.tsv"]
        images = sorted((root / "ST-imgs" / name[0] / name).glob("*.jpg"))
        files += images or [root / "ST-imgs" / name[0] / name / "*.jpg"]
    lacking = [str(path) for path in files if not path.is_file()]
    if lacking:
        sys.exit(f"--data {data} lacks {', '.join(lacking)}")
    for path in files:
        target = folder / path.relative_to(data)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def needed(have: set[str]) -> list[str]:
    """``name==version`` of our dependencies, and of theirs, for Python 3.12 on x86-64, less those that are there."""
    ours = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]["dependencies"]
    ours = [line for line in ours if _name(line) not in NOT_CALLED]
    command = ["uv", "pip", "compile", "-", "--python-version", PYTHON, "--python-platform", "x86_64-manylinux_2_28"]
    command += ["--no-header", "--no-annotate", "--quiet", "--constraint", str(TOP / "constraints.txt")]
    uv = Path(sys.executable).with_name("uv")
    command[0] = str(uv) if uv.exists() else "uv"
    done = subprocess.run(command, input="\n".join(ours), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"uv could not resolve what is needed:\n{done.stderr}")
    lines = [line.split(";")[0].strip() for line in done.stdout.splitlines() if "==" in line]
    return [line for line in lines if _name(line) not in have and not _name(line).startswith("nvidia-")]


def read_names(path: Path) -> set[str]:
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    return {_name(line) for line in lines if line}


def _name(requirement: str) -> str:
    """The package of a requirement, spelled as registries compare names."""
    match = re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", requirement)
    return re.sub(r"[-_.]+", "-", match[0] if match else requirement).lower().rstrip("-")


def fetch_wheels(requirements: list[str], folder: Path) -> None:
    """Download wheels; build those of packages that publish their sources alone, which must be plain Python."""
    folder.mkdir()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    options = ["--no-deps", "--only-binary=:all:", "--implementation=cp", f"--python-version={PYTHON}"]
    options += [f"--platform={platform}" for platform in PLATFORMS]
    for requirement in requirements:
        command = [*pip, "download", *options, "--dest", str(folder), requirement]
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            continue
        build = [*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), requirement]
        done = subprocess.run(build, capture_output=True, text=True, check=False)
        built = list(folder.glob(f"{requirement.split('==')[0].replace('-', '_')}-*.whl"))
        if done.returncode or not all(path.name.endswith("-none-any.whl") for path in built):
            sys.exit(f"{requirement}: no wheel for Python {PYTHON} on x86-64, nor plain Python\n{done.stderr[-2000:]}")


def prune_imagecodecs(wheel: Path) -> None:
    """Leave in imagecodecs' wheel the codecs that are called, and the libraries that these link."""
    with zipfile.ZipFile(wheel) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    kept = {name for name in members if not name.startswith("imagecodecs.libs/")}
    kept -= {name for name in kept if ".so" in name and Path(name).name.split(".")[0] not in CODECS}
    libraries, grew = {name for name in members if name.startswith("imagecodecs.libs/")}, True
    while grew:
        binaries = [members[name] for name in kept if ".so" in name]
        linked = {name for name in libraries - kept if any(Path(name).name.encode() in code for code in binaries)}
        kept |= linked
        grew = bool(linked)
    record = next(name for name in kept if name.endswith(".dist-info/RECORD"))
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(kept - {record}):
            digest = base64.urlsafe_b64encode(hashlib.sha256(members[name]).digest()).rstrip(b"=").decode()
            writer.writerow([name, f"sha256={digest}", len(members[name])])
            archive.writestr(name, members[name])
        writer.writerow([record, "", ""])
        archive.writestr(record, lines.getvalue())


def size_of_checkout() -> int:
    files = subprocess.run(["git", "ls-files", "-z"], cwd=TOP, capture_output=True, text=True, check=True).stdout
    return sum((TOP / name).stat().st_size for name in files.split("\0") if name and (TOP / name).is_file())


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="experiments/gpu.sh pack", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="to be made")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds her2st and gene_lists")
    parser.add_argument("--weights", type=Path, required=True, help="DenseNet-121's, as safetensors of timm")
    parser.add_argument(
        "--have", type=Path, default=TOP / "experiments" / "gpu_image.txt", help="packages that are there"
    )
    parser.add_argument("--limit-mib", type=float, default=64, help="of the folder and the checkout (default 64)")
    args = parser.parse_args()
    if args.folder.exists():
        sys.exit(f"{args.folder} exists; name a folder that does not")
    with tempfile.TemporaryDirectory(dir=args.folder.resolve().parent, prefix=".gpu-pack-") as scratch:
        folder = Path(scratch) / "pack"
        folder.mkdir()
        copy_data(args.data, folder)
        write_half(load_file(args.weights), folder / "densenet121.safetensors")
        requirements = needed(read_names(args.have))
        fetch_wheels(requirements, folder / "wheels")
        for wheel in (folder / "wheels").glob("imagecodecs-*.whl"):
            prune_imagecodecs(wheel)
        facts = {"date": now(), **git_state(), "digest": source_digest(), "python": PYTHON, "wheels": requirements}
        (folder / "pack.json").write_text(json.dumps(facts, indent=1) + "\n")
        sizes = {part.name: _bytes(part) for part in sorted(folder.iterdir())} | {"the checkout": size_of_checkout()}
        for wheel in sorted((folder / "wheels").iterdir(), key=lambda path: -path.stat().st_size)[:8]:
            print(f"  {wheel.stat().st_size / 2**20:6.2f} MiB  {wheel.name}")
        for name, size in sizes.items():
            print(f"{size / 2**20:8.2f} MiB  {name}")
        whole = sum(sizes.values()) / 2**20
        print(f"{whole:8.2f} MiB  in all")
        if whole > args.limit_mib:
            sys.exit(f"{whole:.1f} MiB are more than {args.limit_mib:g}; name with --have what the machine has")
        folder.rename(args.folder)
    if facts["commit"] is None or facts["dirty"]:
        print("note: this code is in no commit, and results.py will not keep its runs", file=sys.stderr)
    print(f"wrote {args.folder}")


def _bytes(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


if __name__ == "__main__":
    main()
