"""How the package is built: layers without circles, a dozen public names, constants of one value; its first lines."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import ovam_core
from ovam_core import data, settings
from ovam_core.methods import METHODS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ovam_core"

# A module may import from its own layer and from those above it in this list.
LAYERS = (
    ("errors", "checks", "io", "plot", "attention"),
    ("models",),
    ("hooks",),
    ("settings", "query", "tokens", "published", "optimization"),
    ("picture",),
    ("methods",),
    ("downstream", "presence", "unlabelled"),
    ("ovam",),
    ("data",),
    ("cli", "__main__"),
)
RANKS = {room: rank for rank, layer in enumerate(LAYERS) for room in layer}
PUBLIC = {
    *("OVAM", "Picture", "Segmentation", "Token", "Method", "METHODS", "InputError", "__version__"),
    *("record", "Recording", "heatmaps", "optimize"),
}


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(file): ast.parse(file.read_text(encoding="utf-8")) for file in sorted(PACKAGE.rglob("*.py"))}


def imported(node: ast.AST, at_once: bool = False) -> Iterator[str]:
    """The modules that a syntax tree imports, TYPE_CHECKING blocks left out. at_once: functions left out, too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            for alias in child.names:
                whole = f"{child.module}.{alias.name}"
                yield whole if whole in MODULES else child.module
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from imported(other, at_once)
        elif not (at_once and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)):
            yield from imported(child, at_once)


GRAPH = {name: set(imported(tree)) for name, tree in MODULES.items()}


def room_of(module: str) -> str:
    return module.split(".")[1]


# ------------------------------------------------------------------------------------------------ imports


@pytest.mark.parametrize("module", [name for name in MODULES if name != "ovam_core"])
def test_no_arrow_against_the_layers(module):
    above = [
        one for one in GRAPH[module] if one.startswith("ovam_core.") and RANKS[room_of(one)] > RANKS[room_of(module)]
    ]
    assert not above, f"{module} imports {above} from a layer over its own"


def test_every_room_has_a_layer():
    assert {room_of(name) for name in MODULES if name != "ovam_core"} == RANKS.keys()


def test_no_import_circle():
    """Imports within functions count: a circle that is put off is one all the same."""
    left = {name: {one for one in ones if one in MODULES and one != name} for name, ones in GRAPH.items()}
    while ready := [name for name, ones in left.items() if not ones & left.keys()]:
        for name in ready:
            del left[name]
    assert not left, f"there is a circle among {sorted(left)}"


def test_the_library_knows_nothing_of_what_is_built_on_it():
    outside = {"tabs", "benchmarks", "training", "app", "tests"}
    assert {name: ones for name, found in GRAPH.items() if (ones := {x.split(".")[0] for x in found} & outside)} == {}


def test_attention_is_mathematics():
    for name, tree in MODULES.items():
        if name.startswith("ovam_core.attention"):
            assert not {one.split(".")[0] for one in imported(tree, at_once=True)} & {"diffusers", "transformers"}, name


# ------------------------------------------------------------------------------------------------ public names


def test_the_public_names():
    assert set(ovam_core.__all__) == PUBLIC
    assert len(ovam_core.__all__) == len(PUBLIC)
    assert set(dir(ovam_core)) >= PUBLIC
    for name in PUBLIC:
        assert getattr(ovam_core, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'generate'"):
        ovam_core.generate  # noqa: B018


@pytest.mark.parametrize("name", data.__all__)
def test_the_public_names_of_data(name):
    assert getattr(data, name) is not None


def test_the_package_is_imported_without_torch():
    code = "import sys, ovam_core, ovam_core.data, ovam_core.cli; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


def test_no_module_bears_the_name_of_a_public_function():
    """`from ovam_core import record` must not depend on which module came before. The command line names commands."""
    public = [(ovam_core, name) for name in ovam_core.__all__] + [(data, name) for name in data.__all__]
    functions = {name for package, name in public if inspect.isfunction(getattr(package, name))}
    assert functions
    assert not functions & {name.split(".")[-1] for name in MODULES if not name.startswith("ovam_core.cli")}


# ------------------------------------------------------------------------------------------------ constants


def literal(node: ast.AST) -> str | None:
    """The value of an expression of numbers, texts and containers of them, as text; None for any other."""
    names = [one for one in ast.walk(node) if isinstance(one, ast.Name | ast.Call | ast.Attribute | ast.comprehension)]
    return None if names else repr(eval(compile(ast.Expression(node), "<constant>", "eval")))


def constants(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(name, value) of the module's own constants with literal values."""
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        for target in targets:
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=True))
            else:
                pairs = [(target, node.value)]
            for one, value in pairs:
                if isinstance(one, ast.Name) and one.id.isupper() and not one.id.startswith("_") and value is not None:
                    found = literal(value)
                    if found is not None:
                        yield one.id, found


def test_a_constant_has_one_value():
    seen: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for module, tree in MODULES.items():
        for name, value in constants(tree):
            seen[name][value].append(module)
    assert len(seen) > 50
    assert {name: dict(values) for name, values in seen.items() if len(values) > 1} == {}


def test_the_names_of_the_methods_are_listed_without_torch():
    assert tuple(METHODS) == settings.METHOD_NAMES
    assert settings.DEFAULT_METHOD in METHODS


# ------------------------------------------------------------------------------------------------ first lines


@pytest.fixture(scope="module")
def ovam():
    return ovam_core.OVAM.from_pretrained("emoji-voc", device="cpu")


@pytest.fixture(scope="module")
def picture(ovam):
    return ovam.generate("A photograph of a cat and a car on grass", seed=1)


def test_generate_and_segment(ovam, picture, tmp_path):
    found = ovam.segment(picture, ["cat", "car", "animal"])
    assert found.labels == ["cat", "car", "animal"]
    height, width = picture.image.height, picture.image.width
    assert found.heatmaps.shape == found.masks.shape == (3, height, width)
    assert (found.heatmaps.dtype, found.masks.dtype) == (np.float32, np.bool_)
    assert found.peaks == [float(one.max()) for one in found.heatmaps]
    assert found.label_map().shape == (height, width)
    assert set(np.unique(found.label_map())) <= {0, 1, 2, 3}
    assert found.masks.any(axis=(1, 2)).all()
    assert set(found.save(tmp_path / "out")) == set((tmp_path / "out").iterdir())
    assert (tmp_path / "out" / "mask_animal.png").exists()
    assert (ovam.name, ovam.device.type) == ("emoji-voc", "cpu")


def test_a_token_of_a_mask(ovam, picture, tmp_path):
    mask = ovam.segment(picture, "cat").masks[0]
    token = ovam.optimize_token(picture, mask, "cat")
    token.save(tmp_path / "cat.safetensors")
    again = ovam_core.Token.load(tmp_path / "cat.safetensors")
    assert again.names == ("cat",)
    found = ovam.segment(picture, [again, "car"])
    assert sorted(found.labels) == ["car", "cat"]
    ours = found.masks[found.labels.index("cat")]
    assert (ours & mask).sum() / (ours | mask).sum() > 0.5


def test_a_photograph(ovam, picture, tmp_path):
    picture.image.save(tmp_path / "street.jpg", quality=95)
    photo = ovam.photograph(tmp_path / "street.jpg", caption="a cat and a car")
    found = ovam.segment(photo, ["cat"], method="GoCA, any word")
    assert found.masks.shape == (1, *found.label_map().shape)
    assert ovam.segment(photo, ["cat"]).labels == ["cat"]


def test_a_run_of_the_pipeline_itself(ovam):
    with ovam_core.record(ovam.pipe) as recorder:
        image = ovam.pipe("A photograph of a cat", num_inference_steps=3, width=128, height=128).images[0]
    made = ovam_core.Picture(image, recorder.recordings[0])
    found = ovam.segment(made, ["cat"])
    assert found.heatmaps.shape == (1, 128, 128)
    with pytest.raises(ovam_core.InputError, match="was not recorded"):
        ovam.segment(made, ["cat"], method="GoCA, any word")
    own = ovam_core.heatmaps(recorder.recordings[0], ovam.queries(found.settings)[0].prompt.embedding)
    assert own.shape[0] == len(ovam.queries(found.settings)[0].prompt.embedding)
