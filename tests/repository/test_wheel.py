"""The wheel: what is in it, that the sdist gives the same one, and that it needs no checkout to run."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
APP = ("strategies", "clients", "configs", "deploy")
FILES = ("Dockerfile", ".dockerignore", "constraints.txt", "pyproject.toml", "README.md", "LICENSE")
HERE = "model.name=clients.mine:model"
MODEL = """
from torch import nn

def model(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
"""


def build(root: Path, folder: Path, *words: str) -> None:
    pytest.importorskip("hatchling", reason="hatchling, which builds the wheel, is not installed")
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(folder), *words]
    subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)


def content(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as file:
        return {name: file.read(name) for name in file.namelist()}


def files_of(name: str) -> set[str]:
    paths = (path.relative_to(ROOT).as_posix() for path in (ROOT / name).rglob("*") if path.is_file())
    return {path for path in paths if "__pycache__" not in path}


def test_the_wheel_has_the_code_and_below_it_the_app_and_nothing_else(tmp_path):
    build(ROOT, tmp_path, "--target", "wheel")
    (wheel,) = tmp_path.glob("*.whl")
    found = content(wheel)
    app = {f"fedmom/_app/{path}" for name in APP for path in files_of(name)} | {f"fedmom/_app/{name}" for name in FILES}
    assert {name for name in found if ".dist-info/" not in name} == files_of("fedmom") | app
    assert len(app) > 60
    for name in app:
        assert found[name] == (ROOT / name.removeprefix("fedmom/_app/")).read_bytes()


@pytest.mark.slow
def test_the_sdist_gives_the_same_wheel(tmp_path):
    build(ROOT, tmp_path)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as file:
        file.extractall(tmp_path, filter="data")
    build(tmp_path / sdist.name.removesuffix(".tar.gz"), tmp_path / "again", "--target", "wheel")
    (one,), (other,) = tmp_path.glob("*.whl"), (tmp_path / "again").glob("*.whl")
    assert content(one) == content(other)


@pytest.mark.slow
@pytest.mark.xdist_group("Ray: fresh")
def test_the_wheel_alone_runs_as_a_checkout_does(in_tmp):
    """x and u to the byte, on both backends, in a project that has packages clients and strategies of its own."""
    build(ROOT, in_tmp / "dist", "--target", "wheel")
    (wheel,), site = (in_tmp / "dist").glob("*.whl"), in_tmp / "site"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
        str(wheel),
    ]
    subprocess.run(pip, check=True, capture_output=True)
    assert {path.name for path in site.iterdir() if path.suffix != ".dist-info"} == {"fedmom", "bin"}
    project = in_tmp / "project"
    for name, text in {"clients/__init__": "", "clients/mine": MODEL, "strategies/__init__": "raise OSError"}.items():
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / f"{name}.py").write_text(text)

    def fedmom(place: Path, *words: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(place)}
        command = [sys.executable, "-m", "fedmom", *words]
        done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return done.stdout

    short = ["--set", "run.num-rounds=2", "--set", "engine.path=loop", "--quiet"]
    for name, words in {
        "engine": ["quickstart", *short],
        "simulation": ["quickstart", *short, "--backend", "simulation", "--set", HERE],
    }.items():
        for where, place in (("wheel", site), ("checkout", ROOT)):
            fedmom(place, "run", *words, "--out", f"{name}-{where}")
        ends = [(project / f"{name}-{where}" / "final.safetensors").read_bytes() for where in ("wheel", "checkout")]
        assert ends[0] == ends[1], name
    fedmom(site, "deploy", "init", "--clients", "2")
    told = fedmom(site, "deploy", "run", "deploy", "--set", HERE, "--dry-run")
    assert f"docker build --network=host --tag fedmom {site}/fedmom/_app\n" in told
    (staged,) = (project / "deployment" / "started").glob("*-app")
    assert f"flwr run {staged} deployment" in told
    apps = ("fedmom/_app/clients/client_app.py", "fedmom/_app/strategies/server_app.py")
    for name in (*apps, "clients/mine.py", "fedmom/data/sources/digits.json"):
        assert (staged / name).is_file()
