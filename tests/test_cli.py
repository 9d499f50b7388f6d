"""`ovam generate`, its files, and what it says to bad input. Two steps: the pictures are not looked at."""

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
from typer.main import get_command

from ovam_core import OVAM, Token
from ovam_core.cli import main
from ovam_core.cli.app import app
from ovam_core.cli.arguments import RENAMED, expand, split
from ovam_core.errors import InputError, Stopped
from ovam_core.io.names import slugs
from ovam_core.methods import FA_SEG
from ovam_core.models.presets import defaults_for
from ovam_core.optimization import initial_embedding
from ovam_core.picture import Picture, load_settings
from ovam_core.settings import GenerateSettings, SegmentSettings, parse_numbers, parse_size

ROOT = Path(__file__).parent.parent
QUICK = ["--model", "emoji-voc", "--device", "cpu", "--steps", "2"]
PROMPT = "a photograph of a cat and a car on grass"
WORDS = ["--words", "cat", "car", "the red bus"]


@pytest.fixture(scope="module")
def ovam() -> OVAM:
    return OVAM.from_pretrained("emoji-voc", "cpu")


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> Path:
    """One run with everything at its default but the steps and a size that is not square."""
    out = tmp_path_factory.mktemp("cli") / "out"
    assert main(["generate", PROMPT, *WORDS, "--seed", "1", "--size", "96x64", "--out", str(out), *QUICK]) == 0
    return out


@pytest.fixture(scope="module")
def picture(ovam) -> Picture:
    return ovam.draw(GenerateSettings.for_model(ovam.pipe, PROMPT, steps=2, seed=3))


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
    assert maps.dtype == np.float32
    assert maps.shape == (3, 64, 96)
    assert 0 <= maps.min() < maps.max() <= 1
    for name in result.glob("mask_*.png"):
        assert set(np.unique(np.asarray(Image.open(name)))) <= {0, 255}
    about = json.loads((result / "settings.json").read_text())
    assert about["files"] == sorted(names)
    assert about["model"] == "emoji-voc"
    assert about["generation"]["width"] == 96
    assert about["generation"]["seed"] == 1


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
    made, asked, _, _ = load_settings(out / "settings.json", GenerateSettings)
    assert asked.words == ("sky",)
    assert asked.tau == 0.6
    assert made.seed == 1
    assert (out / "image.png").read_bytes() == (result / "image.png").read_bytes()  # words do not touch the picture


def test_another_method_cuts_where_it_does_itself(result, tmp_path):
    """settings.json holds the threshold of the method that it was written by."""
    again, given = tmp_path / "again", tmp_path / "given"
    command = ["generate", "--settings", str(result / "settings.json"), "--method", "fa-seg"]
    assert main([*command, "--out", str(again)]) == 0
    assert main([*command, "--tau", "0.3", "--out", str(given)]) == 0
    assert load_settings(result / "settings.json", GenerateSettings)[1].tau == defaults_for("emoji-voc").tau
    assert load_settings(again / "settings.json", GenerateSettings)[1].tau == FA_SEG.tau
    assert load_settings(given / "settings.json", GenerateSettings)[1].tau == 0.3


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
        "--use-steps",
        "1",
        "--resolutions",
        "16,8",
    ]
    assert main(["generate", PROMPT, *options, "--out", str(out), *QUICK]) == 0
    made, asked, model, device = load_settings(out / "settings.json", GenerateSettings)
    assert asked == SegmentSettings(
        ("cat", "car"), "a cat and a car", defaults_for("emoji-voc").tau, 1.0, False, (1,), (8, 16)
    )
    assert (made.negative_prompt, made.guidance, model, device) == ("rain", 1.0, "emoji-voc", "cpu")


def test_a_sentence_alone_gives_every_token(tmp_path):
    out = tmp_path / "sentence"
    assert main(["generate", PROMPT, "--attribution", "a cat on a car", "--out", str(out), *QUICK]) == 0
    words = [word["word"] for word in json.loads((out / "settings.json").read_text())["words"]]
    assert words[0] == "<SoT>"
    assert words[-1] == "<EoT>"
    assert len(set(words)) == len(words)
    assert "a (2)" in words
    assert len(list(out.glob("mask_*.png"))) == len(words)


def test_a_second_result_takes_the_first_ones_place(ovam, picture, tmp_path):
    (tmp_path / "mine.png").write_bytes(b"kept")
    for words in (("cat", "dog"), ("cat",)):
        ovam.answer(picture, SegmentSettings(words)).save(tmp_path)
    names = set(files_of(tmp_path))
    assert "overlay_dog.png" not in names
    assert "mask_dog.png" not in names
    assert {"mine.png", "overlay_cat.png"} <= names
    assert not [name for name in names if name.endswith(".part")]


def test_names_cannot_leave_the_folder(ovam, picture, tmp_path):
    words = ("../../etc/passwd", "/cat", "C:\\cat", "Cat", "猫", "a" * 199, "x\0y", "con.", "..a")
    out = tmp_path / "deep" / "out"
    ovam.answer(picture, SegmentSettings(words[:5])).save(out)
    assert {path.parent for path in tmp_path.rglob("*.png")} == {out}
    names = slugs(words)
    assert len(set(names)) == len(words)
    assert all(name.replace("-", "").isalnum() and 0 < len(name) <= 44 for name in names), names


def test_an_old_settings_file_cannot_delete_elsewhere(ovam, picture, tmp_path):
    victim = tmp_path / "mask_victim.png"
    victim.write_bytes(b"x")
    out = tmp_path / "out"
    out.mkdir()
    (out / "settings.json").write_text(json.dumps({"files": ["../mask_victim.png", "mask_/../../mask_victim.png", 3]}))
    ovam.answer(picture, SegmentSettings(("cat",))).save(out)
    assert victim.exists()


def test_zip_holds_the_same_files(ovam, picture, tmp_path):
    found = ovam.answer(picture, SegmentSettings(("cat",)))
    found.save(tmp_path / "folder")
    first = found.save_zip(tmp_path / "a.zip").read_bytes()
    assert first == found.save_zip(tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == files_of(tmp_path / "folder")


# ------------------------------------------------------------------------------------- the functions below


def test_a_new_threshold_takes_the_maps_that_are_there(ovam, picture):
    first = ovam.answer(picture, SegmentSettings(("cat", "car"), crf=False))
    kept = picture.last_maps[1]
    second = ovam.answer(picture, SegmentSettings(("cat", "car"), tau=0.9, crf=False))
    assert picture.last_maps[1] is kept
    assert np.array_equal(first.heatmaps, second.heatmaps)
    assert second.masks.sum() < first.masks.sum()
    ovam.answer(picture, SegmentSettings(("car",)))
    assert picture.last_maps[1] is not kept


def test_maps_are_those_of_what_the_picture_holds(ovam, picture):
    """Not of a recording, or of rows of a token, that stood in their place before."""
    picture = replace(picture, last_maps=None)
    whole = ovam.segment(picture, ["cat"], crf=False)
    step = picture.recording.step_indices[:1]
    part = replace(picture, recording=picture.recording.select(steps=step))
    found = ovam.segment(part, ["cat"], crf=False)
    assert np.array_equal(found.heatmaps, ovam.segment(replace(part, last_maps=None), ["cat"], crf=False).heatmaps)
    assert not np.array_equal(found.heatmaps, whole.heatmaps)

    rows = initial_embedding(ovam.pipe, ["cat", "car", "dog"])
    token = Token(rows, ("background", "cat", "car", "dog"), ovam.name, rivals=2)
    assert ovam.segment(picture, [token], crf=False).labels == ["cat"]
    assert ovam.segment(picture, [replace(token, rivals=0)], crf=False).labels == ["cat", "car", "dog"]


def test_stop_stops_and_leaves_no_hook(ovam):
    seen: list[int] = []
    settings = GenerateSettings.for_model(ovam.pipe, PROMPT, steps=20)
    hooks = sum(len(module._forward_hooks) for module in ovam.pipe.unet.modules())
    with pytest.raises(Stopped) as caught:
        ovam.draw(settings, on_step=lambda done, total: seen.append(done), should_stop=lambda: len(seen) >= 3)
    assert seen == [0, 1, 2]
    assert caught.value.steps == 3
    assert "3 of 20" in str(caught.value)
    assert sum(len(module._forward_hooks) for module in ovam.pipe.unet.modules()) == hooks
    with pytest.raises(Stopped):  # asked to stop while it was waiting: not one step
        ovam.draw(settings, on_step=lambda *_: pytest.fail("a step was made"), should_stop=lambda: True)


def test_progress_counts_to_the_end(ovam):
    seen: list[tuple[int, int]] = []
    ovam.draw(GenerateSettings.for_model(ovam.pipe, PROMPT, steps=3), on_step=lambda *step: seen.append(step))
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
    with pytest.raises(InputError):
        parse_numbers(text)


def test_sizes():
    assert parse_size("128x96") == parse_size("128X96") == parse_size("128×96") == (128, 96)
    for text in ("128", "x", "axb", "-8x8", "8x8x8", "9999999x8", "²x8"):
        with pytest.raises(InputError):
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
    "half an option": ([PROMPT], ["--word", "cat"], "No such option: --word"),
    "an option for a value": ([PROMPT, "--negative-prompt"], WORDS, "'--negative-prompt' requires an argument"),
    "two prompts": ([PROMPT, PROMPT], WORDS, "extra argument"),
    "steps of nothing": ([PROMPT], [*WORDS, "--use-steps", ",,,"], "',,,' is not a list of steps"),
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
    "steps in words": ([PROMPT], [*WORDS, "--steps", "many"], "valid int"),
    "seed below 0": ([PROMPT], [*WORDS, "--seed", "-1"], "seed is -1"),
    "seed too large": ([PROMPT], [*WORDS, "--seed", str(2**70)], "seed"),
    "guidance nan": ([PROMPT], [*WORDS, "--guidance", "nan"], "guidance"),
    "tau nan": ([PROMPT], [*WORDS, "--tau", "nan"], "tau is nan"),
    "tau too large": ([PROMPT], [*WORDS, "--tau", "1.5"], "tau"),
    "alpha nan": ([PROMPT], [*WORDS, "--alpha", "nan"], "Alpha is nan"),
    "alpha infinite": ([PROMPT], [*WORDS, "--alpha", "inf"], "Alpha"),
    "step not run": ([PROMPT], [*WORDS, "--use-steps", "7"], "choose among 0 to 1"),
    "resolution not there": (
        [PROMPT],
        [*WORDS, "--resolutions", "3"],
        "No attention grid is 3 wide: choose among 32, 16, 8, 4",
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
    status = main(["generate", *prompt, *QUICK, *options, "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err.strip()
    assert status == 2, said
    assert said.startswith("Error: ")
    assert "\n" not in said
    assert "Traceback" not in said
    assert len(said) < 600
    assert part in said
    assert not (tmp_path / "out" / "settings.json").exists()


def test_a_folder_that_cannot_be_made(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        assert main(["generate", PROMPT, *WORDS, *QUICK, "--out", str(out)]) == 2
        assert "give a folder" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert main(["generate", PROMPT, *WORDS, *QUICK, "--out", ""]) == 2
    assert "empty" in capsys.readouterr().err
    assert os.listdir() == ["file"]


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
    with pytest.raises(InputError, match="not a JSON file"):
        load_settings(tmp_path / "settings.json", GenerateSettings)


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
    with pytest.raises(InputError):
        load_settings(tmp_path / "settings.json", GenerateSettings)


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
def test_settings_from_a_stranger_are_checked(ovam, wrong):
    with pytest.raises(InputError):
        replace(GenerateSettings.for_model(ovam.pipe, PROMPT, steps=2), **wrong).validate(ovam.pipe)


@pytest.mark.parametrize("asked", [{"step_indices": (9,)}, {"resolutions": (3,)}])
def test_steps_and_grids_that_cannot_be_are_refused_before_the_image(ovam, asked):
    settings = GenerateSettings.for_model(ovam.pipe, PROMPT, steps=3)
    with pytest.raises(InputError, match="choose among"):
        ovam.check_answerable(ovam.filled(SegmentSettings(("cat",), **asked)), settings)


def test_short_memory_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(OVAM, "draw", lambda *given, **more: torch.empty(2**58))
    assert main(["generate", PROMPT, *WORDS, "--out", str(tmp_path / "out"), *QUICK]) == 2
    said = capsys.readouterr().err
    assert "too little memory" in said
    assert "Traceback" not in said


# --------------------------------------------------------------------------------------------- the command


def test_the_real_command(tmp_path):
    """Outside of pytest's process: the module starts, says one sentence on stderr and nothing else."""
    command = [sys.executable, "-m", "ovam_core", "generate", "", *WORDS, "--out", str(tmp_path), *QUICK]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 2
    assert ran.stdout == ""
    assert ran.stderr == "Error: The prompt is empty; describe the picture in a few words.\n"


# Of the first version, by command: what people have in their scripts.
OPTIONS = {
    "generate": "words attribution token out settings tau alpha no-crf resolutions method model device seed "
    "negative-prompt steps guidance size timesteps",
    "photo": "words attribution token out settings tau alpha no-crf resolutions method model device seed "
    "caption timesteps size",
    "optimize": "prompt seed mask photo caption image-set annotated class out model device negative-prompt steps "
    "guidance timesteps size recipe epochs stay apart branch tau alpha",
    "tokens list": "model folder",
    "tokens import": "model branch class out",
    "tokens fetch": "out",
    "tokens export": "out class",
    "export": "prompts template out classes tokens images-per-prompt limit seed model device negative-prompt "
    "steps guidance size batch-size threads tau alpha no-crf uncertain timesteps resolutions format "
    "heatmaps clip clip-drop min-coverage max-coverage workers dry-run",
    "evaluate": "voc split method classes-from tokens template out limit model device timesteps size seed tau "
    "alpha no-crf threads workers",
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_of_the_first_version_is_there(name):
    command, _, _ = split(get_command(app), name.split())
    there = {option for parameter in command.params for option in parameter.opts}
    wanted = {f"--{option}" for option in OPTIONS[name].split()}
    renamed = RENAMED.get(name, {})
    assert wanted - renamed.keys() <= there
    assert set(renamed.values()) <= there
    assert not there & renamed.keys()


def test_help_needs_no_torch():
    """Every command's help, in a process of its own."""
    code = (
        "import sys\n"
        "from ovam_core.cli import main\n"
        "for command in sys.argv[1:]:\n"
        "    assert main([*command.split(), '--help']) == 0, command\n"
        "assert main(['--version']) == 0\n"
        "assert main(['generate', 'a cat', '--steps', 'many', '--out', 'x']) == 2\n"
        "assert not {'torch', 'diffusers', 'transformers', 'matplotlib'} & sys.modules.keys()\n"
    )
    command = [sys.executable, "-c", code, "", "tokens", *OPTIONS]
    environment = os.environ | {"COLUMNS": "200", "_TYPER_FORCE_DISABLE_TERMINAL": "1"}
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert "Usage: ovam generate [OPTIONS]" in ran.stdout
    assert "denoising steps (1 to 200)" in ran.stdout  # of the setting itself


def test_what_evaluate_asks_for_by_default():
    """A name that the command line repeats, because its own module imports torch; test_house.py knows the others."""
    from ovam_core.data.voc_folder import GROUND_TRUTH

    command, _, _ = split(get_command(app), ["evaluate"])
    assert {one.name: one.default for one in command.params}["classes_from"] == GROUND_TRUTH


@pytest.mark.parametrize(
    ("given", "expanded"),
    [
        ("generate|a cat|--words|cat|red bus|--seed|-1", "generate|a cat|--words|cat|--words|red bus|--seed|-1"),
        ("generate|--words|cat|--token=a|b", "generate|--words|cat|--token=a|b"),
        ("generate|--words|-1|- a b|-x", "generate|--words|-1|--words|- a b|-x"),
        ("generate|--words|cat|--caption=a cat", "generate|--words|cat|--words|--caption=a cat"),  # not generate's own
        ("photo|--words|cat|--caption=a cat", "photo|--words|cat|--caption=a cat"),
        ("generate|--words|cat|--|--token|a", "generate|--words|cat|--|--token|a"),
        ("generate|--no-crf|a cat|--out|--seed|1", "generate|--no-crf|a cat|--out"),
        ("generate|--resolutions|16,8|4", "generate|--resolutions|16,8|--resolutions|4"),
        ("export|--tokens|--format|voc|coco", "export|--tokens|library|--format|voc|--format|coco"),
        ("export|--tokens|mine|--out|x", "export|--tokens|mine|--out|x"),
        ("evaluate|--tokens", "evaluate|--tokens|library"),
        ("optimize|--class|cat|dog|--stay|0.1", "optimize|--class|cat|--class|dog|--proximity|0.1"),
        ("optimize|--timesteps|100|--stay=1", "optimize|--timesteps|100|--proximity=1"),
        ("optimize|--timesteps|100|--apart=1", "optimize|--timesteps|100|--together"),
        ("optimize|--apart|0.5|--out|x", "optimize|--together|--out|x"),
        ("optimize|--apart|--out|x", "optimize|--together|--out|x"),
        ("tokens|import|f.npy|--class|a|b", "tokens|import|f.npy|--class|a|--class|b"),
        ("evaluate|--offsets|-0.4:0.4:0.1|--out|r", "evaluate|--offsets|-0.4:0.4:0.1|--out|r"),
        ("evaluate|--offsets|-0.2,0,-.1|--out|r", "evaluate|--offsets|-0.2,0,-.1|--out|r"),
        ("nothing|--words|a|b", "nothing|--words|a|b"),
    ],
)
def test_one_value_an_option(given, expanded):
    command, names, rest = split(get_command(app), given.split("|"))
    assert [*names, *expand(command, rest, RENAMED.get(" ".join(names)))] == expanded.split("|")


def test_old_names_are_understood_with_a_note(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["generate", PROMPT, "--words", "cat", "--timesteps", "1", "--out", str(out), *QUICK]) == 0
    assert capsys.readouterr().err == "Note: --timesteps is called --use-steps now; the old name will go.\n"
    _, asked, _, _ = load_settings(out / "settings.json", GenerateSettings)
    assert asked.step_indices == (1,)


@pytest.mark.parametrize("command", [[], ["generat"], ["tokens"], ["export", "x"], ["tokens", "fetch", "others"]])
def test_what_is_no_command_is_one_sentence_too(command, capsys):
    assert main(command) == 2
    said = capsys.readouterr().err
    assert said.startswith("Error: ")
    assert said.count("\n") == 1
    assert "see ovam" in said
    assert said.endswith(" --help.\n")


def test_ctrl_c(tmp_path, monkeypatch, capsys):
    def pressed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(OVAM, "draw", pressed)
    assert main(["generate", PROMPT, *WORDS, "--out", str(tmp_path / "out"), *QUICK]) == 130
    assert capsys.readouterr().err.endswith("Stopped.\n")


def test_a_bug_keeps_its_traceback(tmp_path):
    """A ValueError of ours, or of a library, is nobody's bad input."""
    code = (
        "import sys\n"
        "from ovam_core import OVAM\n"
        "from ovam_core.cli import main\n"
        "def broken(*_, **__): raise ValueError('not what we thought')\n"
        "OVAM.draw = broken\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", code, "generate", PROMPT, *WORDS, "--out", str(tmp_path / "out"), *QUICK]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 1
    assert "Traceback (most recent call last)" in ran.stderr
    assert ran.stderr.endswith("ValueError: not what we thought\n")


def test_a_reader_that_goes_away_is_no_bug():
    """`ovam --help | head -1`: no traceback, whether the pipe was closed before or while it is written to."""
    source, sink = os.pipe()
    os.close(source)
    with os.fdopen(sink, "wb") as pipe:
        command = [sys.executable, "-m", "ovam_core", "--help"]
        child = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    assert child.returncode == 1
    assert child.stderr == ""
