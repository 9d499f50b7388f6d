"""Load a diffusers text-to-image pipeline by name, folder or hub id, and know its usual settings."""

from __future__ import annotations

import errno
import json
import os
import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import diffusers
import torch
import transformers

from .families import family_of
from .text import FUNCTION_WORDS

EMBEDDED = "emoji-voc"
WORDS_FILE = "words.json"  # the words that a model has learned, where it is known
DEFAULT_HUB_MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"


@dataclass(frozen=True)
class ModelDefaults:
    """Usual settings of a model. Sizes in pixels; strides: attention grids to use, by the image's pixels to one of theirs;
    None for all recorded. noisiest: the largest timestep, of 1000, whose attention is used.

    dtype: the one its weights are meant for on CUDA. tau, alpha: threshold (Eq. 9) and self-attention floor (Eq. 8) for
    words, token_tau, token_alpha for optimised tokens: the paper's, unless the model has been measured.
    """

    steps: int
    guidance: float
    height: int
    width: int
    max_size: int
    strides: tuple[int, ...] | None = None
    noisiest: int = 1000
    dtype: torch.dtype = torch.float16
    tau: float = 0.4
    alpha: float = 0.85
    token_tau: float = 0.8
    token_alpha: float = 0.95


_SD1 = ModelDefaults(steps=30, guidance=7.5, height=512, width=512, max_size=1024)
_SD2_768 = ModelDefaults(steps=30, guidance=7.5, height=768, width=768, max_size=1280)
_SDXL = ModelDefaults(steps=30, guidance=5.0, height=1024, width=1024, max_size=1536)
_PIXART = ModelDefaults(steps=20, guidance=4.5, height=1024, width=1024, max_size=1536)
_PIXART_512 = ModelDefaults(steps=20, guidance=4.5, height=512, width=512, max_size=1024)
# Gemma's and Sana's activations leave the range of float16.
_SANA = ModelDefaults(steps=20, guidance=4.5, height=1024, width=1024, max_size=1536, dtype=torch.bfloat16)
_HUNYUAN = ModelDefaults(steps=50, guidance=5.0, height=1024, width=1024, max_size=1280)
_SD3 = ModelDefaults(steps=28, guidance=7.0, height=1024, width=1024, max_size=1536)
_SD35_MEDIUM = replace(_SD3, steps=40, guidance=4.5, dtype=torch.bfloat16)
_SD35_LARGE = replace(_SD3, guidance=3.5, dtype=torch.bfloat16)
_SD35_TURBO = replace(_SD35_LARGE, steps=4, guidance=0.0)
_FLUX_DEV = ModelDefaults(steps=28, guidance=3.5, height=1024, width=1024, max_size=1536, dtype=torch.bfloat16)
_FLUX_SCHNELL = replace(_FLUX_DEV, steps=4, guidance=0.0)
_FLUX_2 = replace(_FLUX_DEV, guidance=4.0)

KNOWN_MODELS: dict[str, ModelDefaults] = {
    # Its coarser grids, 8 x 8 and 4 x 4, and its first steps find little (benchmarks/quality.py, Resolutions and Steps).
    # Both tau by the mean mIoU of both sets on seeds from 2000, which the tables do not use; alpha made no difference.
    EMBEDDED: ModelDefaults(
        steps=25,
        guidance=4.0,
        height=128,
        width=128,
        max_size=256,
        strides=(8,),
        noisiest=600,
        tau=0.36,
        token_tau=0.37,
    ),
    DEFAULT_HUB_MODEL: _SD1,
    "CompVis/stable-diffusion-v1-4": _SD1,
    "stabilityai/stable-diffusion-2-base": _SD1,
    "stabilityai/stable-diffusion-2-1-base": _SD1,
    "stabilityai/stable-diffusion-2-1": _SD2_768,
    "stabilityai/stable-diffusion-xl-base-1.0": _SDXL,
    "PixArt-alpha/PixArt-XL-2-512x512": _PIXART_512,
    "PixArt-alpha/PixArt-XL-2-1024-MS": _PIXART,
    "PixArt-alpha/PixArt-Sigma-XL-2-512-MS": _PIXART_512,
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": _PIXART,
    "Efficient-Large-Model/Sana_600M_1024px_diffusers": _SANA,
    "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers": _SANA,
    "Tencent-Hunyuan/HunyuanDiT-Diffusers": _HUNYUAN,
    "Tencent-Hunyuan/HunyuanDiT-v1.1-Diffusers": _HUNYUAN,
    "Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers": _HUNYUAN,
    "stabilityai/stable-diffusion-3-medium-diffusers": _SD3,
    "stabilityai/stable-diffusion-3.5-medium": _SD35_MEDIUM,
    "stabilityai/stable-diffusion-3.5-large": _SD35_LARGE,
    "stabilityai/stable-diffusion-3.5-large-turbo": _SD35_TURBO,
    "black-forest-labs/FLUX.1-dev": _FLUX_DEV,
    "black-forest-labs/FLUX.1-schnell": _FLUX_SCHNELL,
    "black-forest-labs/FLUX.2-dev": _FLUX_2,
}


def defaults_for(pipe_or_name) -> ModelDefaults:
    """The settings of a known model, by its name or by a pipeline of `load_pipeline`.

    For an unknown model: its family's usual steps and guidance, the size its denoiser was trained at. If only a name is
    given: 30 steps, guidance 7.5, 512 pixels.
    """
    name = pipe_or_name if isinstance(pipe_or_name, str) else getattr(pipe_or_name, "ovam_name", None)
    if name in KNOWN_MODELS:
        return KNOWN_MODELS[name]
    if isinstance(pipe_or_name, str):
        return _SD1
    family = family_of(pipe_or_name)
    sample = family.sample_size
    height, width = (sample, sample) if isinstance(sample, int) else sample
    factor = pipe_or_name.vae_scale_factor
    height, width = height * factor, width * factor
    return ModelDefaults(family.steps, family.guidance, height, width, max_size=2 * max(height, width))


def embedded_folder() -> Path:
    """Where the embedded model lies: `models/emoji-voc` of the repository, or of OVAM_MODELS_DIR."""
    models = os.environ.get("OVAM_MODELS_DIR") or Path(__file__).resolve().parent.parent / "models"
    return Path(models) / EMBEDDED


def load_pipeline(model: str | None = None, device: str | None = None, dtype: torch.dtype | None = None):
    """A diffusers pipeline, ready to generate and to be recorded; its name is kept as `pipe.ovam_name`.

    model: "emoji-voc", a folder, or a hub id "owner/name". None: the environment's OVAM_MODEL, else Stable Diffusion
        1.5 with CUDA and the embedded model without.
    device: None: OVAM_DEVICE, else cuda, mps or cpu, the first there is. dtype: None: float16 (Sana,
        Stable Diffusion 3.5 and Flux: bfloat16) on CUDA, else float32.

    Raises ValueError for a model that does not exist, a hub that cannot be reached, a model that is no
    text-to-image pipeline of a family in `families`, and a device that is not there.
    """
    device = _device(device)
    on_cuda = torch.device(device).type == "cuda"
    model = model or os.environ.get("OVAM_MODEL") or (DEFAULT_HUB_MODEL if on_cuda else EMBEDDED)
    if dtype is None:
        dtype = defaults_for(model).dtype if on_cuda else torch.float32
    folder = _folder(model)
    pipe = _from_pretrained(model, folder, dtype)
    _check_kind(pipe, model)
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    is_embedded = folder is not None and folder.resolve() == embedded_folder().resolve()
    pipe.ovam_name = EMBEDDED if is_embedded else model
    pipe.ovam_words = _words_of(folder)
    return pipe


def not_learned(pipe, *texts: str) -> list[str]:
    """The words of texts that the model never saw, in their order, each once, in lower case.

    Known only of a model whose folder lists its words (words.json), as the embedded one's does; [] for others.
    """
    learned = getattr(pipe, "ovam_words", None)
    if learned is None:
        return []
    found = [word for text in texts for word in re.findall(r"[^\W_]+", text.lower())]
    return [word for word in dict.fromkeys(found) if word not in learned | FUNCTION_WORDS]


def _words_of(folder: Path | None) -> frozenset[str] | None:
    try:
        return frozenset(json.loads((folder / WORDS_FILE).read_text(encoding="utf-8"))) if folder else None
    except (OSError, ValueError, TypeError):
        return None


def quiet() -> None:
    """Keeps the libraries' notices and loading bars off the terminal; downloads keep theirs."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    for logging in (transformers.utils.logging, diffusers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def _device(device: str | None) -> str:
    device = device or os.environ.get("OVAM_DEVICE")
    if not device:
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ValueError(f"There is no device {device!r}: choose cuda, mps or cpu.") from None
    number = torch.device(device).index or 0
    there = {"cpu": True, "cuda": number < torch.cuda.device_count(), "mps": torch.backends.mps.is_available()}
    if kind not in there:
        raise ValueError(f"There is no device {device!r} here: choose cuda, mps or cpu.")
    if not there[kind]:
        raise ValueError(f"The device {device!r} is not available on this machine: choose another, such as cpu.")
    return device


def _folder(model: str) -> Path | None:
    """The model's folder; None for a hub id."""
    folder = embedded_folder() if model == EMBEDDED else Path(os.path.expanduser(model))
    # os.path answers False to names that the file system refuses (too long, a null byte).
    if os.path.isfile(folder / "model_index.json"):
        return folder
    if os.path.isdir(folder):
        raise ValueError(f"The folder {model} is not a diffusers pipeline: it has no model_index.json.")
    if model != EMBEDDED and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model):
        return None
    raise ValueError(
        f"There is no model {model[:200]!r}: give {EMBEDDED!r}, a folder, or a hub id such as {DEFAULT_HUB_MODEL}."
    )


def _from_pretrained(model: str, folder: Path | None, dtype: torch.dtype):
    from diffusers import DiffusionPipeline

    # diffusers 0.42 prefers `dtype`, older versions know `torch_dtype` alone.
    settings = {"torch_dtype": dtype, "safety_checker": None, "requires_safety_checker": False}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch_dtype.*")
            return DiffusionPipeline.from_pretrained(str(folder or model), **settings)
    except Exception as error:
        if folder is not None and isinstance(error, KeyError):
            raise ValueError(f"The model_index.json in {folder} lacks {error}: save the pipeline again.") from error
        if folder is not None:
            raise ValueError(f"The model in {folder} cannot be loaded: {_one_line(error)}") from error
        raise ValueError(_hub_sentence(model, error)) from error


def _hub_sentence(model: str, error: BaseException) -> str:
    from huggingface_hub.errors import GatedRepoError, RemoteEntryNotFoundError, RepositoryNotFoundError

    causes = []
    while error is not None:
        causes.append(error)
        error = error.__cause__ or error.__context__
    if any(isinstance(x, GatedRepoError) for x in causes):
        return f"The model {model} must be unlocked on the hub first: accept its licence there and log in."
    if any(isinstance(x, RepositoryNotFoundError) for x in causes):
        return f"There is no model {model} on the hub: check the id."
    if any(isinstance(x, RemoteEntryNotFoundError) for x in causes):
        return f"The model {model} is on the hub but is no diffusers pipeline: it has no model_index.json."
    if any(isinstance(x, OSError) and x.errno == errno.ENOSPC for x in causes):
        return f"The disk is full: the model {model} cannot be stored; make room and try again."
    if any(isinstance(x, OSError) for x in causes) or any("offline" in str(x).lower() for x in causes):
        return (
            f"The model {model} is not on this machine and the hub cannot be reached: "
            f"connect to the network, or use {EMBEDDED!r}."
        )
    return f"The model {model} cannot be loaded: {_one_line(causes[0])}"


def _one_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def _check_kind(pipe, model: str) -> None:
    try:
        family = family_of(pipe)
    except ValueError as error:
        raise ValueError(f"{model} cannot be used: {error}") from None
    if any(part is None for pair in family.encoders for part in pair):
        raise ValueError(f"{model} lies here without its text encoder: get the whole model.")
