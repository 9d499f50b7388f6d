"""Recordings detached from their model: to a file and back, in another process, bound to a model again."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import CROSS, JOINT, make_pipe, make_small, pipe_of
from safetensors.torch import load_file, save_file

from ovam_core import heatmaps
from ovam_core.attention.heatmap import attribute
from ovam_core.attention.modules import Unbound, as_recorded
from ovam_core.cli.app import main
from ovam_core.errors import InputError
from ovam_core.io import recording_files
from ovam_core.models.binding import bound
from ovam_core.models.presets import defaults_for
from ovam_core.ovam import OVAM
from ovam_core.picture import Picture, load_picture
from ovam_core.query import encode_padded, word_queries
from ovam_core.settings import GenerateSettings, SegmentSettings

PROMPT = "a photograph of the cat"
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8))
ASKED = SegmentSettings(words=("cat", "red bus"), crf=False)


def drawn(ovam: OVAM, **given) -> Picture:
    width = min(96, defaults_for(ovam.pipe).max_size)
    settings = GenerateSettings.for_model(ovam.pipe, PROMPT, **{"steps": 3, "width": width, "height": 64} | given)
    return ovam.draw(settings, with_goca=ovam.serves_goca)


@pytest.fixture(scope="module")
def small() -> OVAM:
    return OVAM(make_small())


@pytest.fixture(scope="module")
def picture(small) -> Picture:
    return drawn(small, width=64)


@pytest.fixture
def file(picture, tmp_path) -> Path:
    return picture.save_recording(tmp_path / "cat.safetensors")


def same(first: Picture, second: Picture, ovam: OVAM, asked: SegmentSettings = ASKED) -> None:
    one, other = ovam.answer(first, asked), ovam.answer(second, asked)
    assert one.labels == other.labels
    assert np.array_equal(one.heatmaps, other.heatmaps)
    assert np.array_equal(one.masks, other.masks)


# ----------------------------------------------------------------------------------------- what comes back


@pytest.mark.parametrize("name", [*CROSS, *JOINT])
def test_a_file_is_asked_as_the_recording_was(name, tmp_path):
    ovam = OVAM(pipe_of(name))
    first = drawn(ovam)
    first.save_recording(tmp_path / "x.safetensors")
    second = ovam.load_recording(tmp_path / "x.safetensors")
    assert list(second.image.getdata()) == list(first.image.getdata())
    assert (second.settings, second.seconds, second.dtype) == (first.settings, first.seconds, first.dtype)
    assert second.recording.nbytes == first.recording.nbytes
    assert second.recording.step_indices == first.recording.step_indices == (0, 1, 2)
    same(first, second, ovam)
    part = {"steps": [0, 2], "layers": [first.recording.layers[0].name]}
    embedding = encode_padded(ovam.pipe, "the red bus")
    assert torch.equal(
        heatmaps(second.recording.select(**part), embedding), heatmaps(first.recording.select(**part), embedding)
    )
    if first.goca is not None:
        same(first, second, ovam, replace(ASKED, method="GoCA, any word"))


def test_a_gradient_goes_through_what_was_bound(small, picture, file):
    found = []
    for one in (picture, small.load_recording(file)):
        embedding = encode_padded(small.pipe, "the red bus").requires_grad_()
        heatmaps(one.recording, embedding)[1].sum().backward()
        found.append(embedding.grad)
    assert torch.equal(*found)
    assert found[0].abs().max() > 0


def test_of_a_part_the_part_is_kept(small, picture, tmp_path):
    part = replace(picture, recording=picture.recording.select(steps=[1], resolutions=[8]))
    part.save_recording(tmp_path / "x.safetensors")
    back = small.load_recording(tmp_path / "x.safetensors")
    assert back.recording.step_indices == (1,)
    assert back.recording.resolutions == (8,)
    same(part, back, small)
    assert (tmp_path / "x.safetensors").stat().st_size < picture.nbytes


def test_a_half_of_a_joint_recording(tmp_path):
    ovam = OVAM(pipe_of("sd3"))
    whole = drawn(ovam)
    part = replace(whole, recording=whole.recording.select(steps=[0, 1], layers=["blocks.1"]))
    part.save_recording(tmp_path / "x.safetensors")
    same(part, ovam.load_recording(tmp_path / "x.safetensors"), ovam)


def test_the_other_half_of_the_batch_goes_along(small, picture, tmp_path):
    other = small.draw(picture.settings, branch="unconditional").recording
    both = replace(picture, others={"unconditional": other})
    both.save_recording(tmp_path / "x.safetensors")
    back = small.load_recording(tmp_path / "x.safetensors")
    query = word_queries(small.pipe, ["cat"])[0].prompt
    assert torch.equal(attribute(back.of_branch("unconditional"), query), attribute(other, query))


def test_a_photograph_and_numbers_of_half_precision(tmp_path):
    ovam = OVAM(make_pipe().to(dtype=torch.bfloat16))
    first = ovam.photograph(PHOTO, "the cat", timesteps=(100, 300))
    first.save_recording(tmp_path / "x.safetensors")
    second = ovam.load_recording(tmp_path / "x.safetensors")
    assert second.settings == first.settings
    assert second.image.size == (90, 60)
    assert second.recording.layers[0].queries.dtype == torch.bfloat16
    same(first, second, ovam)


CHILD = """
import sys, numpy as np
from pipelines import make_small
from ovam_core import OVAM
ovam = OVAM(make_small())
found = ovam.segment(ovam.load_recording(sys.argv[1]), ["cat", "red bus"], crf=False)
np.savez(sys.argv[2], maps=found.heatmaps, masks=found.masks)
"""


@pytest.mark.slow
def test_another_process_asks(small, picture, file, tmp_path):
    tests = Path(__file__).parent
    paths = os.pathsep.join([str(tests), str(tests.parent)])
    answer = tmp_path / "answer.npz"
    subprocess.run(
        [sys.executable, "-c", CHILD, str(file), str(answer)], check=True, env=os.environ | {"PYTHONPATH": paths}
    )
    with np.load(answer) as found:
        expected = small.answer(picture, ASKED)
        assert np.array_equal(found["maps"], expected.heatmaps)
        assert np.array_equal(found["masks"], expected.masks)


def test_the_command_line_writes_and_asks(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(OVAM, "from_pretrained", classmethod(lambda *_: small))
    file, size = str(tmp_path / "cat.safetensors"), ["--size", "64x64", "--steps", "2", "--no-crf"]
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    assert main(["generate", PROMPT, "--words", "cat", "car", *size, "--out", first, "--recording", file]) == 0
    monkeypatch.setattr(OVAM, "draw", lambda *_, **__: pytest.fail("nothing is drawn again"))
    assert main(["segment", file, "--words", "cat", "car", "--no-crf", "--out", second]) == 0
    for name in ("image.png", "heatmaps.npz", "mask_cat.png", "settings.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    goca = ["--method", "goca, any word", "--words", "bus", "car"]
    assert main(["segment", file, *goca, "--out", second]) == 0
    PHOTO.save(tmp_path / "x.png")
    photo = ["photo", str(tmp_path / "x.png"), "--words", "cat", "--no-crf", "--out", first, "--recording", file]
    assert main(photo) == 0
    assert main(["segment", file, "--words", "bus", "--no-crf", "--out", second]) == 0
    assert main(["segment", file, "--words", "bus", "--use-steps", "7", "--out", second]) == 2
    assert "None of these steps" in capsys.readouterr().err
    assert main(["generate", PROMPT, "--words", "cat", "--out", first, "--recording", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err
    assert main(["segment", str(tmp_path / "none"), "--words", "bus", "--out", second]) == 2
    assert "There is no recording" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------- detached


@pytest.mark.parametrize("name", ["sd", "flux-dev"])
def test_what_is_detached_holds_no_module_of_the_model(name):
    ovam = OVAM(pipe_of(name))
    whole = drawn(ovam)
    plain = whole.detached()
    assert "diffusers" not in pickle.dumps(plain).decode("latin-1")
    modules = [x.keys for x in plain.recording.layers if x.keys is not None]
    if plain.recording.stream is not None:
        modules = [plain.recording.stream.embed, *(x.to_keys for x in plain.recording.stream.blocks)]
    assert modules
    assert all(type(x) is Unbound and not list(x.parameters()) for x in modules)
    with pytest.raises(InputError, match="detached from its model"):
        heatmaps(plain.recording, encode_padded(ovam.pipe, "the cat"))
    same(whole, ovam.bind(pickle.loads(pickle.dumps(plain))), ovam)


def test_the_scale_of_a_lora_is_that_of_the_run(tmp_path):
    peft = pytest.importorskip("peft")

    def with_lora(seed: int) -> OVAM:
        pipe = make_small()
        torch.manual_seed(seed)
        pipe.unet.add_adapter(
            peft.LoraConfig(r=2, target_modules=["to_k", "to_q"], init_lora_weights=False), adapter_name="toy"
        )
        return OVAM(pipe)

    ovam = with_lora(1)
    ovam.pipe.set_adapters("toy", 0.5)
    first = drawn(ovam, width=64)
    first.save_recording(tmp_path / "x.safetensors")
    embedding = encode_padded(ovam.pipe, "the red bus")
    expected = heatmaps(first.recording, embedding)
    other = with_lora(1)  # at its full strength
    assert torch.equal(heatmaps(other.load_recording(tmp_path / "x.safetensors").recording, embedding), expected)
    with pytest.raises(InputError, match="LoRA that is not loaded here"):
        OVAM(make_small()).load_recording(tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="weights of the layer"):
        with_lora(2).load_recording(tmp_path / "x.safetensors")


@pytest.mark.parametrize("active", ["style", ["style"]])
def test_a_lora_of_that_name_that_had_nothing_there_is_refused(active):
    layer = torch.nn.Linear(2, 2)
    layer.scaling = {"toy": 1.0, "style": 1.0}
    run = {"scaling": {"toy": 1.0}, "_active_adapter": active}
    with pytest.raises(InputError, match="LoRA that is not loaded here"):
        as_recorded(layer, Unbound({"": run}))
    assert as_recorded(layer, Unbound({"": run | {"_active_adapter": "toy"}})).scaling == {"toy": 1.0}


# --------------------------------------------------------------------------------------- models that are others


def test_other_weights_are_refused(file):
    other = make_small()
    other.unet.up_blocks[1].attentions[0].transformer_blocks[0].attn2.to_k.weight.data *= 1.1
    with pytest.raises(
        InputError, match=r"made by small and cannot be asked with small: The weights of the layer up_bl"
    ):
        OVAM(other).load_recording(file)


@pytest.mark.parametrize("name", ["sdxl", "pixart-sigma", "hunyuan", "sd3", "flux-dev"])
def test_other_models_are_refused(name, file, tmp_path):
    ovam = OVAM(pipe_of(name))
    for one, path in ((ovam, file), (OVAM(make_small()), drawn(ovam).save_recording(tmp_path / "y.safetensors"))):
        with pytest.raises(InputError, match="cannot be asked with") as caught:
            one.load_recording(path)
        assert "\n" not in str(caught.value)


def test_a_model_of_other_layers_is_refused(file):
    pipe = make_pipe("sd2")
    with pytest.raises(InputError, match=r"The layer .* is not one of this model"):
        OVAM(pipe).load_recording(file)


def test_a_changed_text_encoder_is_refused_when_it_is_asked(file):
    pipe = make_small()
    ovam = OVAM(pipe)
    back = ovam.load_recording(file)
    for weight in pipe.text_encoder.parameters():
        weight.data *= 1.5
    with pytest.raises(InputError, match="text encoder is no longer"):
        ovam.answer(back, ASKED)


# -------------------------------------------------------------------------------------- files of strangers


def header_of(path: Path) -> dict:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def rewritten(path: Path, change) -> Path:
    """The file with `change(about, tensors)` made to what it tells and holds."""
    about, tensors = json.loads(header_of(path)["__metadata__"]["about"]), load_file(path)
    tensors = {name: x.clone() for name, x in tensors.items()}
    change(about, tensors)
    told = about if isinstance(about, str) else json.dumps(about)
    save_file(tensors, path, metadata={"format": recording_files.FORMAT, "about": told})
    return path


def layer(about: dict, place: int = 0) -> dict:
    return about["recordings"]["recording"]["layers"][place]


def put(tensors: dict, name: str, x: torch.Tensor) -> None:
    assert name in tensors
    tensors[name] = x


def sums(about: dict) -> dict:
    return about["recordings"]["recording"]["column_sums"][0]


QUERIES, SUMS = "recording.layers.0.queries", "recording.column_sums.0.sums"
BROKEN = {
    "no recordings": lambda about, _: about.pop("recordings"),
    "no layers": lambda about, _: about["recordings"]["recording"].update(layers=[]),
    "a layer of no name": lambda about, _: layer(about).pop("name"),
    "a layer twice": lambda about, _: layer(about, 1).update(name=layer(about)["name"]),
    "a key that is not known": lambda about, _: layer(about).update(more=1),
    "a tensor that is not there": lambda about, _: layer(about).update(queries={"tensor": "nowhere"}),
    "a number for a tensor": lambda about, _: layer(about).update(queries=3),
    "no module": lambda about, _: layer(about).update(keys=None),
    "a module of another kind": lambda about, _: layer(about).update(keys={"lora": {"": {"scaling": {"a": "b"}}}}),
    "a huge grid": lambda about, _: about["recordings"]["recording"].update(height=10**9),
    "a grid of other sides": lambda about, _: layer(about).update(height=layer(about)["height"] + 1),
    "steps that fall": lambda about, _: about["recordings"]["recording"].update(step_indices=[2, 1, 0]),
    "steps without end": lambda about, _: about["recordings"]["recording"].update(step_indices=[0, 1, 10**30]),
    "a branch of no name": lambda about, _: about["recordings"]["recording"].update(branch="both"),
    "timesteps of text": lambda about, _: about["recordings"]["recording"].update(timesteps="abc"),
    "a dtype of no name": lambda about, _: layer(about).update(dtype={"dtype": "__class__"}),
    "a scale of no number": lambda about, _: layer(about).update(scale=float("nan")),
    "whole numbers": lambda _, tensors: put(tensors, QUERIES, tensors[QUERIES].to(torch.int32)),
    "a flat tensor": lambda _, tensors: put(tensors, QUERIES, tensors[QUERIES].flatten()),
    "too few steps": lambda _, tensors: put(tensors, QUERIES, tensors[QUERIES][:1].clone()),
    "an empty tensor": lambda _, tensors: put(tensors, QUERIES, tensors[QUERIES][:, :0].clone()),
    "an image of four channels": lambda _, tensors: put(tensors, "image", torch.zeros(8, 8, 4, dtype=torch.uint8)),
    "an image of floats": lambda _, tensors: put(tensors, "image", torch.zeros(8, 8, 3)),
    "no image": lambda _, tensors: tensors.pop("image"),
    "an image of another shape": lambda _, tensors: put(tensors, "image", torch.zeros(8, 80, 3, dtype=torch.uint8)),
    "a seed of text": lambda about, _: about["generation"].update(seed="x"),
    "a setting that is not known": lambda about, _: about["generation"].update(more=1),
    "no prompt": lambda about, _: about["generation"].pop("prompt"),
    "no model": lambda about, _: about.pop("model"),
    "heads of GoCA": lambda _, tensors: put(tensors, "goca.layers.0.heads", torch.zeros(1, 2)),
    "a grid of GoCA": lambda about, _: about["recordings"]["goca"].update(height=3),
    "a list": lambda about, _: about.update(recordings=[]),
    "an image without end": lambda about, _: about["recordings"]["recording"].update(image_size=[10**400, 1]),
    "a grid beyond all models": lambda about, _: about["recordings"]["recording"].update(height=1025, width=1025),
    "a name of two lines": lambda about, _: layer(about).update(name="a\nb"),
    "a name without end": lambda about, _: layer(about).update(name="x" * 1000),
    "sums of negative sides": lambda about, _: sums(about).update(height=-sums(about)["height"], width=-8),
    "sums of falling steps": lambda about, _: sums(about).update(steps=[2, 1, 0]),
    "sums that are none": lambda _, tensors: tensors[SUMS].fill_(float("nan")),
    "sums below 0": lambda _, tensors: tensors[SUMS].fill_(-1),
    "a probe that is no number": lambda _, tensors: tensors["recording.layers.0.made"].fill_(float("nan")),
    "heads of GoCA that are none": lambda _, tensors: tensors["goca.layers.0.heads"].fill_(float("nan")),
    "numbers of eight bits": lambda _, tensors: put(tensors, QUERIES, tensors[QUERIES].to(torch.float8_e4m3fn)),
    "a time without end": lambda about, _: about.update(seconds=10**400),
    "a time that is none": lambda about, _: about.update(seconds=float("nan")),
    "a model of two lines": lambda about, _: about.update(model="a\nb"),
    "a device without end": lambda about, _: about.update(device="x" * 100_000),
    "a start that is not there": lambda about, _: about["generation"].update(start="/etc/passwd", strength=0.5),
    "a start that nobody names": lambda _, tensors: tensors.update(start=torch.zeros(8, 8, 3, dtype=torch.uint8)),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_recording_is_one_sentence(fault, small, file):
    with pytest.raises(InputError, match="recording") as caught:
        small.load_recording(rewritten(file, BROKEN[fault]))
    assert "\n" not in str(caught.value)


HALF = {
    "by another name": lambda halves: halves.update(x=halves.pop("unconditional")),
    "the same half": lambda halves: halves["unconditional"].update(branch="conditional"),
    "another grid": lambda halves: halves["unconditional"].update(height=3),
    "another image": lambda halves: halves["unconditional"].update(image_size=[3, 5]),
}


@pytest.mark.parametrize("fault", HALF)
def test_a_broken_half_is_one_sentence(fault, small, picture, tmp_path):
    other = small.draw(picture.settings, branch="unconditional").recording
    path = replace(picture, others={"unconditional": other}).save_recording(tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="one of the wrong kind"):
        small.load_recording(rewritten(path, lambda about, _: HALF[fault](about["recordings"]["others"])))


STREAM = {
    "a block less": lambda about, _: about["recordings"]["recording"]["stream"]["blocks"].pop(0),
    "a block of another name": lambda about, _: about["recordings"]["recording"]["stream"]["blocks"][0].update(
        name="x"
    ),
    "keys alone": lambda about, _: about["recordings"]["recording"]["stream"]["blocks"][0].pop("image_values"),
    "no stream": lambda about, _: about["recordings"]["recording"].pop("stream"),
    "another width": lambda _, tensors: put(
        tensors, "recording.stream.modulation", tensors["recording.stream.modulation"][:, :-1].clone()
    ),
    "other heads": lambda _, tensors: [
        put(tensors, name, tensors[name][:, :1].clone()) for name in list(tensors) if ".image_" in name
    ],
    "another probe": lambda _, tensors: [
        put(tensors, name, torch.ones(3)) for name in list(tensors) if ".made." in name
    ],
}


def test_blocks_that_do_not_begin_at_the_first_are_refused():
    """Each of them is a block of the model."""
    ovam = OVAM(pipe_of("sd3"))
    recording = drawn(ovam).detached().recording
    stream = recording.stream
    part = replace(recording, layers=recording.layers[:1], stream=replace(stream, blocks=stream.blocks[:1] * 2))
    with pytest.raises(InputError, match=f"The layer {stream.blocks[0].name} of this recording is not one"):
        bound(ovam.pipe, part)


@pytest.mark.parametrize("fault", STREAM)
def test_a_broken_text_stream_is_one_sentence(fault, tmp_path):
    ovam = OVAM(pipe_of("sd3"))
    path = drawn(ovam).save_recording(tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"recording|cannot be asked") as caught:
        ovam.load_recording(rewritten(path, STREAM[fault]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "is not a recording"),
        (b"\x02", "is not a recording"),
        (struct.pack("<Q", 1 << 62) + b"{}", "is not a recording"),
        (struct.pack("<Q", 2) + b"{}", "is not a recording"),
        (struct.pack("<Q", 9) + b"not JSON!", "is not a recording"),
        (struct.pack("<Q", 200_000) + b"[" * 200_000, "is not a recording"),
        (struct.pack("<Q", 4) + b"[1] ", "is not a recording"),
        (b"\x80\x05K\x01.", "is not a recording"),
    ],
)
def test_what_is_no_recording_is_one_sentence(data, sentence, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(InputError, match=sentence):
        load_picture(path)


def test_files_that_are_not_there_not_whole_or_tokens(file, tmp_path, monkeypatch):
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(InputError, match="There is no recording"):
            load_picture(path)
    save_file({"embedding": torch.zeros(1, 4)}, tmp_path / "token.safetensors", metadata={"format": "ovam-token/1"})
    with pytest.raises(InputError, match="is not a recording of this program"):
        load_picture(tmp_path / "token.safetensors")
    data = file.read_bytes()
    (tmp_path / "half.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="is not a whole safetensors file"):
        load_picture(tmp_path / "half.safetensors")
    monkeypatch.setattr(recording_files, "MAX_HEADER", 100)
    with pytest.raises(InputError, match="is not a recording"):
        load_picture(file)


def test_a_file_is_whole_or_absent(picture, file, monkeypatch):
    before = file.read_bytes()

    def fails(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(recording_files, "save_file", fails)
    with pytest.raises(OSError, match="No space"):
        picture.save_recording(file)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_what_was_read_needs_the_file_no_more(small, picture, file):
    """And lies where torch would have put it: where a tensor begins decides the last bit of its products."""
    back = small.load_recording(file)
    file.write_bytes(b"")
    assert all(layer.queries.data_ptr() % 64 == 0 for layer in back.recording.layers)
    same(picture, back, small)
