"""The package as it is installed: what the wheel holds, and the README's five lines from another folder."""

from __future__ import annotations

import importlib.util
import os
import re
import site
import subprocess
import sys
import tomllib
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import ovam_core

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = "ovam_core/shipped"
APART = {"gradio", "SimpleCRF"}  # extras of the package; `python app.py` has both

CHECK = """
import pathlib

import ovam_core

assert [path.name for path in pathlib.Path("out").glob("mask_*.png")], "found.save wrote no masks"
assert token.names == ("cat",)
assert found.heatmaps.shape == (3, 128, 128)
print(ovam_core.__version__, ovam_core.__file__)
"""


def requirements(path: Path) -> dict[str, str]:
    """Package to versions of a requirements file, without pip's own options."""
    lines = [re.split(r" #| --", line)[0].strip() for line in path.read_text().splitlines()]
    return by_name([line for line in lines if line and line[0] not in "#-"])


def by_name(lines: list[str]) -> dict[str, str]:
    return {one.name: str(one.specifier) for one in map(Requirement, lines)}


# ------------------------------------------------------------------------------------ what is declared


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def extras(project):
    return {name: by_name(lines) for name, lines in project["optional-dependencies"].items()}


def test_the_package_needs_what_the_app_needs(project, extras):
    needed = requirements(ROOT / "requirements.txt")
    assert by_name(project["dependencies"]) == {name: needed[name] for name in needed.keys() - APART}
    assert extras["app"] | extras["crf"] == {name: needed[name] for name in APART}


def test_extras_take_the_versions_that_are_tested(extras):
    tested = requirements(ROOT / "tests" / "requirements.txt")
    assert extras.keys() == {"crf", "app", "sam", "data", "dev"}
    for name, versions in (extras["data"] | extras["dev"]).items():
        assert versions == tested.get(name, versions), name


def test_the_packages_files_are_typed():
    assert (ROOT / "ovam_core" / "py.typed").is_file()


# ------------------------------------------------------------------------------------ the wheel


def pip(*arguments: str) -> None:
    """Runs pip of this environment; what it says is shown where it fails."""
    run([sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments], ROOT)


def run(command: list[str], folder: Path) -> str:
    """What a command says, without this checkout in its way."""
    ours = {name: value for name, value in os.environ.items() if name != "PYTHONPATH" and not name.startswith("OVAM_")}
    environment = ours | {"HF_HUB_OFFLINE": "1", "OVAM_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    builder_is_here = importlib.util.find_spec("hatchling") is not None
    pip("wheel", ".", "--no-deps", "-w", str(folder), *(["--no-build-isolation"] if builder_is_here else []))
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder of programs of an environment with the wheel in it, and all else from this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    python = programs / "python"
    place = run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip()
    here = [path for path in (*site.getsitepackages(), site.getusersitepackages()) if Path(path).is_dir()]
    lines = [f"import site; site.addsitedir({path!r})" for path in here]
    (Path(place) / "of_the_tests.pth").write_text("\n".join(lines) + "\n")
    for name in ("models", "tokens"):  # as other packages bring them
        (Path(place) / name).mkdir()
    pip("--python", str(python), "install", "--no-deps", "--no-index", "--ignore-installed", str(wheel))
    return programs


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(names):
    ours = {path.relative_to(ROOT).as_posix() for path in (ROOT / "ovam_core").rglob("*.py")}
    packed = {name for name in names if name.endswith(".py")}
    assert packed == ours
    assert "ovam_core/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"ovam_core", f"ovam-{ovam_core.__version__}.dist-info"}


@pytest.mark.slow
def test_the_wheel_holds_the_embedded_model_and_its_tokens(names):
    for folder in ("models/emoji-voc", "tokens/emoji-voc"):
        here = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*") if path.is_file()}
        packed = {name.removeprefix(f"{SHIPPED}/") for name in names if name.startswith(f"{SHIPPED}/{folder}/")}
        assert packed == here
    assert any(re.fullmatch(rf"{SHIPPED}/models/emoji-voc/unet/.*\.safetensors", name) for name in names)
    assert sum(name.startswith(f"{SHIPPED}/tokens/emoji-voc/") for name in names) == 20


@pytest.mark.slow
def test_the_wheel_says_what_it_is(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("METADATA")]
        about = Parser().parsestr(archive.read(name).decode())
    assert (about["Name"], about["Version"]) == ("ovam", ovam_core.__version__)
    assert set(about.get_all("Provides-Extra")) == {"crf", "app", "sam", "data", "dev"}
    assert "## Five lines of Python" in about.get_payload()


@pytest.mark.slow
@pytest.mark.parametrize("crf", [True, False], ids=["as here", "without SimpleCRF"])
def test_the_five_lines_run_from_another_folder(installed, tmp_path, crf):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    five_lines = re.search(r"^```python\n(from ovam_core.*?)^```", readme, re.DOTALL | re.MULTILINE)[1]
    missing = "" if crf else "import sys; sys.modules['denseCRF'] = None\n"
    said = run([str(installed / "python"), "-c", missing + five_lines + CHECK], tmp_path)
    version, place = said.split()[-2:]
    assert version == ovam_core.__version__
    assert Path(place).is_relative_to(installed.parent)


@pytest.mark.slow
def test_the_command_is_installed(installed, tmp_path):
    assert "generate" in run([str(installed / "ovam"), "--help"], tmp_path)
    listed = run([str(installed / "ovam"), "tokens", "list"], tmp_path)
    assert "aeroplane" in listed
    assert "potted plant" in listed
