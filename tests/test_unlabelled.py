"""Learning on from pictures without masks, and tokens with rivals."""

from __future__ import annotations

import json
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ovam_core import OVAM, InputError, Token, heatmaps, optimize
from ovam_core.attention.mask import label_map
from ovam_core.cli import main
from ovam_core.cli.progress import EpochBar
from ovam_core.data.annotated import by_class, learn_together, read_folder
from ovam_core.io.token_files import list_token
from ovam_core.models.presets import recommended_part
from ovam_core.optimization import OptimizeSettings, initial_embedding
from ovam_core.settings import RECIPES
from ovam_core.unlabelled import COMPANIONS, Unlabelled, companions, lesson, own_labels, scenes

QUICK = ["--model", "emoji-voc", "--device", "cpu"]
FEW = OptimizeSettings(epochs=3)
SMALL = {"num_inference_steps": 2, "width": 96, "height": 64}
TEMPLATE = "A photograph of a {}"


@pytest.fixture(scope="module")
def ovam():
    return OVAM.from_pretrained("emoji-voc", "cpu")


@pytest.fixture(scope="module")
def picture(ovam):
    return ovam.generate("A photograph of a cat", seed=1, **SMALL)


def mask_of(picture):
    mask = np.zeros((picture.image.height, picture.image.width), bool)
    mask[16:48, 24:72] = True
    return mask


@pytest.fixture
def folder(tmp_path):
    Image.fromarray(np.uint8(255) * mask_of(SimpleNamespace(image=Image.new("RGB", (96, 64))))).save(tmp_path / "m.png")
    row = {"mask": "m.png", "steps": 2, "width": 96, "height": 64}
    rows = [
        row | {"prompt": f"A photograph of a {name}", "class": name, "seed": seed}
        for seed, name in enumerate(("cat", "dog", "bus"))
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(one) for one in rows))
    return tmp_path


# ------------------------------------------------------------------------------------------------ what is made


def test_each_class_in_turn_beside_one_or_two_others():
    planned = scenes(["cat", "dog"], ["bus", "car", "cat food", "bus"], 40, seed=3)
    assert planned == scenes(["cat", "dog"], ["bus", "car", "cat food", "bus"], 40, seed=3)
    assert planned != scenes(["cat", "dog"], ["bus", "car"], 40, seed=4)
    for number, scene in enumerate(planned):
        assert ("cat", "dog")[number % 2] in scene.names
        assert len(set(scene.names)) == len(scene.names) in (2, 3)
        assert set(scene.names) <= {"cat", "dog", "bus", "car"}  # "cat food" names a cat
    assert {len(scene.names) for scene in planned} == {2, 3}
    assert len({scene.seed for scene in planned}) == 40
    assert {scene.names.index("cat") for scene in planned[::2]} == {0, 1, 2}
    assert scenes(["owl"], ["elephant"], 1)[0].prompt in (
        "A photograph of an owl and an elephant",
        "A photograph of an elephant and an owl",
    )


def test_what_stands_beside_is_no_word_of_the_class():
    assert companions(["sports cars"], COMPANIONS) == tuple(name for name in COMPANIONS if name != "car")


def test_one_name_may_stand_without_a_list():
    assert companions(["cat"], "dog") == ("dog",)


def test_the_same_name_twice_is_one_thing():
    assert companions(["cat"], ["dog", " Dog ", "bus", "red  bus", "red bus"]) == ("dog", "bus", "red bus")


def test_more_things_than_a_token_has_rows_for():
    many = [f"thing{number}" for number in range(80)]
    assert len(scenes(["cat"], many, 8)) == 8
    with pytest.raises(InputError, match="a token has rows for 32"):
        scenes(["cat"], many, 40)


@pytest.mark.parametrize("among", [[3], [None], ["dog", ""], " "])
def test_what_is_no_name(among):
    with pytest.raises(InputError, match="give names"):
        companions(["cat"], among)


@pytest.mark.parametrize("count", [0, -1, 65, 2.5, True, float("nan")])
def test_counts_that_are_refused(count):
    with pytest.raises(InputError, match="number of pictures without masks"):
        scenes(["cat"], COMPANIONS, count)


def test_nothing_to_stand_beside():
    with pytest.raises(InputError, match="Nothing is left to stand beside 'cat'"):
        scenes(["cat"], ["black cat"], 1)


def test_where_masks_meet_the_stronger_map_wins():
    maps = np.array([[[0.9, 0.2, 0.1]], [[0.1, 0.4, 0.2]], [[0.1, 0.1, 0.3]]], np.float32)
    masks = np.array([[[1, 1, 0]], [[0, 1, 1]], [[0, 0, 1]]], bool)
    found = SimpleNamespace(labels=["dog", "cat", "bus"], heatmaps=maps, masks=masks)
    names = ["cat", "bus", "dog"]
    assert own_labels(found, names).tolist() == [[3, 1, 2]]
    assert own_labels(found, names, {"cat"}).tolist() == [[3, 255, 2]]
    masks[2] = False
    assert own_labels(found, names, {"cat", "dog"}).tolist() == [[255, 255, 255]]


def test_a_lesson_weighs_and_numbers_what_is_shown():
    first, made = (
        np.array([[0, 1, 255]], np.uint8),
        [np.array([[255, 4, 1]], np.uint8), np.array([[4, 2, 2]], np.uint8)],
    )
    whole = lesson(["a", "b"], [first, first], ["cat"], Unlabelled(("c", "d"), tuple(made), ("cat", "x", "y", "z")))
    assert whole.pictures == ("a", "b", "c", "d")
    assert whole.weights == (1, 1, 4, 4)
    assert whole.rivals == ("x", "z")
    assert [target.tolist() for target in whole.targets[2:]] == [[[255, 3, 1]], [[3, 2, 2]]]
    assert whole.targets[0] is first
    more = lesson(["a"], [first], ["cat"], Unlabelled(("c", "d"), tuple(made), ("cat", "x", "y", "z")))
    assert more.weights == (1, 2, 2)
    assert lesson(["a"], [first], ["cat"], Unlabelled((), (), ("cat",))).rivals == ()


def test_pictures_are_labelled_by_their_names(ovam, picture):
    seen = []
    made = ovam.unlabelled(["cat"], 2, ["dog", "bus"], like=picture.settings, on_picture=lambda *so: seen.append(so))
    assert seen == [(0, 2), (1, 2)]
    assert made.names == ("cat", "dog", "bus")
    for scene, one, labels in zip(scenes(["cat"], ["dog", "bus"], 2), made.pictures, made.labels, strict=True):
        assert (one.settings.prompt, one.settings.seed, one.settings.steps) == (scene.prompt, scene.seed, 2)
        again = ovam.generate(scene.prompt, seed=scene.seed, **SMALL)
        assert np.array_equal(np.asarray(again.image), np.asarray(one.image))
        found = ovam.segment(again, scene.names, template=TEMPLATE)
        ids = [
            255 if ovam.is_absent(x) else made.names.index(name) + 1
            for name, x in zip(found.labels, found.presence, strict=True)
        ]
        assert np.array_equal(labels, label_map(found.heatmaps, found.masks, ids))


# ------------------------------------------------------------------------------------------------ what is learned


def test_a_token_learned_on(ovam, picture, monkeypatch):
    monkeypatch.setitem(RECIPES, "fast", FEW)
    mask = mask_of(picture)
    token = ovam.optimize_token(picture, mask, "cat", unlabelled=2, among=["dog", "bus"])
    made = ovam.unlabelled(["cat"], 2, ["dog", "bus"], like=picture.settings)
    whole = lesson([picture], [mask.astype(np.uint8)], ["cat"], made)
    found = optimize(
        [recommended_part(ovam.pipe, one.recording) for one in whole.pictures],
        whole.targets,
        initial_embedding(ovam.pipe, ["cat", *whole.rivals]),
        FEW,
        weights=whole.weights,
    )
    torch.testing.assert_close(token.embedding, found.embedding)
    assert token.names == ("cat",)
    assert token.classes == ("background", "cat", *whole.rivals)
    assert token.rivals == len(whole.rivals)
    about = json.loads(token.settings)["optimization"]
    assert (about["images"], about["unlabelled"]) == (1, 2)
    assert (token.prompt, token.seed) == ("A photograph of a cat", 1)


def test_rivals_compete_and_get_no_map(ovam, picture, tmp_path):
    embedding = initial_embedding(ovam.pipe, ["cat", "dog", "bus"])
    token = Token(embedding, ("background", "cat", "dog", "bus"), "emoji-voc", rivals=2)
    found = ovam.segment(picture, [token], crf=False)
    assert found.labels == ["cat"]
    expected = heatmaps(recommended_part(ovam.pipe, picture.recording), embedding)[1].numpy()
    np.testing.assert_allclose(found.grid_maps[0], expected, atol=1e-5)
    read = Token.load(token.save(tmp_path / "cat.safetensors"))
    assert (read.names, read.classes, read.rivals) == (("cat",), token.classes, 2)
    assert read.to_bytes() == (tmp_path / "cat.safetensors").read_bytes()
    listed = list_token(tmp_path / "cat.safetensors")
    assert (listed.names, listed.shape) == (("cat",), (4, 256))


@pytest.mark.parametrize("rivals", [-1, 3, 4, 99])
def test_a_token_of_rivals_alone(ovam, rivals):
    embedding = initial_embedding(ovam.pipe, ["cat", "dog", "bus"])
    with pytest.raises(InputError, match="no class is left"):
        Token(embedding, ("background", "cat", "dog", "bus"), "emoji-voc", rivals=rivals).validate()


def test_classes_of_a_folder_in_one_search(ovam, folder):
    groups = by_class(read_folder(folder, ovam))
    learned = {name: token for name, token, _ in learn_together(ovam, groups, FEW, 1)}
    assert list(learned) == ["cat", "dog", "bus"]
    classes = ("cat", "dog", "bus")
    own = [ovam.draw(examples[0].image) for examples in groups.values()]
    target = mask_of(own[0]).astype(np.uint8)
    made = ovam.unlabelled(classes, 3, (), like=own[0].settings)
    assert made.names == classes
    recordings = [recommended_part(ovam.pipe, one.recording) for one in (*own, *made.pictures)]
    targets = [target, 2 * target, 3 * target, *made.labels]
    found = optimize(recordings, targets, initial_embedding(ovam.pipe, classes), FEW, weights=[1 / 3] * 3 + [4 / 3] * 3)
    for row, name in enumerate(classes):
        token = learned[name]
        torch.testing.assert_close(token.embedding[:2], found.embedding[[0, row + 1]])
        assert token.classes == ("background", name, *(other for other in classes if other != name))
        assert token.prompt == f"A photograph of a {name}"
        map_ = heatmaps(recordings[0], token.embedding)[1]
        torch.testing.assert_close(map_, heatmaps(recordings[0], found.embedding)[row + 1], atol=1e-5, rtol=1e-4)


def test_one_class_has_no_rival(ovam, folder):
    groups = by_class(read_folder(folder, ovam))
    with pytest.raises(InputError, match="two or more; there is 1"):
        next(learn_together(ovam, {"cat": groups["cat"]}, FEW))


# ------------------------------------------------------------------------------------------------ the command line


def test_on_the_command_line(folder, tmp_path):
    mask, out = str(folder / "m.png"), tmp_path / "cat.safetensors"
    what = ["--prompt", "A photograph of a cat", "--mask", mask, "--class", "cat", "--steps", "2", "--size", "96x64"]
    more = ["--unlabelled", "1", "--among", "dog", "--epochs", "2", "--out", str(out), *QUICK]
    assert main(["optimize", *what, *more]) == 0
    assert Token.load(out).names == ("cat",)
    assert json.loads(Token.load(out).settings)["optimization"]["unlabelled"] == 1
    all_of_them = ["--annotated", str(folder), "--together", "--epochs", "2", "--out", str(tmp_path / "all"), *QUICK]
    assert main(["optimize", *all_of_them]) == 0
    assert Token.load(tmp_path / "all/dog.safetensors").classes == ("background", "dog", "cat", "bus")


def test_a_stop_keeps_the_tokens_of_all_classes(folder, tmp_path, monkeypatch):
    """They are of one search, which Ctrl-C ends."""
    monkeypatch.setattr(EpochBar, "show", lambda _bar, epoch: signal.raise_signal(signal.SIGINT))
    asked = ["--annotated", str(folder), "--together", "--epochs", "50", "--out", str(tmp_path / "all"), *QUICK]
    assert main(["optimize", *asked]) == 130
    found = {path.stem: Token.load(path) for path in (tmp_path / "all").glob("*.safetensors")}
    assert set(found) == {"cat", "dog", "bus"}
    assert {json.loads(token.settings)["optimization"]["epochs"] for token in found.values()} == {1}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--image-set", "/no/such", "--together"], "add --annotated"),
        (["--image-set", "/no/such", "--unlabelled", "65"], "The number of pictures without masks is 65"),
        (["--image-set", "/no/such", "--unlabelled", "-1"], "The number of pictures without masks is -1"),
        (["--image-set", "/no/such", "--among", "dog"], "it goes with --unlabelled"),
        (["--annotated", "/no/such", "--together", "--unlabelled", "1", "--among", "dog"], "and not with --together"),
    ],
)
def test_options_that_do_not_go_together(options, said, capsys):
    assert main(["optimize", *options, "--out", "x", *QUICK]) == 2
    assert said in capsys.readouterr().err
