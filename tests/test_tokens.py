"""Token files: round trip, refusals, the library; importing NumPy files without running what they say."""

from __future__ import annotations

import json
import pickle
import struct
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from reference import generate
from safetensors.torch import save_file

from ovam_core import OVAM, heatmaps, record, tokens
from ovam_core.attention.heatmap import attribute
from ovam_core.errors import InputError
from ovam_core.query import attribute_sentence, token_prompt
from ovam_core.tokens import Token

CAT = Token(
    torch.randn(2, 32, generator=torch.Generator().manual_seed(3)),
    ("background", "cat"),
    "tiny",
    "conditional",
    0.7,
    0.9,
    25,
    "A photograph of a cat, “näher”",
    4,
    "A photograph of a cat",
    0.123456789,
    "{}",
)


@pytest.fixture
def cat(tmp_path):
    return CAT.save(tmp_path / "cat.safetensors")


@pytest.fixture
def named(fresh):
    fresh.ovam_name = "tiny"
    return fresh


def published(path, protocol=4):
    """A file of the published one's structure: a pickled dict of 20 float32 arrays of 768 in an array of one object."""
    names = ["potted-plant", "dining-table", "tv", *[f"class-{n}" for n in range(17)]]
    rng = np.random.default_rng(0)
    content = {name: rng.standard_normal(768).astype(np.float32) for name in names}
    array = np.array(content, dtype=object)
    with open(path, "wb") as file:
        header = {"descr": "|O", "fortran_order": False, "shape": ()}
        np.lib.format.write_array_header_1_0(file, header)
        pickle.dump(array, file, protocol=protocol)
    return content


# ------------------------------------------------------------------------------------------------ files


def test_round_trip_is_exact(cat):
    again = Token.load(cat)
    assert torch.equal(again.embedding, CAT.embedding)
    assert again.embedding.dtype == torch.float32
    assert again.source == again.to_bytes() == cat.read_bytes()
    assert replace(again, embedding=CAT.embedding, source=None).__dict__ == CAT.__dict__


def test_a_token_that_says_little(tmp_path):
    bare = Token(torch.ones(1, 8), ("cat",), "m")
    again = Token.load(bare.save(tmp_path / "x.safetensors"))
    assert (again.steps, again.seed, again.loss, again.tau, again.alpha) == (None, None, None, 0.8, 0.95)
    assert again.names == ("cat",)


def test_the_file_is_plain_safetensors_with_strings(cat):
    data = cat.read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    about = header["__metadata__"]
    assert header["embedding"]["shape"] == [2, 32]
    assert header["embedding"]["dtype"] == "F32"
    assert all(isinstance(value, str) for value in about.values())
    assert json.loads(about["classes"]) == ["background", "cat"]
    assert {
        "format",
        "model",
        "classes",
        "branch",
        "tau",
        "alpha",
        "steps",
        "prompt",
        "seed",
        "init",
        "loss",
        "settings",
    } == set(about)


def broken(path, **changes):
    about = {
        "format": tokens.TOKEN_FORMAT,
        "model": "m",
        "classes": '["background", "cat"]',
        "branch": "conditional",
        "tau": "0.8",
        "alpha": "0.95",
    }
    about |= {key: value for key, value in changes.items() if key != "embedding"}
    save_file({"embedding": changes.get("embedding", torch.ones(2, 8))}, path, about)
    return path


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"format": "other/1"}, "not a token"),
        ({"classes": '["cat"]'}, "2 rows but 1"),
        ({"classes": "cat"}, "cannot be used"),
        ({"classes": "[" * 100_000}, "lacks a setting"),
        ({"classes": '["background", 3]'}, "class name"),
        ({"classes": '["background", "a\\u0000b"]'}, "class name"),
        ({"classes": '["cat", "dog"]'}, "background"),
        ({"classes": '["background", "background"]'}, "twice"),
        ({"branch": "sideways"}, "branch"),
        ({"tau": "nan"}, "tau"),
        ({"tau": "much"}, "cannot be used"),
        ({"alpha": "7"}, "alpha"),
        ({"seed": "x"}, "cannot be used"),
        ({"embedding": torch.ones(2, 8) * float("nan")}, "not finite"),
        ({"embedding": torch.ones(2)}, "rows, width"),
    ],
)
def test_files_that_are_no_token(tmp_path, changes, part):
    with pytest.raises(InputError, match=part) as caught:
        Token.load(broken(tmp_path / "x.safetensors", **changes))
    assert "\n" not in str(caught.value)


def test_truncated_strange_missing_and_huge_files(cat, tmp_path):
    data = cat.read_bytes()
    for cut in (0, 4, 40, len(data) - 1):
        (tmp_path / "cut.safetensors").write_bytes(data[:cut])
        with pytest.raises(InputError, match="not a whole safetensors file"):
            Token.load(tmp_path / "cut.safetensors")
    (tmp_path / "pickle.safetensors").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(InputError, match="not a whole safetensors file"):
        Token.load(tmp_path / "pickle.safetensors")
    save_file({"weights": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="not a token"):
        Token.load(tmp_path / "model.safetensors")
    with open(tmp_path / "huge.safetensors", "wb") as file:
        file.truncate(1 << 40)  # a sparse file: its size is looked at before its content
    with pytest.raises(InputError, match="bytes; a token has at most"):
        Token.load(tmp_path / "huge.safetensors")
    for path in (tmp_path / "none.safetensors", tmp_path, "x\0y", "/dev/zero"):
        with pytest.raises(InputError, match="no token file"):
            Token.load(path)


def test_a_file_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="Cannot write"):
        CAT.save(tmp_path / "file" / "cat.safetensors")
    with pytest.raises(InputError, match="not finite"):
        replace(CAT, embedding=CAT.embedding * float("inf")).save(tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_library(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "FOLDER", tmp_path)
    assert tokens.library("owner/model") == {}
    folder = tokens.folder_for("owner/model")
    assert folder == tmp_path / "model" == tokens.folder_for("/somewhere/else/model/")
    for name in ("potted plant", "aeroplane"):
        token = replace(CAT, classes=("background", name))
        token.save(folder / tokens.file_name(token.names))
    (folder / "broken.safetensors").write_bytes(b"no")
    with pytest.warns(UserWarning, match="broken"):
        found = tokens.library("owner/model")
    assert list(found) == ["aeroplane", "potted plant"]
    assert found["potted plant"].source == (folder / "potted-plant.safetensors").read_bytes()
    assert found["potted plant"].names == ("potted plant",)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/", "...", "C:\\x", "", "猫", "a" * 500])
def test_names_cannot_leave_the_folder(name):
    assert "/" not in tokens.file_name([name])
    assert "\\" not in tokens.file_name([name])
    assert len(tokens.file_name([name])) < 120
    folder = tokens.folder_for(name)
    assert folder.parent == tokens.FOLDER
    assert folder.name not in ("", ".", "..")


# -------------------------------------------------------------------------------------------------- use


def test_a_token_asks_for_its_classes_only(named):
    with record(named) as recorder:
        generate(named, steps=2)
    three = replace(CAT, embedding=torch.randn(3, 32), classes=("background", "cat", "dog"))
    asked = token_prompt(named, three)
    assert asked.labels == ("cat", "dog")
    assert torch.equal(attribute(recorder.recordings[0], asked), heatmaps(recorder.recordings[0], three.embedding)[1:])


def test_a_row_alone_gets_the_encoders_start_as_background(named):
    asked = token_prompt(named, Token(torch.ones(1, 32), ("cat",), "tiny"))
    start = attribute_sentence(named, "the red bus").embedding[0]
    torch.testing.assert_close(asked.embedding, torch.stack([start, torch.ones(32)]))
    assert asked.groups == ((1,),)
    assert asked.labels == ("cat",)


def test_another_width_is_refused_and_another_model_warned_about(named):
    with pytest.raises(InputError, match="is 8 wide and this model takes 32"):
        token_prompt(named, Token(torch.ones(2, 8), ("background", "cat"), "tiny"))
    with pytest.warns(UserWarning, match="made with other"):
        token_prompt(named, replace(CAT, model="other"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        token_prompt(named, replace(CAT, model="somebody/tiny"))  # a fork keeps the last part of the name


def test_a_token_of_a_pipeline_without_a_name(fresh):
    """It cannot be told from the one that it was made with."""
    assert OVAM(fresh).name == "unknown"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        token_prompt(fresh, replace(CAT, model="unknown"))
        token_prompt(fresh, replace(CAT, model="other"))
    fresh.register_to_config(_name_or_path="runwayml/stable-diffusion-v1-5")  # as diffusers' from_pretrained does
    assert OVAM(fresh).name == "runwayml/stable-diffusion-v1-5"
    with pytest.warns(UserWarning, match="not with runwayml"):
        token_prompt(fresh, replace(CAT, model="other"))


# ------------------------------------------------------------------------------------ import and export


@pytest.mark.parametrize("protocol", [3, 4])  # what NumPy has written into .npy files over the years
def test_the_published_structure(tmp_path, protocol):
    content = published(tmp_path / "tokens_VOC.npy", protocol)
    made = tokens.import_file(tmp_path / "tokens_VOC.npy", "owner/sd", branch="unconditional")
    assert [token.classes for token in made][:3] == [("potted plant",), ("dining table",), ("tv",)]
    assert len(made) == 20
    assert all(token.branch == "unconditional" for token in made)
    for token, values in zip(made, content.values(), strict=True):
        assert np.array_equal(token.embedding.numpy(), values[None])
        assert (token.tau, token.alpha, token.model) == (0.8, 0.95, "owner/sd")


def test_numpys_own_way_of_saving(tmp_path):
    content = {"cat": np.arange(6, dtype=">f8").reshape(2, 3, order="F"), "dog": np.ones((1, 3), np.float16)}
    np.save(tmp_path / "two.npy", content, allow_pickle=True)
    cat, dog = tokens.import_file(tmp_path / "two.npy", "m")
    assert cat.classes == ("background", "cat")
    assert cat.embedding.tolist() == [[0, 2, 4], [1, 3, 5]]
    assert dog.classes == ("dog",)
    assert dog.embedding.tolist() == [[1, 1, 1]]
    np.save(tmp_path / "dining-table.npy", np.ones((2, 5)))
    (table,) = tokens.import_file(tmp_path / "dining-table.npy", "m")
    assert table.classes == ("background", "dining table")
    np.save(tmp_path / "x.npy", np.ones((3, 5), np.float32))
    with pytest.raises(InputError, match="3 rows but 2"):
        tokens.import_file(tmp_path / "x.npy", "m")
    (both,) = tokens.import_file(tmp_path / "x.npy", "m", classes=["cat", "dog"])
    assert both.classes == ("background", "cat", "dog")


class Evil:
    def __reduce__(self):
        return (open, ("pwned", "w"))


class Setting:
    """A NumPy name, but given what NumPy never gives."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return self.arguments


def pickled(path, content):
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
        file.write(content if isinstance(content, bytes) else pickle.dumps(content, protocol=4))
    return path


MALICIOUS = {
    "a call": Evil(),
    "a call inside": {"cat": Evil()},
    "a call in an array": np.array({"cat": np.array([Evil()], dtype=object)}, dtype=object),
    "os.system": b"cos\nsystem\n(S'touch pwned'\ntR.",
    "builtins": b'cbuiltins\neval\n(S\'open("pwned","w")\'\ntR.',
    "a numpy function that writes": b"cnumpy\nsave\n(S'pwned'\nI1\ntR.",
    "a numpy attribute path": b"\x80\x04\x8c\x05numpy\x8c\x0bcore.os.name\x93.",
    "numpy testing": b"cnumpy.testing._private.utils\nrunstring\n(S'1'\n}tR.",
    "an endless array": np.array({"cat": Setting(np.ndarray, ((10**12,), "f8"))}, dtype=object),
    "a persistent id": b"Pevil\n.",
    "state on a class": b"cnumpy\nndarray\n}S'x'\nI1\nsb.",
    "nothing": b"",
    "no dictionary": [1, 2],
    "an empty dictionary": {},
    "words": {"cat": "dog"},
    "numbers as keys": {1: np.ones(3)},
    "complex numbers": {"cat": np.ones(3, complex)},
    "nested": {"cat": {"dog": np.ones(3)}},
}


@pytest.mark.parametrize("case", MALICIOUS)
def test_pickles_that_hold_anything_else_are_refused_before_they_run(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        tokens.import_file(pickled(tmp_path / "x.npy", MALICIOUS[case]), "m")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("pwned*"))


def test_the_unpickler_would_have_been_fooled_otherwise(tmp_path, monkeypatch):
    """The attack is a real one: the standard unpickler falls for it."""
    monkeypatch.chdir(tmp_path)
    np.load(pickled(tmp_path / "x.npy", {"cat": Evil()}), allow_pickle=True)
    assert (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (b"", "not a whole NumPy file"),
        (b"\x93NUMPY\x01\x00\x10\x00", "not a whole NumPy file"),
        (b"\x93NUMPY\x09\x00" + b" " * 80, "not a whole NumPy file"),
    ],
)
def test_files_that_are_not_numpys(tmp_path, data, part):
    (tmp_path / "x.npy").write_bytes(data)
    with pytest.raises(InputError, match=part):
        tokens.import_file(tmp_path / "x.npy", "m")


def test_plain_arrays_that_are_no_token(tmp_path):
    for array, part in [
        (np.ones((2, 3, 4)), "one or two dimensions"),
        (np.ones((0, 4)), "one or two dimensions"),
        (np.array(["cat"]), "arrays of numbers"),
        (np.full((2, 4), np.nan), "not finite"),
    ]:
        np.save(tmp_path / "x.npy", array)
        with pytest.raises(InputError, match=part):
            tokens.import_file(tmp_path / "x.npy", "m")
    with open(tmp_path / "liar.npy", "wb") as file:  # promises a terabyte
        np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": (2, 10**11)})
        file.write(b"0" * 64)
    with pytest.raises(InputError, match="not whole"):
        tokens.import_file(tmp_path / "liar.npy", "m")


def test_export_for_other_scripts(tmp_path):
    tokens.export_npy(CAT, tmp_path / "cat.npy")
    array = np.load(tmp_path / "cat.npy", allow_pickle=False)
    assert array.shape == (1, 32)
    assert array.dtype == np.float32
    assert np.array_equal(array[0], CAT.embedding[1].numpy())
    (again,) = tokens.import_file(tmp_path / "cat.npy", "tiny")
    assert again.classes == ("cat",)
    assert torch.equal(again.embedding, CAT.embedding[1:])
    two = replace(CAT, embedding=torch.randn(3, 32), classes=("background", "cat", "dog"))
    with pytest.raises(InputError, match="say which"):
        tokens.export_npy(two, tmp_path / "x.npy")
    with pytest.raises(InputError, match="no class 'cow'"):
        tokens.export_npy(two, tmp_path / "x.npy", "cow")
    tokens.export_npy(two, tmp_path / "x.npy", "dog")
    assert np.array_equal(np.load(tmp_path / "x.npy")[0], two.embedding[2].numpy())
