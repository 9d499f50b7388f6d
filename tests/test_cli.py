"""`python -m ovam_core generate`, its files, and what it says to bad input. Two steps: the pictures are not looked at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ovam_core.__main__ import main, parse_size
from ovam_core.errors import Stopped
from ovam_core.io.names import slugs
from ovam_core.models.load import load_pipeline
from ovam_core.models.presets import defaults_for
from ovam_core.ovam import ask, check_served, generate
from ovam_core.picture import Generation, load_settings, save, save_zip
from ovam_core.settings import GenerateSettings, MapSettings, parse_numbers

ROOT = Path(__file__).parent.parent
QUICK = ["--model", "emoji-voc", "--device", "cpu", "--steps", "2"]
PROMPT = "a photograph of a cat and a car on grass"
WORDS = ["--words", "cat", "car", "the red bus"]


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline("emoji-voc", "cpu")


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> Path:
    """One run with everything at its default but the steps and a size that is not square."""
    out = tmp_path_factory.mktemp("cli") / "out"
    assert main(["generate", PROMPT, *WORDS, "--seed", "1", "--size", "96x64", "--out", str(out), *QUICK]) == 0
    return out


@pytest.fixture(scope="module")
def made(pipe) -> Generation:
    return generate(pipe, GenerateSettings.for_model(pipe, PROMPT, steps=2, seed=3))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ------------------------------------------------------------------------------------------------ files


def test_writes_what_the_readme_promises(result):
    names = {"image.png", "heatmaps.npz", "labels.png", "settings.json"}
    names |= {f"{kind}_{word}.png" for kind in ("overlay", "mask") for word in ("cat", "car", "the-red-bus")}
    assert set(files_of(result)) == names
    for picture in result.glob("*.png"):
        assert Image.open(picture).size == (96, 64), picture
    with np.load(result / "heatmaps.npz", allow_pickle=False) as file:
        maps, words = file["maps"], file["words"].tolist()
    assert words == ["cat", "car", "the red bus"]
    assert maps.dtype == np.float32 and maps.shape == (3, 64, 96)
    assert 0 <= maps.min() < maps.max() <= 1
    for name in result.glob("mask_*.png"):
        assert set(np.unique(np.asarray(Image.open(name)))) <= {0, 255}
    about = json.loads((result / "settings.json").read_text())
    assert about["files"] == sorted(names) and about["model"] == "emoji-voc"
    assert about["generation"]["width"] == 96 and about["generation"]["seed"] == 1


def test_settings_make_the_same_bytes_again(result, tmp_path):
    again = tmp_path / "again"
    assert main(["generate", "--settings", str(result / "settings.json"), "--out", str(again)]) == 0
    assert files_of(again) == files_of(result)


def test_options_stand_above_settings(result, tmp_path):
    out = tmp_path / "other"
    code = main(
        ["generate", "--settings", str(result / "settings.json"), "--out", str(out), "--words", "sky", "--tau", ".6"]
    )
    assert code == 0
    made, asked, _, _ = load_settings(out / "settings.json")
    assert asked.words == ("sky",) and asked.tau == 0.6 and made.seed == 1
    assert (out / "image.png").read_bytes() == (result / "image.png").read_bytes()  # words do not touch the picture


def test_every_option_together(tmp_path):
    out = tmp_path / "all"
    options = [
        "--attribution",
        "a cat and a car",
        "--words",
        "cat, car",
        "--no-crf",
        "--alpha",
        "1",
        "--guidance",
        "1",
        "--negative-prompt",
        "rain",
        "--timesteps",
        "1",
        "--resolutions",
        "16,8",
    ]
    assert main(["generate", PROMPT, *options, "--out", str(out), *QUICK]) == 0
    made, asked, model, device = load_settings(out / "settings.json")
    assert asked == MapSettings(
        ("cat", "car"), "a cat and a car", defaults_for("emoji-voc").tau, 1.0, False, (1,), (8, 16)
    )
    assert (made.negative_prompt, made.guidance, model, device) == ("rain", 1.0, "emoji-voc", "cpu")


def test_a_sentence_alone_gives_every_token(tmp_path):
    out = tmp_path / "sentence"
    assert main(["generate", PROMPT, "--attribution", "a cat on a car", "--out", str(out), *QUICK]) == 0
    words = [word["word"] for word in json.loads((out / "settings.json").read_text())["words"]]
    assert words[0] == "<SoT>" and words[-1] == "<EoT>" and len(set(words)) == len(words) and "a (2)" in words
    assert len(list(out.glob("mask_*.png"))) == len(words)


def test_a_second_result_takes_the_first_ones_place(pipe, made, tmp_path):
    (tmp_path / "mine.png").write_bytes(b"kept")
    for words in (("cat", "dog"), ("cat",)):
        asked = MapSettings(words)
        save(tmp_path, made, ask(pipe, made, asked), asked)
    names = set(files_of(tmp_path))
    assert "overlay_dog.png" not in names and "mask_dog.png" not in names
    assert {"mine.png", "overlay_cat.png"} <= names
    assert not [name for name in names if name.endswith(".part")]


def test_names_cannot_leave_the_folder(pipe, made, tmp_path):
    words = ("../../etc/passwd", "/cat", "C:\\cat", "Cat", "猫", "a" * 199, "x\0y", "con.", "..a")
    out = tmp_path / "deep" / "out"
    asked = MapSettings(words[:5])
    save(out, made, ask(pipe, made, asked), asked)
    assert {path.parent for path in tmp_path.rglob("*.png")} == {out}
    names = slugs(words)
    assert len(set(names)) == len(words)
    assert all(name.replace("-", "").isalnum() and 0 < len(name) <= 44 for name in names), names


def test_an_old_settings_file_cannot_delete_elsewhere(pipe, made, tmp_path):
    victim = tmp_path / "mask_victim.png"
    victim.write_bytes(b"x")
    out = tmp_path / "out"
    out.mkdir()
    (out / "settings.json").write_text(json.dumps({"files": ["../mask_victim.png", "mask_/../../mask_victim.png", 3]}))
    asked = MapSettings(("cat",))
    save(out, made, ask(pipe, made, asked), asked)
    assert victim.exists()


def test_zip_holds_the_same_files(pipe, made, tmp_path):
    asked = MapSettings(("cat",))
    maps = ask(pipe, made, asked)
    save(tmp_path / "folder", made, maps, asked)
    first = save_zip(tmp_path / "a.zip", made, maps, asked).read_bytes()
    assert first == save_zip(tmp_path / "b.zip", made, maps, asked).read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == files_of(tmp_path / "folder")


# ------------------------------------------------------------------------------------- the functions below


def test_a_new_threshold_takes_the_maps_that_are_there(pipe, made):
    first = ask(pipe, made, MapSettings(("cat", "car"), crf=False))
    kept = made._last[1]
    second = ask(pipe, made, MapSettings(("cat", "car"), tau=0.9, crf=False))
    assert made._last[1] is kept and np.array_equal(first.heatmaps, second.heatmaps)
    assert second.masks.sum() < first.masks.sum()
    ask(pipe, made, MapSettings(("car",)))
    assert made._last[1] is not kept


def test_stop_stops_and_leaves_no_hook(pipe):
    seen: list[int] = []
    settings = GenerateSettings.for_model(pipe, PROMPT, steps=20)
    hooks = sum(len(module._forward_hooks) for module in pipe.unet.modules())
    with pytest.raises(Stopped) as caught:
        generate(pipe, settings, on_step=lambda done, total: seen.append(done), should_stop=lambda: len(seen) >= 3)
    assert seen == [0, 1, 2] and caught.value.steps == 3 and "3 of 20" in str(caught.value)
    assert sum(len(module._forward_hooks) for module in pipe.unet.modules()) == hooks
    with pytest.raises(Stopped):  # asked to stop while it was waiting: not one step
        generate(pipe, settings, on_step=lambda *_: pytest.fail("a step was made"), should_stop=lambda: True)


def test_progress_counts_to_the_end(pipe):
    seen: list[tuple[int, int]] = []
    generate(pipe, GenerateSettings.for_model(pipe, PROMPT, steps=3), on_step=lambda *step: seen.append(step))
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("", None),
        (" all ", tuple(range(200))),
        ("3", (3,)),
        ("0-2, 5", (0, 1, 2, 5)),
        ("4 2,2", (2, 4)),
        ("1 - 3", (1, 2, 3)),
    ],
)
def test_lists_of_numbers(text, numbers):
    assert parse_numbers(text) == numbers


@pytest.mark.parametrize("text", ["x", "-1", "3-1", "1-", "1.5", "nan", "0-99999999999", "200", "1;2", "٣٣٣"])
def test_lists_of_numbers_that_are_none(text):
    with pytest.raises(ValueError):
        parse_numbers(text)


def test_sizes():
    assert parse_size("128x96") == parse_size("128X96") == parse_size("128×96") == (128, 96)
    for text in ("128", "x", "axb", "-8x8", "8x8x8", "9999999x8", "²x8"):
        with pytest.raises(ValueError):
            parse_size(text)


# ---------------------------------------------------------------------------------------------- bad input

BAD = {
    "no prompt": ([], WORDS, "prompt"),
    "empty prompt": (["  "], WORDS, "prompt is empty"),
    "long prompt": (["cat " * 2500], WORDS, "10,000 characters"),
    "prompt past the encoder": (["cat " * 90], WORDS, "tokens"),
    "long negative prompt": ([PROMPT], [*WORDS, "--negative-prompt", "x" * 10_000], "10,000 characters"),
    "no words": ([PROMPT], [], "word"),
    "empty words": ([PROMPT], ["--words", "", " "], "word"),
    "words of another encoding": ([PROMPT], ["--words", "c\udcff"], "not Unicode"),
    "prompt of another encoding": (["a \udcff cat"], WORDS, "not Unicode"),
    "half an option": ([PROMPT], ["--word", "cat"], "unrecognized arguments: --word"),
    "timesteps of nothing": ([PROMPT], [*WORDS, "--timesteps", ",,,"], "',,,' is not a list of timesteps"),
    "punctuation": ([PROMPT], ["--words", "cat", "?!"], "not a word"),
    "long words": ([PROMPT], ["--words", "x" * 10_000], "10,000 characters"),
    "word past the encoder": ([PROMPT], ["--words", "q" * 190], "tokens"),
    "many words": ([PROMPT], ["--words", *[f"w{n}" for n in range(99)]], "99 words"),
    "long sentence": ([PROMPT], ["--attribution", "a cat " * 200], "tokens"),
    "word not in the sentence": ([PROMPT], ["--attribution", "a cat", "--words", "dog"], "dog"),
    "size not a multiple": ([PROMPT], [*WORDS, "--size", "100x128"], "multiple of 8"),
    "size too large": ([PROMPT], [*WORDS, "--size", "80000x80000"], "width is 80000"),
    "size far too large": ([PROMPT], [*WORDS, "--size", f"{10**30}x8"], "far too large"),
    "size of nothing": ([PROMPT], [*WORDS, "--size", "0x0"], "width is 0"),
    "size in words": ([PROMPT], [*WORDS, "--size", "big"], "WIDTHxHEIGHT"),
    "no steps": ([PROMPT], [*WORDS, "--steps", "0"], "steps is 0"),
    "too many steps": ([PROMPT], [*WORDS, "--steps", "100000"], "steps is 100000"),
    "steps in words": ([PROMPT], [*WORDS, "--steps", "many"], "invalid int"),
    "seed below 0": ([PROMPT], [*WORDS, "--seed", "-1"], "seed is -1"),
    "seed too large": ([PROMPT], [*WORDS, "--seed", str(2**70)], "seed"),
    "guidance nan": ([PROMPT], [*WORDS, "--guidance", "nan"], "guidance"),
    "tau nan": ([PROMPT], [*WORDS, "--tau", "nan"], "tau is nan"),
    "tau too large": ([PROMPT], [*WORDS, "--tau", "1.5"], "tau"),
    "alpha nan": ([PROMPT], [*WORDS, "--alpha", "nan"], "Alpha is nan"),
    "alpha infinite": ([PROMPT], [*WORDS, "--alpha", "inf"], "Alpha"),
    "timestep not run": ([PROMPT], [*WORDS, "--timesteps", "7"], "choose among 0 to 1"),
    "resolution not there": (
        [PROMPT],
        [*WORDS, "--resolutions", "3"],
        "No attention grid is 3 wide: choose among 16, 8, 4",
    ),
    "no such model": ([PROMPT], [*WORDS, "--model", "no-such-model"], "no-such-model"),
    "no such folder": ([PROMPT], [*WORDS, "--model", "/no/such/folder"], "/no/such/folder"),
    "hub out of reach": ([PROMPT], [*WORDS, "--model", "nobody/nothing"], "hub cannot be reached"),
    "no such device": ([PROMPT], [*WORDS, "--device", "abacus"], "abacus"),
    "no such settings": ([], ["--settings", "/no/such/file.json"], "settings file"),
    "settings of something else": ([], ["--settings", __file__], "not a JSON file"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_status_2(case, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    prompt, options, part = BAD[case]
    try:
        status = main(["generate", *prompt, *QUICK, *options, "--out", str(tmp_path / "out")])
    except SystemExit as left:  # argparse's own way
        status = left.code
    said = capsys.readouterr().err.strip()
    assert status == 2, said
    assert said.startswith("Error: ") and "\n" not in said and "Traceback" not in said and len(said) < 600
    assert part in said
    assert not (tmp_path / "out" / "settings.json").exists()


def test_a_folder_that_cannot_be_made(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        assert main(["generate", PROMPT, *WORDS, *QUICK, "--out", str(out)]) == 2
        assert "give a folder" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        main(["generate", PROMPT, *WORDS, *QUICK, "--out", ""])
    assert left.value.code == 2 and "empty" in capsys.readouterr().err and os.listdir() == ["file"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"words": [5]}, "not text"),
        ({"words": "cat"}, "wrong kind"),
        ({"template": 5}, "template is not text"),
        ({"crf": "no"}, "true or false"),
        ({"tokens": 3}, "wrong kind"),
    ],
)
def test_settings_edited_by_hand(result, tmp_path, capsys, changed, said):
    about = json.loads((result / "settings.json").read_text())
    about["maps"] |= changed
    (tmp_path / "settings.json").write_text(json.dumps(about))
    assert main(["generate", "--settings", str(tmp_path / "settings.json"), "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err


def test_settings_without_an_end(tmp_path):
    (tmp_path / "settings.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="not a JSON file"):
        load_settings(tmp_path / "settings.json")


@pytest.mark.parametrize(
    "about",
    [
        [],
        {"format": "other"},
        {"format": "ovam-generate/1"},
        {
            "format": "ovam-generate/1",
            "model": "m",
            "device": "cpu",
            "generation": {"prompt": "x", "evil": 1},
            "maps": {},
        },
        {
            "format": "ovam-generate/1",
            "model": "m",
            "device": "cpu",
            "generation": {"prompt": "x"},
            "maps": {"words": 3},
        },
        {"format": "ovam-generate/1", "model": "m", "device": "cpu", "generation": 3, "maps": {}},
    ],
)
def test_settings_of_the_wrong_kind(about, tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps(about))
    with pytest.raises(ValueError):
        load_settings(tmp_path / "settings.json")


@pytest.mark.parametrize(
    "wrong",
    [
        {"seed": 1.5},
        {"seed": True},
        {"steps": "2"},
        {"prompt": None},
        {"guidance": None},
        {"width": 12},
        {"height": 1e9},
    ],
)
def test_settings_from_a_stranger_are_checked(pipe, wrong):
    with pytest.raises(ValueError):
        replace(GenerateSettings.for_model(pipe, PROMPT, steps=2), **wrong).validate(pipe)


def test_the_real_command(tmp_path):
    """Outside of pytest's process: the module starts, says one sentence on stderr and nothing else."""
    command = [sys.executable, "-m", "ovam_core", "generate", "", *WORDS, "--out", str(tmp_path), *QUICK]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 2 and ran.stdout == ""
    assert ran.stderr == "Error: The prompt is empty; describe the picture in a few words.\n"


@pytest.mark.parametrize("asked", [{"steps": (9,)}, {"resolutions": (3,)}])
def test_steps_and_grids_that_cannot_be_are_refused_before_the_image(pipe, asked):
    settings = GenerateSettings.for_model(pipe, PROMPT, steps=3)
    with pytest.raises(ValueError, match="choose among"):
        check_served(pipe, MapSettings(("cat",), **asked).filled(pipe), settings)


def test_short_memory_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ovam_core.__main__.generate", lambda *given, **more: torch.empty(2**58))
    assert main(["generate", PROMPT, *WORDS, "--out", str(tmp_path / "out"), *QUICK]) == 2
    said = capsys.readouterr().err
    assert "too little memory" in said and "Traceback" not in said
