"""The parts of the page: how handlers say what went wrong, how values are read, how a model is opened."""

from __future__ import annotations

import base64
import io

import gradio as gr
import numpy as np
import pytest
from PIL import Image
from pipelines import make_pipe

import app
from ovam_core import OVAM, InputError
from ovam_core.attention import mask
from ovam_core.errors import HubUnreachable
from ovam_core.methods import settings_of_text
from ovam_core.models.load import learned_words
from ovam_core.settings import GenerateSettings
from tabs.asked import grid_name, grid_names, prompt_words, segment_settings
from tabs.events import OUR_FAULT, Inputs, handler
from tabs.examples import EXAMPLES, buttons, thumbnail
from tabs.fields import NO_CRF
from tabs.generate import vocabulary

# ----------------------------------------------------------------------------------------------- the parts


def test_a_handler_says_each_kind_of_fault(caplog):
    @handler
    def given(error):
        raise error

    with pytest.raises(gr.Error) as caught:
        given(InputError("no <b> & so on"))
    assert caught.value.message == "no &lt;b&gt; &amp; so on"
    assert not caplog.text
    own = gr.Error("as it is")
    with pytest.raises(gr.Error) as caught:
        given(own)
    assert caught.value is own
    with pytest.raises(gr.Error) as caught:
        given(ValueError("of torch"))
    assert caught.value.message == OUR_FAULT
    assert "of torch" in caplog.text


def test_a_handler_that_gives_several_answers_says_them_too():
    closed = []

    @handler
    def given(error):
        try:
            yield 1
            raise error
        finally:
            closed.append(1)

    answers = given(InputError("no"))
    assert next(answers) == 1
    with pytest.raises(gr.Error, match="no"):
        next(answers)
    answers = given(InputError("no"))
    next(answers)
    answers.close()  # a visitor who left
    assert closed == [1, 1]


def test_inputs_are_read_as_what_they_should_be(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    with gr.Blocks():
        seed, slider, box = gr.Number(label="Seed", precision=0), gr.Slider(0, 1, label="Share"), gr.Textbox()
        names, group, way = gr.Dropdown([], multiselect=True), gr.CheckboxGroup(["a"]), gr.Radio(["a", "b"])
        file, tick = gr.File(), gr.Checkbox()

    def of(field, value):
        return Inputs({field: value})

    assert of(seed, 3.0).whole(seed) == 3
    assert of(seed, None).whole(seed) is None
    assert of(slider, 0.25).number(slider) == 0.25
    for field, wrong in (
        (seed, 1.5),
        (seed, "3"),
        (seed, True),
        (seed, 10**400),
        (slider, -(10**400)),
        (seed, float("nan")),
        (slider, None),
        (slider, float("inf")),
    ):
        with pytest.raises(InputError, match=f"{field.label} is .*; give a (whole )?number"):
            of(field, wrong).whole(field)
    assert of(box, None).text(box) == ""
    assert of(box, 5).text(box) == "5"
    assert of(names, None).names(names, "no") == []
    assert of(names, ["x"]).names(names, "no") == ["x"]
    for wrong in (5, "cat", {"a": 1}):
        with pytest.raises(InputError, match="no list"):
            of(names, wrong).names(names, "no list")
        with pytest.raises(InputError, match="choose among a"):
            of(group, wrong).several(group)
        with pytest.raises(InputError, match="choose a or b"):
            of(way, wrong).choice(way)
    assert of(way, "b").choice(way) == "b"
    assert of(file, None).file(file) is None
    (tmp_path / "x.png").touch()
    uploaded = f"{file.GRADIO_CACHE}/x.png"
    assert of(file, {"path": uploaded}).file(file) == uploaded
    for elsewhere in (__file__, "x", f"{file.GRADIO_CACHE}/../x.png", "http://a/x.png", 5, "\0", "\ud800", "x" * 9999):
        with pytest.raises(InputError, match="uploaded"):
            of(file, {"path": elsewhere}).file(file)
    with pytest.raises(InputError, match="not on the server any more"):
        of(file, {"path": f"{file.GRADIO_CACHE}/gone.png"}).file(file)
    for no_file in (5, "cat", [{"path": uploaded}], True):
        with pytest.raises(InputError, match="uploaded"):
            of(file, no_file).file(file)
    assert of(tick, None).ticked(tick) is False
    for wrong in (1, "yes", [True]):
        with pytest.raises(InputError, match="true or false"):
            of(tick, wrong).ticked(tick)


def test_without_simplecrf_the_switch_is_off_and_says_why(ovam, monkeypatch):
    def switches(page):
        boxes = [block for block in page.blocks.values() if isinstance(block, gr.Checkbox)]
        return [box for box in boxes if (box.label or "").startswith("Sharpen edges")]

    assert [(one.value, one.interactive) for one in switches(app.build(ovam))] == [(True, True)] * 2
    monkeypatch.setattr(mask, "crf_available", lambda: False)
    without = app.build(ovam)
    assert [(one.value, one.interactive, one.info) for one in switches(without)] == [(False, False, NO_CRF)] * 2
    rules = next(event.fn for event in without.fns.values() if event.name == "rules")
    assert not rules("OVAM")[2].interactive
    monkeypatch.undo()
    assert rules("OVAM")[2].interactive
    assert not rules("DAAM")[2].interactive


def test_grids_are_named_alike_for_every_size(ovam):
    assert grid_names(ovam) == ["1/4", "1/8", "1/16", "1/32"]
    assert [grid_name((512, 384), one) for one in (64, 32, 16, 8)] == ["1/8", "1/16", "1/32", "1/64"]
    assert [grid_name((200, 120), one) for one in (25, 13, 7)] == ["1/8", "1/16", "1/32"]


def test_a_model_whose_words_are_not_known_says_nothing_of_them(ovam):
    assert vocabulary(ovam).count("<button") == len(learned_words(ovam.pipe)) > 50
    assert not {"a", "of", "the"} & set(learned_words(ovam.pipe))
    assert vocabulary(OVAM(make_pipe())) == ""


def test_words_are_read_without_an_image(ovam):
    asked = segment_settings(ovam, None, words="cat; Cat, dog", tau=0.4, alpha=0.85, steps="all")
    assert asked.words == ("cat", "dog")


def test_an_unreachable_hub_falls_back_with_a_notice(monkeypatch):
    def load(model=None):
        if model is None:
            raise HubUnreachable("The model a/b is not on this machine and the hub cannot be reached: connect.")
        return model

    monkeypatch.delenv("OVAM_MODEL", raising=False)
    monkeypatch.setattr(OVAM, "from_pretrained", load)
    opened, notice = app.open_model()
    assert opened == "emoji-voc"
    assert "could not be loaded" in notice
    assert "hub cannot be reached" in notice
    monkeypatch.setenv("OVAM_MODEL", "a/b")
    assert app.open_model()[0] == "emoji-voc"


def test_a_model_that_does_not_exist_is_no_reason_for_another(monkeypatch, capsys):
    monkeypatch.setenv("OVAM_MODEL", "no-such-model")
    assert app.main() == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("Error: ")
    assert "no-such-model" in said


def test_examples_work(ovam):
    assert len(EXAMPLES) == 6
    for example in EXAMPLES:
        GenerateSettings.for_model(ovam.pipe, example.prompt, seed=example.seed).validate(ovam.pipe)
        ovam.queries(settings_of_text(example.words))


def test_examples_show_what_this_model_draws(ovam):
    """Their thumbnails are of this model's weights: drawn anew, the first is the same but for its compression."""
    example = EXAMPLES[0]
    drawn = np.asarray(ovam.generate(example.prompt, seed=example.seed).image, dtype=float)
    shown = Image.open(io.BytesIO(base64.b64decode(thumbnail(0, "emoji-voc").partition(",")[2])))
    assert np.abs(np.asarray(shown.convert("RGB").resize((128, 128)), dtype=float) - drawn).mean() < 6
    assert buttons("emoji-voc").count("<img") == len(EXAMPLES)
    assert buttons("another").count("<img") == 0
    assert buttons("another").count("<button") == len(EXAMPLES)


def test_the_words_of_a_prompt():
    assert prompt_words("A photograph of a bird and a boat on the sea") == ["bird", "boat", "sea"]
    assert prompt_words("") == []
