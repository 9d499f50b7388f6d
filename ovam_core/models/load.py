"""Load a diffusers text-to-image pipeline by name, folder or hub id, and know its usual settings."""

from __future__ import annotations

import errno
import json
import os
import re
import warnings
from pathlib import Path

import diffusers
import torch
import transformers

from ovam_core.errors import HubUnreachable, InputError, OutOfMemory, is_out_of_memory
from ovam_core.io.files import shipped_folder
from ovam_core.models.adapter import Pipeline
from ovam_core.models.presets import DEFAULT_HUB_MODEL, EMBEDDED, defaults_for
from ovam_core.models.reading import FUNCTION_WORDS
from ovam_core.models.registry import adapter_of, check_draws

MODEL_INDEX = "model_index.json"  # of a diffusers pipeline
WORDS_FILE = "words.json"  # the words that a model has learned, where it is known


def embedded_folder() -> Path:
    """Where the embedded model lies: in OVAM_MODELS_DIR, else where the package brings it."""
    models = os.environ.get("OVAM_MODELS_DIR") or shipped_folder("models")
    return Path(models) / EMBEDDED


def load_pipeline(model: str | None = None, device: str | None = None, dtype: torch.dtype | None = None) -> Pipeline:
    """A diffusers pipeline, ready to generate and to be recorded; its name is kept as `pipe.ovam_name`.

    model: "emoji-voc", a folder, or a hub id "owner/name". None: the environment's OVAM_MODEL, else Stable Diffusion
        1.5 with CUDA and the embedded model without.
    device: None: OVAM_DEVICE, else cuda, mps or cpu, the first there is. dtype: None: float16 (Sana,
        Stable Diffusion 3.5 and Flux: bfloat16) on CUDA, else float32.

    Raises InputError for a model that does not exist, a hub that cannot be reached, a model that is no
    text-to-image pipeline of a family in `registry`, and a device that is not there.
    """
    device = _device(device)
    model = model or usual_model(device)
    if dtype is None:
        dtype = defaults_for(model).dtype if torch.device(device).type == "cuda" else torch.float32
    folder = _folder(model)
    pipe = _from_pretrained(model, folder, dtype)
    _check_kind(pipe, model)
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    is_embedded = folder is not None and folder.resolve() == embedded_folder().resolve()
    pipe.ovam_name = EMBEDDED if is_embedded else model
    pipe.ovam_words = _words_of(folder)
    return pipe


def usual_model(device: str | None = None) -> str:
    """The model where none is named: OVAM_MODEL, else Stable Diffusion 1.5 with CUDA and the embedded one without.

    Raises InputError for a device that is not there.
    """
    on_cuda = torch.device(_device(device)).type == "cuda"
    return os.environ.get("OVAM_MODEL") or (DEFAULT_HUB_MODEL if on_cuda else EMBEDDED)


def unknown_words(pipe: Pipeline, *texts: str) -> list[str]:
    """The words of texts that the model never saw, in their order, each once, in lower case.

    Known only of a model whose folder lists its words (words.json), as the embedded one's does; [] for others.
    """
    learned = getattr(pipe, "ovam_words", None)
    if learned is None:
        return []
    words = [word for text in texts for word in re.findall(r"[^\W_]+", text.lower())]
    return [word for word in dict.fromkeys(words) if word not in learned | FUNCTION_WORDS]


def learned_words(pipe: Pipeline) -> list[str]:
    """The words that the model has learned, sorted, without "a", "of" and their like; [] where they are not known."""
    return sorted((getattr(pipe, "ovam_words", None) or frozenset()) - FUNCTION_WORDS)


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
        raise InputError(f"There is no device {device!r}: choose cuda, mps or cpu.") from None
    number = torch.device(device).index or 0
    there = {"cpu": True, "cuda": number < torch.cuda.device_count(), "mps": torch.backends.mps.is_available()}
    if kind not in there:
        raise InputError(f"There is no device {device!r} here: choose cuda, mps or cpu.")
    if not there[kind]:
        raise InputError(f"The device {device!r} is not available on this machine: choose another, such as cpu.")
    return device


def _folder(model: str) -> Path | None:
    """The model's folder; None for a hub id."""
    folder = embedded_folder() if model == EMBEDDED else Path(os.path.expanduser(model))
    # os.path answers False to names that the file system refuses (too long, a null byte).
    if os.path.isfile(folder / MODEL_INDEX):
        return folder
    if os.path.isdir(folder):
        raise InputError(f"The folder {model} is not a diffusers pipeline: it has no model_index.json.")
    if model != EMBEDDED and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model):
        return None
    raise InputError(
        f"There is no model {model[:200]!r}: give {EMBEDDED!r}, a folder, or a hub id such as {DEFAULT_HUB_MODEL}."
    )


def _from_pretrained(model: str, folder: Path | None, dtype: torch.dtype) -> Pipeline:
    from diffusers import DiffusionPipeline

    # diffusers 0.42 prefers `dtype`, older versions know `torch_dtype` alone.
    settings = {"torch_dtype": dtype, "safety_checker": None, "requires_safety_checker": False}
    try:
        _check_index(model, folder)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch_dtype.*")
            return DiffusionPipeline.from_pretrained(str(folder or model), **settings)
    except InputError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise OutOfMemory(
                f"There is too little memory to load the model {model}: free some, or take one that is smaller."
            ) from None
        if folder is not None and isinstance(error, KeyError):
            raise InputError(f"The model_index.json in {folder} lacks {error}: save the pipeline again.") from error
        if folder is not None:
            raise InputError(f"The model in {folder} cannot be loaded: {_one_line(error)}") from error
        raise _hub_error(model, error) from error


def _hub_error(model: str, error: BaseException) -> InputError:
    """What loading from the hub failed of, by the errors behind the error."""
    from huggingface_hub.errors import GatedRepoError, RemoteEntryNotFoundError, RepositoryNotFoundError

    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    if any(isinstance(x, GatedRepoError) for x in causes):
        return InputError(f"The model {model} must be unlocked on the hub first: accept its licence there and log in.")
    if any(isinstance(x, RepositoryNotFoundError) for x in causes):
        return InputError(f"There is no model {model} on the hub: check the id.")
    if any(isinstance(x, RemoteEntryNotFoundError) for x in causes):
        return InputError(f"The model {model} is on the hub but is no diffusers pipeline: it has no model_index.json.")
    if any(isinstance(x, OSError) and x.errno == errno.ENOSPC for x in causes):
        return InputError(f"The disk is full: the model {model} cannot be stored; make room and try again.")
    if any(isinstance(x, OSError) for x in causes) or any("offline" in str(x).lower() for x in causes):
        return HubUnreachable(
            f"The model {model} is not on this machine and the hub cannot be reached: "
            f"connect to the network, or use {EMBEDDED!r}."
        )
    return InputError(f"The model {model} cannot be loaded: {_one_line(causes[0])}")


def _one_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def _check_index(model: str, folder: Path | None) -> None:
    """Raises InputError where model_index.json names another kind of pipeline, before all of it is loaded; of a hub
    model that is not on this machine, what comes of asking the hub for that file.
    """
    import huggingface_hub as hub

    file = hub.try_to_load_from_cache(model, MODEL_INDEX) if folder is None else folder / MODEL_INDEX
    if not isinstance(file, str | Path):
        file = hub.hf_hub_download(model, MODEL_INDEX)
    try:
        index = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # diffusers says what is wrong with it
    name = index.get("_class_name") if isinstance(index, dict) else None
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if isinstance(kind, type):
        _check_class(kind, model)


def _check_class(kind: type, model: str) -> None:
    try:
        check_draws(kind)
    except InputError as error:
        raise InputError(f"{model} cannot be used: {error}") from None


def _check_kind(pipe: Pipeline, model: str) -> None:
    _check_class(type(pipe), model)
    try:
        adapter = adapter_of(pipe)
    except InputError as error:
        raise InputError(f"{model} cannot be used: {error}") from None
    if any(part is None for pair in adapter.encoders for part in pair):
        raise InputError(f"{model} lies here without its text encoder: get the whole model.")
    if getattr(pipe, "vae", None) is None:
        raise InputError(f"{model} lies here without its autoencoder (vae): get the whole model.")
    if not adapter.sees_latents_alone:
        raise InputError(
            f"{model} cannot be used: its denoiser sees more than the image that it makes, as for inpainting or "
            "editing; load a text-to-image model."
        )
