"""Loading pipelines: names, folders, hub ids, and one clear sentence for each thing that can be wrong."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from ovam_core.errors import InputError
from ovam_core.models import load as pipeline
from ovam_core.models.load import load_pipeline
from ovam_core.models.presets import EMBEDDED, KNOWN_MODELS, defaults_for


@pytest.fixture(scope="module")
def models(tiny, tmp_path_factory):
    """A folder with the tiny pipeline in the place of the embedded model."""
    folder = tmp_path_factory.mktemp("models")
    tiny.save_pretrained(folder / EMBEDDED)
    return folder


@pytest.fixture(autouse=True)
def environment(monkeypatch, models):
    monkeypatch.setenv("OVAM_MODELS_DIR", str(models))
    monkeypatch.setenv("OVAM_DEVICE", "cpu")
    monkeypatch.delenv("OVAM_MODEL", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_embedded_model_is_the_default_without_cuda():
    pipe = load_pipeline()
    assert pipe.ovam_name == EMBEDDED
    assert pipe.device.type == "cpu"
    assert pipe.unet.dtype == torch.float32
    assert pipe.safety_checker is None
    assert pipe.progress_bar(total=1).disable


def test_the_environment_chooses_the_model(monkeypatch, models, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(models / EMBEDDED, other)
    monkeypatch.setenv("OVAM_MODEL", str(other))
    assert load_pipeline().ovam_name == str(other)
    assert load_pipeline(EMBEDDED, dtype=torch.bfloat16).unet.dtype == torch.bfloat16


def test_the_embedded_folder_by_its_path_is_the_embedded_model(models):
    assert load_pipeline(str(models / EMBEDDED)).ovam_name == EMBEDDED


def test_embedded_folder_is_in_the_repository(monkeypatch):
    monkeypatch.delenv("OVAM_MODELS_DIR")
    folder = pipeline.embedded_folder()
    assert folder.parts[-2:] == ("models", EMBEDDED)
    assert (folder.parents[1] / "ovam_core").is_dir()


@pytest.mark.parametrize("model", ["no-such-model", "/no/such/folder", "./nowhere", "a/b/c", "../x", "~nobody/x", "\0"])
def test_a_model_that_does_not_exist(model):
    with pytest.raises(InputError, match="There is no model"):
        load_pipeline(model)


def test_a_name_without_end():
    with pytest.raises(InputError, match="There is no model") as caught:
        load_pipeline("x" * 10_000)
    assert len(str(caught.value)) < 500


def test_an_embedded_model_that_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("OVAM_MODELS_DIR", str(tmp_path))
    with pytest.raises(InputError, match="There is no model 'emoji-voc'"):
        load_pipeline()


def test_a_folder_without_a_pipeline(tmp_path):
    with pytest.raises(InputError, match=r"no model_index\.json"):
        load_pipeline(str(tmp_path))


def test_a_broken_folder(models, tmp_path):
    shutil.copytree(models / EMBEDDED, tmp_path / "broken")
    (tmp_path / "broken" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(InputError, match=r"broken cannot be loaded: .+"):
        load_pipeline(str(tmp_path / "broken"))


def test_a_hub_model_without_a_network():
    with pytest.raises(InputError, match="the hub cannot be reached") as caught:
        load_pipeline("nobody/no-such-model")
    assert "\n" not in str(caught.value)


def test_a_hub_model_that_does_not_exist(monkeypatch):
    from huggingface_hub.errors import RepositoryNotFoundError

    def missing(*_, **__):
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", missing)
    with pytest.raises(InputError, match="There is no model nobody/nothing on the hub"):
        load_pipeline("nobody/nothing")


def test_a_pipeline_of_another_kind(tmp_path):
    from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel

    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    DDPMPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path / "ddpm")
    with pytest.raises(InputError, match=r"DDPMPipeline is not a text-to-image pipeline.*HunyuanDiT.*Flux or Flux 2"):
        load_pipeline(str(tmp_path / "ddpm"))


def test_an_index_without_its_class(tmp_path):
    (tmp_path / "model_index.json").write_text('{"a": 1}')
    with pytest.raises(InputError, match="lacks '_class_name': save the pipeline again"):
        load_pipeline(str(tmp_path), "cpu")


@pytest.mark.parametrize("device", ["cuda", "mps", "tpu9", "cpu!", "xpu", "vulkan", "hpu", "meta"])
def test_a_device_that_is_not_there(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(InputError, match="device"):
        load_pipeline(EMBEDDED, device=device)


def test_defaults(tiny):
    assert defaults_for(EMBEDDED) == KNOWN_MODELS[EMBEDDED]
    assert defaults_for(load_pipeline()) == KNOWN_MODELS[EMBEDDED]
    assert defaults_for("stable-diffusion-v1-5/stable-diffusion-v1-5").height == 512
    assert defaults_for("stabilityai/stable-diffusion-2-1").width == 768
    assert defaults_for("somebody/unknown").steps == 30
    unknown = defaults_for(tiny)
    assert (unknown.height, unknown.width, unknown.steps, unknown.guidance) == (32, 32, 30, 7.5)


def test_known_sizes_can_be_asked_for():
    for name, known in KNOWN_MODELS.items():
        assert known.height % 8 == known.width % 8 == 0, name
        assert max(known.height, known.width) <= known.max_size, name
    assert json.dumps(list(KNOWN_MODELS))
