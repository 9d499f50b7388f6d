"""From prompt, seed and mask to a token file: the folder, the command line, the script that makes the shipped set."""

from __future__ import annotations

import json
import signal
from dataclasses import replace

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from reference import assert_refused

from ovam_core import tokens
from ovam_core.cli import main
from ovam_core.cli.progress import EpochBar
from ovam_core.data import annotated
from ovam_core.data.annotated import Example, by_class, check_same, learn, read_annotated, read_folder
from ovam_core.errors import InputError
from ovam_core.io import token_files
from ovam_core.io.masks import read_mask
from ovam_core.models.load import load_pipeline
from ovam_core.models.presets import recommended_part
from ovam_core.optimization import RECIPES, OptimizeSettings, initial_embedding, optimize
from ovam_core.ovam import OVAM
from ovam_core.picture import load_settings
from ovam_core.query import branch_of
from ovam_core.settings import GenerateSettings, SegmentSettings
from ovam_core.tokens import Token

QUICK = ["--model", "emoji-voc", "--device", "cpu"]
PROMPT = "A photograph of a cat"
FEW = OptimizeSettings(epochs=3)


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline("emoji-voc", "cpu")


@pytest.fixture
def mask(tmp_path):
    values = np.zeros((64, 96), np.uint8)
    values[16:48, 24:72] = 255
    Image.fromarray(values).save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


def image(pipe, seed=1, **more):
    return GenerateSettings.for_model(pipe, PROMPT, **({"seed": seed, "steps": 2, "width": 96, "height": 64} | more))


@pytest.fixture
def folder(pipe, mask):
    """Two images of a cat, one of a dog; the first one's picture is kept, as JPEG."""
    made = OVAM(pipe).draw(image(pipe))
    made.image.save(mask.parent / "cat.jpg", quality=92)
    row = {"prompt": PROMPT, "mask": "mask.png", "steps": 2, "width": 96, "height": 64}
    rows = [
        row | {"seed": 1, "class": "cat", "file_name": "cat.jpg"},
        row | {"seed": 2, "classes": ["cat"]},
        row | {"seed": 3, "class": "dog", "guidance": 1.5},
    ]
    write(mask.parent, rows)
    return mask.parent


def write(folder, rows):
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")


# ------------------------------------------------------------------------------------------- the functions


def test_a_token_says_how_it_came_to_be(pipe, mask):
    settings = replace(FEW, proximity=0.5)
    token, found = learn(OVAM(pipe), [Example(image(pipe), mask, ("cat",))], settings, tau=0.6)
    assert token.classes == ("background", "cat")
    assert token.model == "emoji-voc"
    assert token.branch == "conditional"
    assert (token.prompt, token.seed, token.steps, token.loss) == (PROMPT, 1, 2, found.loss)
    assert (token.tau, token.alpha) == (0.6, 0.95)
    assert torch.equal(token.embedding, found.embedding)
    about = json.loads(token.settings)
    assert about["image"]["width"] == 96
    assert about["optimization"]["stay"] == 0.5
    assert about["optimization"]["epochs"] == 3


def test_learning_is_generating_and_optimising(pipe, mask):
    token, _ = learn(OVAM(pipe), [Example(image(pipe), mask, ("cat",)), Example(image(pipe, 2), mask, ("cat",))], FEW)
    recordings = [recommended_part(pipe, OVAM(pipe).draw(image(pipe, seed)).recording) for seed in (1, 2)]
    found = optimize(recordings, [read_mask(mask, (64, 96))] * 2, initial_embedding(pipe, ["cat"]), FEW)
    torch.testing.assert_close(token.embedding, found.embedding)


def test_the_other_half_of_the_batch(pipe, mask):
    token, _ = learn(OVAM(pipe), [Example(image(pipe), mask, ("cat",))], FEW, branch="unconditional")
    assert token.branch == "unconditional"


def test_reading_a_folder(pipe, folder):
    rows = read_folder(folder, OVAM(pipe))
    assert [one.classes for one in rows] == [("cat",), ("cat",), ("dog",)]
    assert rows[0].image == image(pipe)
    assert rows[0].file == folder / "cat.jpg"
    assert rows[1].file is None
    assert rows[2].image == image(pipe, 3, guidance=1.5)
    assert {name: len(group) for name, group in by_class(rows).items()} == {"cat": 2, "dog": 1}
    with pytest.raises(InputError, match="must all name the same class"):
        learn(OVAM(pipe), rows, FEW)


def test_a_kept_image_must_be_the_one_made_again(pipe, folder):
    made = OVAM(pipe).draw(image(pipe))
    check_same(made, folder / "cat.jpg")
    noise = np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)
    Image.fromarray(noise).save(folder / "cat.jpg")
    with pytest.raises(InputError, match="is not what emoji-voc makes from its prompt and seed"):
        check_same(made, folder / "cat.jpg")
    Image.fromarray(noise[:32]).save(folder / "cat.jpg")
    with pytest.raises(InputError, match="96x32 and the one made again is 96x64"):
        check_same(made, folder / "cat.jpg")
    with pytest.raises(InputError, match="cannot be read"):
        check_same(made, folder / "none.jpg")


BAD_ROWS = {
    "no prompt": ({"prompt": None}, "Line 1"),
    "no mask": ({"mask": None}, "Line 1"),
    "bad seed": ({"seed": -4}, "seed is -4"),
    "bad steps": ({"steps": "many"}, "steps is many"),
    "class of a wrong kind": ({"class": [3]}, "class must be a name"),
    "mask elsewhere": ({"mask": "../mask.png"}, "outside of the folder"),
    "mask from the root": ({"mask": "/etc/passwd"}, "outside of the folder"),
    "image elsewhere": ({"file_name": "a/../../x.jpg"}, "outside of the folder"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_rows_that_cannot_be_used(pipe, folder, case):
    change, part = BAD_ROWS[case]
    write(folder, [{"prompt": PROMPT, "mask": "mask.png", "seed": 1, "class": "cat"} | change])
    with pytest.raises(InputError, match=part):
        read_folder(folder, OVAM(pipe))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"prompt": "a cat"}', "[" * 100_000, "\xff"])
def test_metadata_of_something_else(pipe, tmp_path, text):
    (tmp_path / "metadata.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError) as caught:
        read_folder(tmp_path, OVAM(pipe))
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"no metadata\.jsonl"):
        read_folder(tmp_path / "none", OVAM(pipe))


# ------------------------------------------------------------------------------------------ words and tokens


@pytest.fixture(scope="module")
def made(pipe):
    return OVAM(pipe).draw(image(pipe))


def token_of(pipe, name="cat", **more) -> Token:
    return Token(initial_embedding(pipe, [name]), ("background", name), "emoji-voc", **more)


def test_tokens_are_asked_beside_words(pipe, made):
    token = token_of(pipe, tau=0.9, alpha=1.0)
    answer = OVAM(pipe).answer(made, SegmentSettings(("cat", "dog"), tokens=(token,), crf=False))
    assert answer.labels == ["cat", "dog", "cat (token)"]
    words = OVAM(pipe).answer(made, SegmentSettings(("cat", "dog"), crf=False))
    np.testing.assert_allclose(answer.heatmaps[:2], words.heatmaps, atol=1e-6)
    assert np.array_equal(answer.masks[:2], words.masks)
    alone = OVAM(pipe).answer(made, SegmentSettings(tokens=(token,), crf=False))
    assert alone.labels == ["cat"]
    np.testing.assert_allclose(answer.heatmaps[2:], alone.heatmaps, atol=1e-6)
    own = OVAM(pipe).answer(made, SegmentSettings(tokens=(token,), token_tau=0.2, token_alpha=0.5, crf=False))
    assert own.masks.sum() > alone.masks.sum()
    assert np.array_equal(alone.heatmaps, own.heatmaps)


def test_a_token_changed_under_its_name_is_asked_anew(pipe, made, tmp_path):
    file = token_of(pipe).save(tmp_path / "x.safetensors")
    first = OVAM(pipe).answer(made, SegmentSettings(tokens=(Token.load(file),), crf=False))
    replace(token_of(pipe, "dog"), classes=("background", "cat")).save(file)
    other = OVAM(pipe).answer(made, SegmentSettings(tokens=(Token.load(file),), crf=False))
    assert other.labels == first.labels
    assert not np.array_equal(other.heatmaps, first.heatmaps)


def test_the_half_that_a_token_belongs_to(pipe, made):
    one, two = token_of(pipe, branch="unconditional"), token_of(pipe, "dog")
    assert branch_of(()) == branch_of((two,)) == "conditional"
    assert branch_of((one,)) == "unconditional"
    with pytest.raises(InputError, match="different halves"):
        branch_of((one, two))
    with pytest.raises(InputError, match="unconditional half"):
        OVAM(pipe).answer(made, SegmentSettings(tokens=(one,), crf=False))


def test_an_evaluation_goes_on_with_the_same_photographs_alone(pipe, folder):
    """Other pixels in a file of the same name, size and bytes make another set of it."""
    known = read_annotated(folder, OVAM(pipe)).fingerprint()
    assert read_annotated(folder, OVAM(pipe)).fingerprint() == known
    for name in ("mask.png", "cat.jpg"):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert read_annotated(folder, OVAM(pipe)).fingerprint() != known
        (folder / name).write_bytes(data)
    assert read_annotated(folder, OVAM(pipe)).fingerprint() == known


# ------------------------------------------------------------------------------------------ the command line


def test_from_a_mask_to_a_token_to_an_image(mask, tmp_path, capsys):
    file, out = tmp_path / "new" / "cat.safetensors", tmp_path / "out"
    about = ["--prompt", PROMPT, "--seed", "3", "--steps", "2", "--size", "96x64"]
    options = ["--mask", str(mask), "--class", "cat", "--epochs", "2", "--out", str(file), *QUICK]
    assert main(["optimize", *about, *options]) == 0
    assert "cat: loss" in capsys.readouterr().out
    token = Token.load(file)
    assert (token.seed, token.steps, token.names) == (3, 2, ("cat",))
    common = ["--steps", "2", "--out", str(out), *QUICK]
    assert main(["generate", "A cat on grass", "--token", str(file), "--words", "grass", *common]) == 0
    _, asked, _, _ = load_settings(out / "settings.json", GenerateSettings)
    assert [one.to_bytes() for one in asked.tokens] == [(out / "token_cat.safetensors").read_bytes()]
    assert asked.words == ("grass",)
    assert json.loads((out / "settings.json").read_text())["maps"]["tokens"] == ["token_cat.safetensors"]
    assert (out / "token_cat.safetensors").read_bytes() == file.read_bytes()
    file.unlink()  # a result holds all that it was made of
    assert (out / "mask_cat.png").exists()
    again = tmp_path / "again"
    assert main(["generate", "--settings", str(out / "settings.json"), "--out", str(again)]) == 0
    assert {p.name: p.read_bytes() for p in again.iterdir()} == {p.name: p.read_bytes() for p in out.iterdir()}


def test_several_images_and_a_set_of_tokens(folder, tmp_path, capsys):
    out = tmp_path / "set"
    assert main(["optimize", "--annotated", str(folder), "--epochs", "2", "--out", str(out), *QUICK]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["cat.safetensors", "dog.safetensors"]
    assert json.loads(Token.load(out / "cat.safetensors").settings)["optimization"]["images"] == 2
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()[:2]]
    write(folder, rows)
    file = tmp_path / "one.safetensors"
    assert main(["optimize", "--image-set", str(folder), "--epochs", "2", "--out", str(file), *QUICK]) == 0
    assert torch.equal(Token.load(file).embedding, Token.load(out / "cat.safetensors").embedding)


def test_two_classes_of_one_file_are_refused_before_a_token_is_learned(folder, tmp_path, capsys):
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()[::2]]
    write(folder, [row | {"class": name} for row, name in zip(rows, ("cat", "Cat"), strict=True)])
    assert main(["optimize", "--annotated", str(folder), "--out", str(tmp_path / "set"), *QUICK]) == 2
    assert_refused(capsys.readouterr().err.strip(), "Two names give one file")
    assert not (tmp_path / "set").exists()


def test_several_classes_from_a_label_map(tmp_path):
    values = np.zeros((64, 64), np.uint8)
    values[:20], values[40:], values[30] = 1, 2, 255
    Image.fromarray(values).save(tmp_path / "labels.png")
    options = ["--mask", str(tmp_path / "labels.png"), "--class", "cat", "dog", "--epochs", "1", "--steps", "1"]
    out = tmp_path / "two.safetensors"
    assert (
        main(["optimize", "--prompt", "a cat and a dog", *options, "--size", "64x64", "--out", str(out), *QUICK]) == 0
    )
    assert Token.load(out).classes == ("background", "cat", "dog")


def test_the_papers_recipe(pipe, mask):
    token, found = learn(OVAM(pipe), [Example(image(pipe), mask, ("cat",))], replace(RECIPES["paper"], epochs=2))
    assert json.loads(token.settings)["optimization"]["rate"] == 100
    assert found.epochs == 2


def test_the_tokens_command(tmp_path, capsys, monkeypatch):
    for module in (tokens, token_files):
        monkeypatch.setattr(module, "FOLDER", tmp_path / "tokens")
    assert main(["tokens", "list"]) == 0
    assert "no tokens" in capsys.readouterr().out
    np.save(
        tmp_path / "voc.npy", {"potted-plant": np.ones(8, np.float32), "tv": np.zeros(8, np.float32)}, allow_pickle=True
    )
    assert main(["tokens", "import", str(tmp_path / "voc.npy"), "--model", "owner/sd"]) == 0
    capsys.readouterr()
    (tmp_path / "tokens" / "sd" / "broken.safetensors").write_bytes(b"x")
    assert main(["tokens", "list", "--model", "owner/sd"]) == 0
    said = capsys.readouterr().out
    assert "potted plant: 1x8, owner/sd, unconditional" in said
    assert "broken.safetensors: " in said
    file = tmp_path / "tokens" / "sd" / "tv.safetensors"
    assert main(["tokens", "export", str(file), "--out", str(tmp_path / "tv.npy")]) == 0
    assert np.load(tmp_path / "tv.npy").shape == (1, 8)
    monkeypatch.setenv("HF_ASSETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("httpx.stream", lambda *_, **__: (_ for _ in ()).throw(httpx.ConnectError("no route")))
    assert main(["tokens", "fetch", "voc-sd15"]) == 2
    assert "is there a network?" in capsys.readouterr().err


BAD = {
    "nothing given": ([], "one of --mask"),
    "two ways": (["--mask", "m.png", "--annotated", "d"], "one of --mask"),
    "classes of a folder": (["--annotated", "d", "--class", "cat"], "leave --class out"),
    "no prompt": (["--mask", "m.png", "--class", "cat"], "--prompt and --class"),
    "no class": (["--mask", "m.png", "--prompt", PROMPT], "--prompt and --class"),
    "no such mask": (["--mask", "/no/m.png", "--prompt", PROMPT, "--class", "cat"], "no mask file"),
    "mask of another shape": (
        ["--mask", "MASK", "--prompt", PROMPT, "--class", "cat", "--size", "64x96"],
        "shapes differ",
    ),
    "no epochs": (["--mask", "MASK", "--prompt", PROMPT, "--class", "cat", "--epochs", "0"], "epochs is 0"),
    "tau nan": (["--mask", "MASK", "--prompt", PROMPT, "--class", "cat", "--tau", "nan"], "tau is nan"),
    "negative proximity": (
        ["--mask", "MASK", "--prompt", PROMPT, "--class", "cat", "--proximity", "-1"],
        "staying near",
    ),
    "class of punctuation": (["--mask", "MASK", "--prompt", PROMPT, "--class", "?", "--size", "96x64"], "not a word"),
    "class too often": (["--mask", "MASK", "--prompt", PROMPT, "--class", "cat", "cat", "--size", "96x64"], "once"),
    "no folder": (["--annotated", "/no/such"], "no metadata.jsonl"),
    "options beside a folder": (["--annotated", "/no/such", "--seed", "1"], "leave those options out"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_status_2(case, mask, tmp_path, capsys):
    options, part = BAD[case]
    options = [str(mask) if one == "MASK" else one for one in options]
    out = tmp_path / "out" / "x.safetensors"
    status = main(["optimize", *options, "--out", str(out), *QUICK])
    said = capsys.readouterr().err.strip()
    assert status == 2, said
    assert_refused(said, part)
    assert not out.exists()


@pytest.mark.parametrize(
    "command", [["tokens", "import", "X", "--model", "m"], ["tokens", "export", "X", "--out", "y.npy"]]
)
def test_bad_files_are_one_sentence_too(command, tmp_path, capsys):
    (tmp_path / "bad").write_bytes(b"nothing")
    for name in ("bad", "absent"):
        assert main([str(tmp_path / name) if word == "X" else word for word in command]) == 2
        said = capsys.readouterr().err.strip()
        assert said.startswith("Error: ")
        assert "\n" not in said


def test_generate_with_a_token_that_does_not_fit(tmp_path, capsys):
    narrow = Token(torch.ones(2, 8), ("background", "cat"), "emoji-voc").save(tmp_path / "cat.safetensors")
    assert (
        main(["generate", PROMPT, "--token", str(narrow), "--steps", "2", "--out", str(tmp_path / "out"), *QUICK]) == 2
    )
    assert "is 8 wide and this model takes" in capsys.readouterr().err


def test_an_interrupt_keeps_the_best_so_far_and_those_before_it(folder, tmp_path, capsys, monkeypatch):
    """Ctrl-C in the second token's third epoch."""
    seen = []

    def pressed(_, epoch):
        seen.append(epoch.number)
        if seen.count(1) == 2 and epoch.number == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(EpochBar, "show", pressed)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    out, before = tmp_path / "set", signal.getsignal(signal.SIGINT)
    assert main(["optimize", "--annotated", str(folder), "--epochs", "9", "--out", str(out), *QUICK]) == 130
    assert signal.getsignal(signal.SIGINT) is before
    epochs = [
        json.loads(Token.load(out / name).settings)["optimization"]["epochs"]
        for name in ("cat.safetensors", "dog.safetensors")
    ]
    assert epochs == [9, 3]
    assert "Stopped" in capsys.readouterr().err


def test_an_interrupt_before_the_first_epoch_ends_at_once(mask, tmp_path, monkeypatch):
    monkeypatch.setattr(annotated, "learn", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    options = [
        "--prompt",
        PROMPT,
        "--mask",
        str(mask),
        "--class",
        "cat",
        "--out",
        str(tmp_path / "cat.safetensors"),
        *QUICK,
    ]
    assert main(["optimize", *options]) == 130
    assert not (tmp_path / "cat.safetensors").exists()


def test_a_search_without_an_epoch_is_no_token(pipe, mask):
    with pytest.raises(InputError, match="before the first epoch"):
        learn(OVAM(pipe), [Example(image(pipe), mask, ("cat",))], FEW, should_stop=lambda: True)
