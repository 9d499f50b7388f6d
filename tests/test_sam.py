"""Segment Anything: prompts from our maps, masks as transformers makes them, its refusals; the annotator of the page.

A tiny SAM of the real classes with random weights: the calls are the real ones, the masks are noise.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SamConfig, SamImageProcessorPil, SamModel, SamProcessor

from ovam_core import OVAM
from ovam_core.cli import main
from ovam_core.downstream import sam
from ovam_core.downstream.registry import with_weights
from ovam_core.downstream.sam import SAM, Prompt, Segmenter, check_weights, parts_of, prompts_of
from ovam_core.errors import InputError
from ovam_core.methods import Method, method_named
from tabs.annotator import Annotator
from tabs.canvas import PAINT, skeleton
from tabs.optimize import OptimizeTab

RNG = np.random.default_rng(3)
SIDE = 64  # of what the tiny SAM sees


def make_sam() -> SamModel:
    torch.manual_seed(4)
    vision = dict(hidden_size=16, output_channels=16, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE)
    vision |= dict(mlp_dim=16, window_size=2, global_attn_indexes=[1], num_pos_feats=8)
    prompt = dict(hidden_size=16, image_size=SIDE, mask_input_channels=4)
    decoder = dict(hidden_size=16, mlp_dim=16, num_attention_heads=2, iou_head_hidden_dim=16)
    model = SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)).eval()
    for weight in model.parameters():
        weight.data = torch.randn_like(weight) * 0.4
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("sam")
    make_sam().save_pretrained(place)
    images = SamImageProcessorPil(size={"longest_edge": SIDE}, pad_size={"height": SIDE, "width": SIDE})
    SamProcessor(images).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def own(folder) -> Segmenter:
    return Segmenter(folder)


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (60, 90, 3), np.uint8))


@pytest.fixture(scope="module")
def ovam(tiny) -> OVAM:
    return OVAM(tiny)


@pytest.fixture(scope="module")
def picture(ovam, photo):
    return ovam.photograph(photo, "the cat and a red bus", width=48, height=32)


def by_transformers(folder, image, points, boxes=None):
    """The masks of a whole call as transformers' page on SAM writes it: bool [prompts, masks, H, W], and scores."""
    model, processor = SamModel.from_pretrained(folder), SamProcessor.from_pretrained(folder)
    given = processor(image, input_points=[[[list(x)] for x in points]], input_boxes=boxes, return_tensors="pt")
    given["input_points"] = given["input_points"].float()
    with torch.no_grad():
        found = model(**given, multimask_output=boxes is None)
    masks = processor.post_process_masks(found.pred_masks, given["original_sizes"], given["reshaped_input_sizes"])[0]
    return masks.numpy(), found.iou_scores[0].numpy()


# ------------------------------------------------------------------------------------ the model


@pytest.mark.parametrize("size", [(90, 60), (37, 81), (64, 64), (200, 30)])
def test_points_have_the_best_of_three_masks(own, folder, size):
    image = Image.fromarray(RNG.integers(0, 256, (size[1], size[0], 3), np.uint8))
    points = [(3, 5), (size[0] - 2, size[1] // 2)]
    found = own.masks(image, [Prompt(point) for point in points])
    masks, scores = by_transformers(folder, image, points)
    assert masks.shape[1] == 3
    expected = np.stack([of_one[score.argmax()] for of_one, score in zip(masks, scores, strict=True)])
    assert (found.shape, found.dtype) == ((2, size[1], size[0]), bool)
    assert np.array_equal(found, expected)
    assert 0 < found.mean() < 1


def test_boxes_have_their_one_mask(own, folder, photo):
    points, boxes = [(10, 12), (70, 40)], [(2, 3, 30, 31), (50, 20, 88, 59)]
    found = own.masks(photo, [Prompt(*both) for both in zip(points, boxes, strict=True)])
    masks, _ = by_transformers(folder, photo, points, [[list(box) for box in boxes]])
    assert masks.shape == (2, 1, 60, 90)
    assert np.array_equal(found, masks[:, 0])
    assert own.masks(photo, []).shape == (0, 60, 90)


def test_a_picture_is_encoded_once(own, photo, monkeypatch):
    calls = []
    encode = own._model.get_image_embeddings
    monkeypatch.setattr(own._model, "get_image_embeddings", lambda pixels: calls.append(1) or encode(pixels))
    other = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    first = [own.masks(one, [Prompt((5, 5))]) for one in (other, photo, other, photo.convert("RGBA"))]
    assert len(calls) <= 2
    assert np.array_equal(first[0], first[2])
    assert np.array_equal(first[1], first[3])
    reshaped = Image.frombytes("RGB", (60, 90), photo.tobytes())  # the same bytes of another shape
    assert own.masks(reshaped, [Prompt((5, 5))]).shape == (1, 90, 60)
    for number in range(sam.KEPT_PICTURES + 1):
        own.masks(Image.new("RGB", (8, 8), (number,) * 3), [Prompt((1, 1))])
    assert len(own._seen) == sam.KEPT_PICTURES


# ------------------------------------------------------------------------------------ prompts


def flooded(mask: np.ndarray) -> list[set[tuple[int, int]]]:
    """Connected parts, eight neighbours a pixel, by a search from each pixel."""
    left, parts = {tuple(x) for x in np.argwhere(mask)}, []
    while left:
        edge = [left.pop()]
        part = set(edge)
        while edge:
            y, x = edge.pop()
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            part |= near
            edge += near
        parts.append(part)
    return sorted(parts, key=len, reverse=True)


def test_parts_against_a_search():
    mask = RNG.random((40, 57)) > 0.65
    found = [{tuple(x) for x in part.nonzero().tolist()} for part in parts_of(torch.from_numpy(mask))]
    expected = flooded(mask)
    assert [len(part) for part in found] == [len(part) for part in expected]
    assert {frozenset(part) for part in found} == {frozenset(part) for part in expected}
    assert parts_of(torch.zeros(5, 5, dtype=torch.bool)) == []


def test_parts_of_a_large_mask():
    mask = torch.zeros(300, 500, dtype=torch.bool)
    mask[10:50, 20:90] = mask[200:290, 300:480] = True
    assert [int(part.sum()) for part in parts_of(mask)] == [90 * 180, 40 * 70]
    assert torch.equal(torch.stack(parts_of(mask)).any(dim=0), mask)


def test_a_box_and_a_peak_for_each_larger_part():
    mask, heat = torch.zeros(40, 60, dtype=torch.bool), torch.rand(40, 60, generator=torch.manual_seed(0))
    mask[5:15, 10:20] = mask[20:40, 30:60] = True
    mask[0, 0] = True  # too small to ask for
    heat[7, 12], heat[30, 44], heat[18, 3] = 2.0, 1.5, 9.0  # the last on no part
    assert prompts_of(mask, heat) == [Prompt((44, 30), (30, 20, 59, 39)), Prompt((12, 7), (10, 5, 19, 14))]
    many = torch.zeros(90, 90, dtype=torch.bool)
    many[::9, ::9] = True
    assert len(prompts_of(many, torch.ones(90, 90))) == 0  # each is under a twentieth of it
    many[:] = False
    many[:, ::8] = True
    assert len(prompts_of(many, torch.ones(90, 90))) == sam.ASKED_PARTS


# ------------------------------------------------------------------------------------ the method


@pytest.mark.parametrize("base", ["OVAM", "DAAM", "GoCA, any word"])
def test_the_mask_is_that_of_boxes_around_the_base_methods(ovam, picture, own, folder, base):
    method = SAM(own, base)
    assert isinstance(method, Method)
    found = ovam.segment(picture, ["cat", "red bus"], method=method)
    plain = ovam.segment(picture, ["cat", "red bus"], method=base, crf=False)
    assert np.array_equal(found.heatmaps, plain.heatmaps)
    assert found.masks.shape == (2, 60, 90)
    for mask, rough, heat in zip(found.masks, plain.masks, plain.heatmaps, strict=True):
        prompts = prompts_of(torch.from_numpy(rough), torch.from_numpy(heat))
        assert prompts
        points, boxes = [x.point for x in prompts], [[list(x.box) for x in prompts]]
        masks, _ = by_transformers(folder, picture.image, points, boxes)
        assert np.array_equal(mask, masks[:, 0].any(axis=0))
    assert found.settings.to_json()["method"] == ("SAM" if base == "OVAM" else f"{base} + SAM")


def test_it_cuts_where_its_base_does_and_refuses_what_that_refuses(ovam, picture, own):
    rough = ovam.segment(picture, "cat", tau=0.9, crf=False)
    few = prompts_of(torch.from_numpy(rough.masks[0]), torch.from_numpy(rough.heatmaps[0]))
    expected = own.masks(picture.image, few).any(axis=0)
    found = ovam.segment(picture, "cat", method=SAM(own), tau=0.9)
    assert np.array_equal(found.masks[0], expected)
    with pytest.raises(InputError, match="name no denoising steps"):
        ovam.segment(picture, "cat", method=SAM(own, "GoCA, any word"), step_indices=[0])


def test_by_name(folder):
    assert with_weights("sam", folder).name == with_weights("OVAM + SAM", folder).name == "SAM"
    assert with_weights("goca + sam", str(folder)).base is method_named("GoCA")
    for name in ("sam", "SAM", "goca + sam"):
        with pytest.raises(InputError, match=r"weights are yours to bring: .*--weights.*method=SAM\("):
            method_named(name)
    with pytest.raises(InputError, match="There is no method 'nothing'"):
        with_weights("nothing + sam", folder)


def test_on_the_command_line_and_again(folder, tmp_path, capsys):
    made = ["generate", "a cat", "--model", "emoji-voc", "--device", "cpu", "--size", "64x64", "--words", "cat"]
    made += ["--steps", "1"]
    own, again, out = ["--method", "sam", "--weights", str(folder)], tmp_path / "again", tmp_path / "out"
    assert main([*made, *own, "--out", str(out)]) == 0
    assert json.loads((out / "settings.json").read_text())["maps"]["method"] == "SAM"
    replay = ["generate", "--settings", str(out / "settings.json"), "--out", str(again)]
    assert main([*replay, "--weights", str(folder)]) == 0
    assert {x.name: x.read_bytes() for x in again.iterdir()} == {x.name: x.read_bytes() for x in out.iterdir()}
    capsys.readouterr()
    for arguments in (replay, [*made, "--method", "sam", "--out", str(out)]):
        assert main(arguments) == 2
        said = capsys.readouterr().err.strip()
        assert "yours to bring" in said
        assert "\n" not in said


# ------------------------------------------------------------------------------------ what is no SAM


def broken(folder, place, **changed):
    """A copy of the folder with files written over; None takes one away."""
    shutil.copytree(folder, place)
    for name, content in changed.items():
        (file,) = place.glob(f"{name}.*")
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content)
    return place


def test_folders_that_are_no_sam(folder, tmp_path):
    clip = json.dumps({"model_type": "clip"}).encode()
    lacking = broken(folder, tmp_path / "lacking")
    model = make_sam()
    left = {name: x for name, x in model.state_dict().items() if "iou_token" not in name}
    model.save_pretrained(lacking, state_dict=left)
    for weights, said in (
        (tmp_path / "nothing", "There is no folder"),
        (tmp_path, "cannot be loaded"),
        ("nobody/no-such-model", "cannot be loaded"),
        ("https://example.com/sam.pth", "There is no folder"),
        (broken(folder, tmp_path / "clip", config=clip), "of the kind 'clip' and no SAM"),
        (broken(folder, tmp_path / "text", config=b"no JSON"), "cannot be loaded"),
        (broken(folder, tmp_path / "no_weights", model=None), "cannot be loaded"),
        (broken(folder, tmp_path / "cut", model=b"no weights"), "cannot be loaded"),
        (broken(folder, tmp_path / "no_processor", processor_config=None), "cannot be loaded"),
        (lacking, "lacks 'mask_decoder.iou_token.weight': get the whole model"),
    ):
        with pytest.raises(InputError, match=said) as caught:
            Segmenter(weights)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 700


def test_numbers_that_are_none(folder, photo, tmp_path):
    model = make_sam()
    model.mask_decoder.iou_prediction_head.proj_out.bias.data[:] = torch.nan
    model.save_pretrained(broken(folder, tmp_path / "nan"))
    with pytest.raises(InputError, match="gives no numbers"):
        Segmenter(tmp_path / "nan").masks(photo, [Prompt((1, 1))])


def test_sam_2_without_torchvision(folder, tmp_path, monkeypatch):
    second = broken(folder, tmp_path / "second", config=b'{"model_type": "sam2_video"}')
    monkeypatch.setattr("transformers.utils.is_torchvision_available", lambda: False)
    with pytest.raises(InputError, match=r"SAM 2 needs torchvision.*pip install 'ovam\[sam\]'"):
        check_weights(second)
    monkeypatch.setattr("transformers.utils.is_torchvision_available", lambda: True)
    assert check_weights(second) == "sam2_video"


def test_sam_2_by_transformers(tmp_path, photo):
    pytest.importorskip("torchvision")
    from transformers import Sam2Config, Sam2ImageProcessor, Sam2Model, Sam2Processor

    torch.manual_seed(5)
    hiera = dict(model_type="sam2_hiera_det_model", hidden_size=8, num_attention_heads=1, image_size=[SIDE, SIDE])
    hiera |= dict(blocks_per_stage=[1, 1, 2, 1], embed_dim_per_stage=[8, 16, 32, 64], global_attention_blocks=[3])
    hiera |= dict(num_attention_heads_per_stage=[1, 1, 2, 2], window_size_per_stage=[2, 2, 2, 2])
    vision = dict(backbone_config=hiera, backbone_channel_list=[64, 32, 16, 8], fpn_hidden_size=16)
    vision |= dict(backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]])
    prompt = dict(hidden_size=16, image_size=SIDE, mask_input_channels=4)
    decoder = dict(hidden_size=16, mlp_dim=16, num_attention_heads=2, iou_head_hidden_dim=16)
    model = Sam2Model(Sam2Config(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder))
    for weight in model.parameters():
        weight.data = torch.randn_like(weight) * 0.3
    model.save_pretrained(tmp_path)
    processor = Sam2Processor(Sam2ImageProcessor(size={"height": SIDE, "width": SIDE}))
    processor.save_pretrained(tmp_path)
    prompts = [Prompt((10, 12), (2, 3, 30, 31)), Prompt((70, 40), (50, 20, 88, 59))]
    points, boxes = [[[[10, 12]], [[70, 40]]]], [[list(one.box) for one in prompts]]
    given = processor(photo, input_points=points, input_labels=[[[1], [1]]], input_boxes=boxes, return_tensors="pt")
    with torch.no_grad():
        found = model.eval()(**given, multimask_output=False)
    expected = processor.post_process_masks(found.pred_masks, given["original_sizes"])[0][:, 0].numpy()
    assert np.array_equal(Segmenter(tmp_path).masks(photo, prompts), expected)
    assert 0 < expected.mean() < 1


def test_too_little_memory(own, photo, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(own, "_embeddings", full)
    with pytest.raises(InputError, match="too little memory for SAM"):
        own.masks(photo, [Prompt((1, 1))])


# ------------------------------------------------------------------------------------ on the page


def test_it_is_offered_where_its_weights_are_at_hand(folder, monkeypatch, caplog, tmp_path):
    monkeypatch.delenv("OVAM_SAM", raising=False)
    assert Annotator.at_hand() is None
    monkeypatch.setenv("OVAM_SAM", str(tmp_path / "nothing"))
    assert Annotator.at_hand() is None
    assert "There is no folder" in caplog.text
    monkeypatch.setenv("OVAM_SAM", str(folder))
    assert Annotator.at_hand() is not None
    assert "SAM" not in skeleton()
    assert "Click, by SAM" in skeleton(with_sam=True)


def test_a_click_on_the_second_tab(folder, own, ovam, picture):
    tab = OptimizeTab.__new__(OptimizeTab)
    tab.annotator, tab.ovam = Annotator(str(folder)), ovam
    tab.key, tab.way, tab.spot, tab.word, tab.name = range(5)
    tab.sessions = SimpleNamespace(of=lambda _: SimpleNamespace(screen=lambda _: picture), shipped={})
    turn = SimpleNamespace(__enter__=lambda _: None, __exit__=lambda *_: None)
    tab.model = SimpleNamespace(
        words_of=lambda _: type("Turn", (), vars(turn))(), answer=lambda *given: ovam.answer(*given[:2])
    )

    def click(spot, name="cat"):
        return tab.take_region({0: "key", 1: PAINT, 2: spot, 3: "", 4: name}, None)

    mail = click("0.5,0.25")
    expected = own.masks(picture.image, [Prompt((45, 15))])[0]
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(mail["object"].partition(",")[2]))))
    assert np.array_equal(drawn, expected)
    assert mail["add"]
    assert f"{expected.mean():.0%} of the picture" in mail["said"]
    assert (mail["key"], mail["name"]) == ("key", "cat")
    assert click("0.5,0.25", "")["name"]  # the word that is strongest there
    assert click("9,9")["kind"] == "note"
