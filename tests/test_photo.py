"""Photographs: read upright, sized, noised by the formula, recorded as a direct pass would be, asked, learned from."""

from __future__ import annotations

import json
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from PIL import Image
from pipelines import make_pipe
from reference import Spy, assert_refused, triple_loop

from ovam_core import ovam as generate_module
from ovam_core import record
from ovam_core.attention.heatmap import attribute
from ovam_core.attention.mask import make_masks
from ovam_core.cli import main
from ovam_core.data.annotated import Example, learn, photo_settings, read_folder
from ovam_core.errors import InputError
from ovam_core.hooks.photograph import denoise, fitted_size, noised, prepare, record_image, record_images
from ovam_core.io.masks import read_mask
from ovam_core.io.pictures import read_photo
from ovam_core.optimization import OptimizeSettings, initial_embedding, optimize
from ovam_core.ovam import OVAM
from ovam_core.picture import load_settings
from ovam_core.query import attribute_words, caption_of
from ovam_core.settings import PhotoSettings, SegmentSettings
from ovam_core.tokens import Token

CAPTION = "a photograph of the cat"
FEW = OptimizeSettings(epochs=3)


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(pixels(height, width, seed))


# ------------------------------------------------------------------------------------------------ pictures

UPRIGHT = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_turns_the_picture_upright(orientation, tmp_path):
    stored, exif = pixels(36, 50), Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "x.png", exif=exif)
    read = read_photo(tmp_path / "x.png")
    assert read.mode == "RGB"
    assert np.array_equal(np.asarray(read), UPRIGHT[orientation](stored))
    assert np.array_equal(np.asarray(read_photo(read)), np.asarray(read))  # not turned a second time


def test_every_mode_becomes_rgb():
    rgb = pixels(40, 50)
    grey = rgb[..., 0]
    assert np.array_equal(np.asarray(read_photo(Image.fromarray(grey)))[..., 2], grey)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    assert np.array_equal(np.asarray(read_photo(deep))[..., 0], grey)
    palette = Image.fromarray(rgb).quantize(16)
    assert np.array_equal(np.asarray(read_photo(palette)), np.asarray(palette.convert("RGB")))
    hidden = np.dstack([rgb, np.where(np.arange(50) < 20, 0, 255)[None].repeat(40, 0).astype(np.uint8)])
    seen = np.asarray(read_photo(Image.fromarray(hidden)))
    assert (seen[:, :20] == 255).all()
    assert np.array_equal(seen[:, 20:], rgb[:, 20:])


def bomb(side: int) -> bytes:
    """The head of a PNG that claims to be `side` x `side`."""
    head = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)) + b"\0\0\1\0IDAT"


BAD_PICTURES = {
    "text": (b"hello", "not a picture"),
    "empty": (b"", "not a picture"),
    "large": (bomb(9000), "9000x9000"),
    "bomb": (bomb(60000), "more than"),
    "head alone": (bomb(100), "not whole"),
}


@pytest.mark.parametrize("case", BAD_PICTURES)
def test_what_is_no_picture(case, tmp_path, recwarn):
    content, part = BAD_PICTURES[case]
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(InputError, match=part) as caught:
        read_photo(tmp_path / "x.png")
    assert "\n" not in str(caught.value)
    assert not [one for one in recwarn if one.category is Image.DecompressionBombWarning]


def test_what_cannot_be_opened(tmp_path):
    with pytest.raises(InputError, match="There is no picture"):
        read_photo(tmp_path / "none.jpg")
    for path in (tmp_path, "a\0b"):
        with pytest.raises(InputError, match="not a picture"):
            read_photo(path)
    picture(300, 300).save(tmp_path / "x.jpg")
    whole = (tmp_path / "x.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="not whole"):
        read_photo(tmp_path / "cut.jpg")


def model(name: str):
    """A pipeline with the name and the latent factor of a published one."""
    pipe = make_pipe()
    pipe.ovam_name, pipe.vae_scale_factor = name, 8
    return pipe


def test_the_model_sees_its_own_area():
    sd15 = model("stable-diffusion-v1-5/stable-diffusion-v1-5")
    assert fitted_size(sd15, picture(512, 512)) == fitted_size(sd15, picture(64, 64)) == (512, 512)
    assert fitted_size(sd15, picture(375, 500)) == (440, 592)
    assert fitted_size(sd15, picture(100, 400)) == (256, 1024)
    large = model("stabilityai/stable-diffusion-2-1")
    assert fitted_size(large, picture(400, 100)) == (1280, 320)  # 1536 x 384 is past the model's limit
    rng, small = np.random.default_rng(0), model("emoji-voc")
    for _ in range(50):
        height, width = rng.integers(40, 150, 2).tolist()
        sides = fitted_size(small, picture(height, width))
        scale = 128 / (height * width) ** 0.5
        assert all(
            side % 8 == 0 and abs(side - own * scale) <= 4 for side, own in zip(sides, (height, width), strict=True)
        )


@pytest.mark.parametrize(
    ("shape", "part"),
    [((20, 400), "each side needs 32"), ((40, 161), "more than 4 times the other"), ((170, 40), "crop it")],
)
def test_shapes_that_are_refused(tiny, shape, part):
    with pytest.raises(InputError, match=part):
        record_image(tiny, picture(*shape), CAPTION)


def test_captions():
    assert caption_of([]) == caption_of([" "]) == "A photograph"
    assert caption_of(["cat"]) == "A photograph of a cat"
    assert caption_of(["cat", "aeroplane", "the red bus"]) == "A photograph of a cat, an aeroplane and the red bus"


# ------------------------------------------------------------------------------------------------ the pass


def kept_signal(timesteps) -> torch.Tensor:
    """The product of 1 - beta up to each timestep, of the tiny pipeline's "scaled_linear" schedule."""
    betas = torch.linspace(0.0001**0.5, 0.02**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)[list(timesteps)].float()


@pytest.mark.parametrize("sampler", [None, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_noise_is_the_training_schedules(sampler):
    pipe = make_pipe()
    if sampler is not None:
        pipe.scheduler = sampler.from_config(pipe.scheduler.config)
    pipe.scheduler.set_timesteps(7)
    latents, timesteps = torch.randn(4, 6, 5), (0, 100, 999)
    noise = torch.randn(3, 4, 6, 5, generator=torch.Generator().manual_seed(3))
    signal = kept_signal(timesteps)[:, None, None, None]
    expected = signal.sqrt() * latents + (1 - signal).sqrt() * noise
    torch.testing.assert_close(noised(pipe, latents, timesteps, seed=3), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def direct_pass(pipe, image: Image.Image, size, caption, timesteps, seed):
    """The UNet called by hand, under a spy that knows nothing of the recorder."""
    values = torch.from_numpy(np.array(image.resize(size[::-1], Image.Resampling.LANCZOS)).transpose(2, 0, 1)[None])
    clean = pipe.vae.encode(values.float() / 127.5 - 1).latent_dist.mean * pipe.vae.config.scaling_factor
    noise = torch.randn((len(timesteps), *clean.shape[1:]), generator=torch.Generator().manual_seed(seed))
    text = pipe.tokenizer(caption, padding="max_length", max_length=77, return_tensors="pt").input_ids
    text = pipe.text_encoder(text)[0]
    with Spy(pipe) as spy:
        for t, own, signal in zip(timesteps, noise, kept_signal(timesteps), strict=True):
            pipe.unet(signal.sqrt() * clean + (1 - signal).sqrt() * own, t, text)
    return spy


def test_the_recording_is_that_of_a_direct_pass(tiny):
    """Two timesteps, 3:2, rotated by EXIF: queries, and maps by the plain triple loop."""
    image = picture(90, 60)
    image.getexif()[0x0112] = 6
    upright = Image.fromarray(np.rot90(np.asarray(image), -1).copy())
    recording = record_image(tiny, image, CAPTION, (100, 300), seed=5)
    assert (recording.image_size, recording.timesteps, recording.step_indices) == ((26, 40), (100, 300), (0, 1))
    assert recording.branch == "conditional"
    spy = direct_pass(tiny, upright, (26, 40), CAPTION, (100, 300), 5)
    assert {x.name for x in recording.layers} == set(spy.seen)
    for layer in recording.layers:
        for step, (hidden, _) in enumerate(spy.seen[layer.name]):
            expected = spy.modules[layer.name].to_q(hidden)[0]
            ours = layer.queries[step].transpose(0, 1).reshape(expected.shape)
            torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-3)
    embedding = attribute_words(tiny, ["cat"])[0]
    grids = {13 * 20: (13, 20), 7 * 10: (7, 10)}
    expected = triple_loop(spy, 0, grids, (13, 20), embedding.embedding)[list(embedding.groups[0])].mean(0)
    torch.testing.assert_close(attribute(recording, embedding)[0], expected, atol=1e-4, rtol=1e-3)
    assert make_masks(recording, attribute(recording, embedding), upright).shape == (1, 60, 90)


def test_several_photographs_in_one_batch(tiny):
    images, captions = [picture(50, 70, 1), picture(100, 140, 2)], [CAPTION, "a red bus"]
    together = record_images(tiny, images, captions, (50, 200), seed=4, self_attention=True)
    for n, recording in enumerate(together):
        alone = record_image(tiny, images[n], captions[n], (50, 200), seed=4 + n)
        assert recording.timesteps == alone.timesteps
        assert len(recording.column_sums) == len(alone.column_sums)
        for ours, theirs in zip(recording.layers, alone.layers, strict=True):
            torch.testing.assert_close(ours.queries, theirs.queries, atol=1e-4, rtol=1e-3)
    with pytest.raises(InputError, match="differ in shape"):
        record_images(tiny, [images[0], picture(50, 50)], captions)
    with pytest.raises(InputError, match="Some captions are empty"):
        record_images(tiny, images, ["", CAPTION])


def test_the_empty_caption_is_the_unconditional_half(tiny):
    recording = record_image(tiny, picture(40, 40), "", (100,))
    assert recording.branch == "unconditional"
    spy = direct_pass(tiny, picture(40, 40), (32, 32), "", (100,), 0)
    name = recording.layers[0].name
    expected = spy.modules[name].to_q(spy.seen[name][0][0])[0]
    torch.testing.assert_close(
        recording.layers[0].queries[0].transpose(0, 1).reshape(expected.shape), expected, atol=1e-4, rtol=1e-3
    )


def test_what_record_takes_is_handed_on_and_other_recorders_listen(tiny):
    recording = record_image(
        tiny, picture(40, 40), CAPTION, (100,), size=(24, 48), resolutions=[24], self_attention=False
    )
    assert recording.image_size == (24, 48)
    assert recording.resolutions == (24,)
    assert not recording.column_sums
    noisy = prepare(tiny, [picture(40, 40)], [CAPTION], (100,), size=(24, 48))
    with record(tiny, branch="all") as recorder:
        denoise(tiny, noisy)
    assert torch.equal(recorder.recordings[0].select(resolutions=[24]).layers[0].queries, recording.layers[0].queries)


BAD = {
    "timestep past the end": ({"timesteps": (1000,)}, "timestep is 1000"),
    "timestep below 0": ({"timesteps": (-1,)}, "timestep is -1"),
    "half a timestep": ({"timesteps": (1.5,)}, "timestep is 1.5"),
    "no timestep": ({"timesteps": ()}, "at least one"),
    "a number": ({"timesteps": 100}, "give a list"),
    "many timesteps": ({"timesteps": tuple(range(51))}, "51 timesteps"),
    "seed": ({"seed": -1}, "seed is -1"),
    "size": ({"size": (32, 33)}, "not a multiple of 2"),
    "small size": ({"size": (8, 32)}, "height is 8"),
    "large size": ({"size": (32, 3200)}, "width is 3200"),
    "caption": ({"caption": "cat " * 100}, "The caption .* tokens"),
    "long caption": ({"caption": "x" * 5000}, "5,000 characters"),
}


@pytest.mark.parametrize("case", BAD)
def test_settings_that_are_refused(tiny, case):
    change, part = BAD[case]
    with pytest.raises(InputError, match=part) as caught:
        record_image(tiny, picture(40, 40), **{"caption": CAPTION, **change})
    assert "\n" not in str(caught.value)


def test_models_that_are_refused():
    pipe = SimpleNamespace(unet=object(), vae=object(), text_encoder_2=object())
    with pytest.raises(InputError, match="not a text-to-image pipeline of a family"):
        record_image(pipe, picture(40, 40), CAPTION)


def test_the_figures_record_as_photographs(tiny):
    from training import figures

    image = pixels(32, 32)
    scenes = figures.record_scene(tiny, image, CAPTION, times=(100, 300), seed=2)
    recording = record_image(tiny, Image.fromarray(image), CAPTION, (100, 300), seed=2)
    for step, scene in enumerate(scenes):
        for ours, theirs in zip(recording.layers, scene.layers, strict=True):
            torch.testing.assert_close(ours.queries[step], theirs.queries[0], atol=1e-4, rtol=1e-3)


# -------------------------------------------------------------------------------------------- ask, and learn


def test_ask_answers_at_the_photographs_size(tiny, monkeypatch):
    made = OVAM(tiny).look_at(picture(61, 90), PhotoSettings(CAPTION, (100, 200)))
    asked = SegmentSettings(("cat", "car"), step_indices=(1,), crf=False)
    answer = OVAM(tiny).answer(made, asked)
    assert answer.heatmaps.shape == answer.masks.shape == (2, 61, 90)
    maps = attribute(made.recording.select(steps=[1]), attribute_words(tiny, ["cat", "car"]))
    expected = make_masks(made.recording.select(steps=[1]), maps, made.image, crf=False)
    assert np.array_equal(answer.masks, expected)
    monkeypatch.setattr(generate_module, "MAX_WORK_PIXELS", 61 * 90 // 4)  # as for a photograph of many megapixels
    coarse = OVAM(tiny).answer(made, asked).masks
    assert coarse.shape == (2, 61, 90)
    assert 0 < (coarse != expected).mean() < 0.1
    monkeypatch.setattr(generate_module, "MAX_ANSWER", 61 * 90)
    with pytest.raises(InputError, match="2 words on a picture of 90x61"):
        OVAM(tiny).answer(made, asked)


@pytest.fixture
def photos(tmp_path):
    """Two photographs of different shapes with masks at their own sizes."""
    for name, (height, width) in {"a": (60, 90), "b": (80, 50)}.items():
        picture(height, width, ord(name)).save(tmp_path / f"{name}.png")
        mask = np.zeros((height, width), np.uint8)
        mask[height // 4 : height // 2, width // 3 :] = 255
        Image.fromarray(mask).save(tmp_path / f"{name}-mask.png")
    return tmp_path


def example(folder, name, **more) -> Example:
    return Example(photo_settings(("cat",), **more), folder / f"{name}-mask.png", ("cat",), folder / f"{name}.png")


def test_learning_is_recording_and_optimising(tiny, photos):
    token, _ = learn(OVAM(tiny), [example(photos, "a"), example(photos, "b", timesteps=[200], seed=3)], FEW, tau=0.6)
    recordings, targets = [], []
    for name, timesteps, seed in (("a", (100,), 0), ("b", (200,), 3)):
        image = Image.open(photos / f"{name}.png")
        recordings.append(record_image(tiny, image, "A photograph of a cat", timesteps, seed))
        labels = read_mask(photos / f"{name}-mask.png", (image.height, image.width))
        height, width = recordings[-1].image_size
        targets.append(np.asarray(Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST)))
    expected = optimize(recordings, targets, initial_embedding(tiny, ["cat"]), FEW)
    torch.testing.assert_close(token.embedding, expected.embedding)
    assert (token.prompt, token.steps, token.seed, token.branch) == ("A photograph of a cat", None, 0, "conditional")
    about = json.loads(token.settings)
    assert about["photo"]["timesteps"] == [100]
    assert about["optimization"]["images"] == 2
    assert token.tau == 0.6


def test_the_other_half_has_no_caption(tiny, photos):
    token, _ = learn(OVAM(tiny), [example(photos, "a")], FEW, branch="unconditional")
    assert token.branch == "unconditional"
    assert token.prompt == ""
    with pytest.raises(InputError, match="Some captions are empty"):
        learn(OVAM(tiny), [example(photos, "a"), example(photos, "b", caption="")], FEW)


def write_rows(folder, *rows) -> None:
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_rows_of_photographs(tiny, photos):
    write_rows(
        photos,
        {"photo": "a.png", "mask": "a-mask.png", "class": "cat"},
        {"photo": "b.png", "mask": "b-mask.png", "class": "cat", "caption": "a cat", "timesteps": [50, 100], "seed": 3},
    )
    first, second = read_folder(photos, OVAM(tiny))
    assert first == example(photos, "a")
    assert first.image.caption == "A photograph of a cat"
    assert second == example(photos, "b", caption="a cat", timesteps=(50, 100), seed=3)
    for change, part in (
        ({"photo": "../a.png"}, "outside of the folder"),
        ({"timesteps": [5000]}, "timestep is 5000"),
        ({"timesteps": "100"}, "give a list"),
        ({"caption": 3}, "caption is not text"),
        ({"width": 32}, "Only one side"),
        ({"mask": None}, "wrong kind"),
    ):
        write_rows(photos, {"photo": "a.png", "mask": "a-mask.png", "class": "cat"} | change)
        with pytest.raises(InputError, match=part):
            read_folder(photos, OVAM(tiny))


# ------------------------------------------------------------------------------------------ the command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model") / "tiny"
    make_pipe().save_pretrained(path)
    return str(path)


def files_of(path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_the_photo_command(folder, photos, tmp_path, capsys):
    exif = Image.Exif()
    exif[0x0112] = 8
    picture(60, 90).save(photos / "turned.jpg", exif=exif)
    out, common = tmp_path / "out", ["--model", folder, "--device", "cpu"]
    asked = ["--words", "cat", "red bus", "--timesteps", "100,300", "--seed", "4", "--no-crf"]
    assert main(["photo", str(photos / "turned.jpg"), *asked, "--out", str(out), *common]) == 0
    said = capsys.readouterr().out
    assert "cat: peak" in said
    assert "'A photograph of a cat and a red bus', seen as 26x40" in said
    names = {"image.png", "heatmaps.npz", "labels.png", "settings.json"}
    names |= {f"{kind}_{word}.png" for kind in ("overlay", "mask") for word in ("cat", "red-bus")}
    assert set(files_of(out)) == names
    assert {Image.open(path).size for path in out.glob("*.png")} == {(60, 90)}
    with np.load(out / "heatmaps.npz", allow_pickle=False) as file:
        assert file["maps"].shape == (2, 90, 60)
        assert file["words"].tolist() == ["cat", "red bus"]
    made, maps, model, _ = load_settings(out / "settings.json", PhotoSettings)
    assert made == PhotoSettings("A photograph of a cat and a red bus", (100, 300), 4)
    assert maps.words == ("cat", "red bus")
    assert json.loads((out / "settings.json").read_text())["format"] == "ovam-photo/1"
    assert model == folder

    again = tmp_path / "again"  # the upright picture that was saved is the photograph
    assert main(["photo", str(out / "image.png"), "--settings", str(out / "settings.json"), "--out", str(again)]) == 0
    assert files_of(again) == files_of(out)
    assert main(["generate", "--settings", str(out / "settings.json"), "--out", str(again)]) == 2
    assert "format ovam-generate/1" in capsys.readouterr().err


def test_a_token_from_a_photograph(folder, photos, tmp_path, capsys):
    common, file = ["--model", folder, "--device", "cpu"], tmp_path / "cat.safetensors"
    about = [
        "--photo",
        str(photos / "a.png"),
        "--mask",
        str(photos / "a-mask.png"),
        "--class",
        "cat",
        "--timesteps",
        "100,200",
    ]
    assert main(["optimize", *about, "--epochs", "2", "--out", str(file), *common]) == 0
    token = Token.load(file)
    assert token.prompt == "A photograph of a cat"
    assert json.loads(token.settings)["photo"]["timesteps"] == [100, 200]
    write_rows(photos, {"photo": "a.png", "mask": "a-mask.png", "class": "cat", "timesteps": [100, 200]})
    assert (
        main(
            ["optimize", "--image-set", str(photos), "--epochs", "2", "--out", str(tmp_path / "b.safetensors"), *common]
        )
        == 0
    )
    assert torch.equal(Token.load(tmp_path / "b.safetensors").embedding, token.embedding)
    out = tmp_path / "out"
    assert main(["photo", str(photos / "b.png"), "--token", str(file), "--no-crf", "--out", str(out), *common]) == 0
    assert "'A photograph of a cat'" in capsys.readouterr().out
    assert (out / "mask_cat.png").exists()


def test_a_token_of_the_other_half(folder, photos, tmp_path, capsys):
    common, file = ["--model", folder, "--device", "cpu"], tmp_path / "cat.safetensors"
    about = ["--photo", str(photos / "a.png"), "--mask", str(photos / "a-mask.png"), "--class", "cat"]
    assert main(["optimize", *about, "--branch", "unconditional", "--epochs", "1", "--out", str(file), *common]) == 0
    assert (
        main(
            ["photo", str(photos / "b.png"), "--token", str(file), "--no-crf", "--out", str(tmp_path / "out"), *common]
        )
        == 0
    )
    assert "'', seen as" in capsys.readouterr().out


BAD_COMMANDS = {
    "no picture": (["photo", "none.png", "--words", "cat"], "There is no picture"),
    "text": (["photo", "metadata.jsonl", "--words", "cat"], "not a picture"),
    "no words": (["photo", "a.png"], "word"),
    "timesteps": (["photo", "a.png", "--words", "cat", "--timesteps", "1000"], "within 0 to 999"),
    "timesteps in words": (["photo", "a.png", "--words", "cat", "--timesteps", "many"], "not a list of timesteps"),
    "size": (["photo", "a.png", "--words", "cat", "--size", "33x32"], "not a multiple"),
    "caption": (["photo", "a.png", "--words", "cat", "--caption", "cat " * 90], "The caption cannot be used"),
    "strip": (["photo", "strip.png", "--words", "cat"], "crop it"),
    "no settings": (["photo", "a.png", "--settings", "none.json"], "no settings file"),
    "photo without a mask": (["optimize", "--photo", "a.png", "--class", "cat"], "one of --mask"),
    "photo without a class": (["optimize", "--photo", "a.png", "--mask", "a-mask.png"], "mask and the class"),
    "photo with a prompt": (
        ["optimize", "--photo", "a.png", "--mask", "a-mask.png", "--class", "cat", "--prompt", "x"],
        "no prompt",
    ),
    "photo with steps": (
        ["optimize", "--photo", "a.png", "--mask", "a-mask.png", "--class", "cat", "--steps", "3"],
        "no prompt",
    ),
    "photo beside a folder": (["optimize", "--photo", "a.png", "--image-set", "."], "leave those options out"),
    "caption without a photo": (
        ["optimize", "--mask", "a-mask.png", "--class", "cat", "--prompt", "x", "--caption", "y"],
        "add --photo",
    ),
    "two halves": (
        [
            "optimize",
            "--photo",
            "a.png",
            "--mask",
            "a-mask.png",
            "--class",
            "cat",
            "--caption",
            "x",
            "--branch",
            "unconditional",
        ],
        "sees no text",
    ),
    "mask of another": (["optimize", "--photo", "a.png", "--mask", "b-mask.png", "--class", "cat"], "shapes differ"),
    "no such photo": (
        ["optimize", "--photo", "c.png", "--mask", "a-mask.png", "--class", "cat"],
        "There is no picture",
    ),
}


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_bad_input_is_one_sentence_and_status_2(case, folder, photos, capsys, monkeypatch):
    command, part = BAD_COMMANDS[case]
    monkeypatch.chdir(photos)
    write_rows(photos, {})
    picture(40, 300).save(photos / "strip.png")
    assert main([*command, "--out", "result/x", "--model", folder, "--device", "cpu"]) == 2
    said = capsys.readouterr().err.strip()
    assert_refused(said, part)
    assert not (photos / "result" / "x" / "settings.json").exists()
