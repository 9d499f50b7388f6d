"""What the documents say, held against the software: Python runs, commands parse, links and files exist."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from ovam_core.cli.app import app, get_command
from ovam_core.cli.arguments import RENAMED, expand, split

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "docs" / "getting_started.ipynb"
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, *DOCS, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"]

LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMAND = re.compile(r"^(?:ovam|python -m ovam_core|accelerate launch .*-m ovam_core) +(.*)$")


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language, as they stand."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def cells(kind: str) -> list[str]:
    """The notebook's cells, "code" or "markdown"."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def named(pairs: list[tuple[Path, str]]) -> list:
    """Parameters whose ids are the page and a number."""
    return [
        pytest.param(text, id=f"{page.relative_to(ROOT)}-{number}")
        for number, (page, text) in enumerate(pairs, start=1)
    ]


def examples() -> list[tuple[Path, str]]:
    found = [(page, block) for page in (README, *DOCS) for block in blocks(page, "python")]
    return [(page, block) for page, block in found if block.startswith("from ovam_core")]


def command_lines() -> list[tuple[Path, str]]:
    """What follows the program's name, of every command in a block, and of those in the notebook's and pages' text."""
    lines = [(page, line) for page in PAGES for block in blocks(page, "bash") for line in block.splitlines()]
    for page, text in [
        *((page, page.read_text(encoding="utf-8")) for page in PAGES),
        (NOTEBOOK, "\n".join(cells("markdown"))),
    ]:
        whole = [code for code in re.findall(r"(?<!`)`(ovam [^`]+)`(?!`)", text) if "--out" in code]
        lines += [(page, code) for code in whole]
    return [(page, match[1]) for page, line in lines if (match := COMMAND.match(line.strip()))]


# ------------------------------------------------------------------------------------ Python


def test_the_readme_has_its_five_lines():
    first = next(block for page, block in examples() if page == README)
    statements = [line for line in first.splitlines() if line and not line.startswith("from ")]
    assert len(statements) == 5


@pytest.mark.slow
@pytest.mark.parametrize("block", named(examples()))
def test_python_runs_as_it_stands(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OVAM_DEVICE", "cpu")
    exec(compile(block, "block", "exec"), {"__name__": "block"})


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OVAM_DEVICE", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # other tests run beside it
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()

    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in shown) >= 8
    assert "4 of 4 images" in "".join(output.get("text", "") for output in shown)


def test_the_notebook_is_kept_without_outputs():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert code
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)


# ------------------------------------------------------------------------------------ the command line


def test_there_are_commands_of_every_kind():
    first_words = {line.split()[0] for _, line in command_lines()}
    assert first_words >= {"generate", "photo", "optimize", "tokens", "export", "evaluate"}


@pytest.mark.parametrize("line", named(command_lines()))
def test_commands_parse(line):
    command, names, rest = split(get_command(app), shlex.split(line, comments=True))
    assert names
    renamed = RENAMED.get(" ".join(names), {})
    assert not renamed.keys() & set(rest), "the documents use today's names"
    command.make_context(names[-1], expand(command, rest, renamed))


def test_options_that_the_command_line_page_names_exist():
    group = get_command(app)
    commands = [group, *group.commands.values(), *group.commands["tokens"].commands.values()]
    known = {name for command in commands for parameter in command.params for name in parameter.opts} | {"--help"}
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    launcher = {"--multi_gpu", "--num_processes"}
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) <= known | launcher


# ------------------------------------------------------------------------------------ links and files


@pytest.mark.parametrize("page", [*PAGES, NOTEBOOK], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8") if page != NOTEBOOK else "\n".join(cells("markdown"))
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, target


@pytest.mark.parametrize(
    "page", [README, *DOCS, ROOT / "CONTRIBUTING.md"], ids=lambda page: str(page.relative_to(ROOT))
)
def test_files_that_are_named_exist(page):
    folders = ("ovam_core", "tabs", "tests", "training", "benchmarks")
    files = [path.relative_to(ROOT).as_posix() for folder in folders for path in (ROOT / folder).rglob("*.*")]
    files += [path.name for path in ROOT.glob("*.*")]
    for name in re.findall(r"`([\w./-]+\.(?:py|toml|css))`", page.read_text(encoding="utf-8")):
        assert any(file == name or file.endswith("/" + name) for file in files), name


def test_every_room_is_in_the_picture():
    tree = next(block for block in blocks(ROOT / "docs" / "architecture.md", "") if block.startswith("ovam_core/"))
    drawn = {line.split()[0].rstrip("/") for line in tree.splitlines() if re.match(r"  \S", line)}
    there = {path.name for path in (ROOT / "ovam_core").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert drawn == {name for name in there if not name.startswith("__")}


def test_methods_and_families_are_all_described():
    from ovam_core.methods import METHODS
    from ovam_core.models.registry import ADAPTERS

    lines = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| `")]
    described = {row[0].strip("`"): tuple(row[-2:]) for row in rows if row[0].strip("`") in METHODS}
    assert described.keys() == METHODS.keys()
    for name, method in METHODS.items():
        if method.takes_tokens:
            words = "" if method.asks == "token" else f"{method.tau:g}, {method.alpha:g}"
            assert described[name] == (words, f"{method.token_tau:g}, {method.token_alpha:g}"), name

    families = re.findall(r"Pipeline` \|", (ROOT / "docs" / "families.md").read_text())
    assert len(families) == len(ADAPTERS)


def test_the_readme_is_a_page():
    body = README.read_text(encoding="utf-8").split("---\n", 2)[2]
    assert body.count("\n") <= 115
    assert "git clone --depth 1" in body
    assert "pip install -r requirements.txt && python app.py" in body
    assert "pip install -r tests/requirements.txt && pytest" in body
