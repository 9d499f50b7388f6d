"""A picture with its recording, and what was found in it: to files, and back.

Nothing here knows a model: OVAM makes pictures and answers, this module keeps and writes them.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ovam_core import plot
from ovam_core.attention.evolution import Evolution
from ovam_core.attention.features import Features
from ovam_core.attention.goca import GocaRecording
from ovam_core.attention.mask import label_map
from ovam_core.attention.recording import Recording
from ovam_core.errors import InputError
from ovam_core.io.files import make_folder, write_atomically
from ovam_core.io.names import slugs
from ovam_core.io.pictures import read_photo
from ovam_core.io.recording_files import Recordings, read_recordings, write_recordings
from ovam_core.query import Query
from ovam_core.settings import START_FILE, GenerateSettings, PhotoSettings, SegmentSettings
from ovam_core.tokens import SUFFIX, Token

MadeBy = TypeVar("MadeBy", GenerateSettings, PhotoSettings)

SETTINGS_FILE = "settings.json"
# Files of a result that another result in its folder may not have.
OWN = re.compile(r"(overlay|mask)_[\w-]+\.png|token_[\w-]+\.safetensors|evolution_[\w-]+\.webp|start\.png")
MAX_WALL_TIME = 1e9  # seconds that a picture took
MAX_LINE = 1000  # characters of the name of a model; folders have long ones
MAX_STRETCH = 1.25  # by which an image may be wider or higher than the recorded one; a photograph's sides are rounded


@dataclass
class Picture:
    """An image with what was recorded of it: made by OVAM.generate, OVAM.photograph, or by hand from a `Recorder`'s.

    recording: of the wanted half of the guided batch. settings: what it was made with, None for pictures made by hand.
    goca: one pass recorded for the methods that weigh heads and layers, None without; features: of the UNet's last
    step, for the systems in downstream/, None without. others: recordings of further halves of the batch, by branch.
    seconds: wall time of the whole call.
    """

    image: Image.Image
    recording: Recording
    settings: GenerateSettings | PhotoSettings | None = None
    goca: GocaRecording | None = None
    features: Features | None = field(default=None, repr=False, kw_only=True)
    model: str = ""
    device: str = ""
    dtype: str = "float32"
    seconds: float = 0.0
    others: dict[str, Recording] = field(default_factory=dict, repr=False)
    # The last heatmaps with what they answered: a new threshold needs no new ones.
    last_maps: tuple[Any, Tensor] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Raises InputError for no picture, and for one of another shape than the recorded one's (a crop's, perhaps).

        A photograph's may differ: the model sees it in the size that its settings give.
        """
        if not isinstance(self.image, Image.Image):
            raise InputError(
                f"The image is a {type(self.image).__name__}: give a PIL image, as with output_type='pil'."
            )
        height, width = self.recording.image_size
        ratio = self.image.width * height / (self.image.height * width)
        if not isinstance(self.settings, PhotoSettings) and max(ratio, 1 / ratio) > MAX_STRETCH:
            raise InputError(
                f"The image is {self.image.width}x{self.image.height} and what was recorded {width}x{height}: the maps "
                "would not fit it; give the image of the recorded run, whole and without a border."
            )

    @property
    def caption(self) -> str:
        """The text of the recorded passes; "" where it is not known."""
        return "" if self.settings is None else self.settings.caption

    @property
    def nbytes(self) -> int:
        """Bytes held: the recordings, the image and the last maps."""
        last = 0 if self.last_maps is None else self.last_maps[1].nbytes
        beside = sum(one.nbytes for one in (self.goca, self.features) if one is not None)
        recordings = sum(recording.nbytes for recording in (self.recording, *self.others.values()))
        return recordings + self.image.width * self.image.height * 3 + last + beside

    def recorded(self, branch: str) -> Recording | None:
        """The recording of a half of the guided batch; None where it was not recorded."""
        return self.recording if self.recording.branch in (branch, "all") else self.others.get(branch)

    def of_branch(self, branch: str) -> Recording:
        """The same. Raises InputError where it was not recorded."""
        found = self.recorded(branch)
        if found is None:
            raise InputError(
                f"What is asked for belongs to the {branch} half of the guided batch and this image was recorded on "
                f"the {self.recording.branch} one: make the image again with it chosen."
            )
        return found

    def detached(self) -> Picture:
        """The same in host memory, with recordings that are detached from the model; see `Recording.detached`."""
        return replace(
            self,
            recording=self.recording.detached(),
            goca=None if self.goca is None else self.goca.detached(),
            features=None if self.features is None else self.features.detached(),
            others={branch: one.detached() for branch, one in self.others.items()},
            last_maps=None,
        )

    def save_recording(self, path: str | Path) -> Path:
        """Writes the picture with all that was recorded of it into one safetensors file, there whole or not at all.

        `OVAM.load_recording` reads it, in another process too, where any words can be asked. It holds tensors and names
        of layers, and not the model.
        """
        plain = self.detached()
        about = {"model": self.model, "device": self.device, "dtype": self.dtype, "seconds": self.seconds}
        if self.settings is not None:
            about[self.settings.KIND] = self.settings.to_json()
        images = {"image": self.image, "start": getattr(self.settings, "start", None)}
        pixels = {
            name: torch.from_numpy(np.array(image.convert("RGB")))
            for name, image in images.items()
            if isinstance(image, Image.Image)
        }
        recordings = Recordings(plain.recording, plain.goca, plain.others, plain.features)
        write_recordings(Path(path), about, pixels, recordings)
        return Path(path)


@dataclass(eq=False)
class Segmentation:
    """What was found of each label in a picture, at the picture's size.

    labels: words, phrases, tokens' classes, as they were asked for. heatmaps: float32 `[L, H, W]` in [0, 1]. masks:
    bool `[L, H, W]`. picture, settings: what was asked of what. grid_maps: the heatmaps before they are resized,
    float32 `[L, h, w]`; queries: as what the labels were asked, in their order. Both are left out of what is made by
    hand. evolutions: one a label where the settings asked for it, else none. presence: whether each label is in the
    picture at all, 0 to 1 (docs/methods.md); None where the method cannot say, empty for what is made by hand.
    """

    labels: list[str]
    heatmaps: np.ndarray
    masks: np.ndarray
    picture: Picture
    settings: SegmentSettings
    grid_maps: np.ndarray | None = field(default=None, repr=False)
    queries: tuple[Query, ...] = field(default=(), repr=False)
    evolutions: list[Evolution] = field(default_factory=list, repr=False)
    presence: list[float | None] = field(default_factory=list)

    @property
    def peaks(self) -> list[float]:
        """The maximum of each heatmap."""
        return [float(heatmap.max()) for heatmap in self.heatmaps]

    def label_map(self) -> np.ndarray:
        """uint8 `[H, W]`: the place in `labels`, from 1, of the strongest map among the masks there; 0 for none."""
        return label_map(self.heatmaps, self.masks)

    def files(self) -> dict[str, bytes]:
        """Every file of the result by name, its tokens among them. The same result gives the same bytes: nothing in
        them holds a time or a path of this machine.
        """
        names = slugs(self.labels)
        tokens = token_files(self.settings.tokens)
        image, peaks = self.picture.image, self.peaks
        files = {"image.png": plot.png(image), "heatmaps.npz": self._npz()}
        if isinstance(start := getattr(self.picture.settings, "start", None), Image.Image):
            files[START_FILE] = plot.png(start)
        for slug, heatmap, mask in zip(names, self.heatmaps, self.masks, strict=True):
            files[f"overlay_{slug}.png"] = plot.png(plot.overlay(image, heatmap, max(peaks)))  # one scale for all words
            files[f"mask_{slug}.png"] = plot.png(plot.mask_image(mask))
        for slug, evolution in zip(names, self.evolutions, strict=False):
            frames = plot.frames(image, evolution.maps, evolution.labels)
            files[f"evolution_{slug}.webp"] = plot.animation(frames)
        files["labels.png"] = plot.png(plot.label_image(self.label_map()))
        about = self._about(names, [*files, *tokens, SETTINGS_FILE], list(tokens))
        files[SETTINGS_FILE] = (json.dumps(about, indent=2, ensure_ascii=False) + "\n").encode()
        return files | tokens

    def save(self, folder: str | Path) -> list[Path]:
        """Writes the result into a folder, made if need be; each file is whole or absent.

        image.png; heatmaps.npz (`maps` float32 [L, H, W] in [0, 1], `words`); overlay_<word>.png and mask_<word>.png
        for each word; labels.png (ids in the order of the words, VOC palette); token_<class>.safetensors for each token
        asked for; start.png, where the run began from a picture; evolution_<word>.webp, where the settings asked for
        one; settings.json, from which `ovam generate --settings` (or `ovam photo --settings`) makes the same bytes on
        the same machine. Files of an earlier result in the folder that this one does not have are taken away.
        """
        folder = make_folder(folder)
        files = self.files()
        for name in _earlier(folder) - files.keys():
            (folder / name).unlink(missing_ok=True)
        for name, data in files.items():
            write_atomically(folder / name, data)
        return [folder / name for name in files]

    def save_zip(self, path: str | Path) -> Path:
        """The same files as `save`, in one zip."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:  # PNG and npz are compressed already
            for name, data in self.files().items():
                archive.writestr(zipfile.ZipInfo(name), data)  # ZipInfo's fixed date keeps the bytes the same
        write_atomically(Path(path), buffer.getvalue())
        return Path(path)

    def _npz(self) -> bytes:
        buffer = io.BytesIO()
        words = np.array(self.labels, dtype=np.str_)
        np.savez_compressed(buffer, maps=self.heatmaps.astype(np.float32), words=words)
        return buffer.getvalue()

    def _about(self, names: list[str], files: list[str], tokens: list[str]) -> dict[str, Any]:
        picture = self.picture
        colors = plot.word_colors(self.labels)
        rows = enumerate(zip(self.labels, names, self.peaks, strict=True), start=1)
        known = self.presence or [None] * len(self.labels)
        presence = [{} if x is None else {"presence": round(x, 4)} for x in known]
        about: dict[str, Any] = {
            "format": "ovam-recording/1" if picture.settings is None else picture.settings.FORMAT,
            "model": picture.model,
            "device": picture.device,
            "dtype": picture.dtype,
        }
        if picture.settings is not None:
            about[picture.settings.KIND] = picture.settings.to_json()
        return about | {
            "maps": self.settings.to_json() | {"tokens": tokens},
            "words": [
                {"word": label, "label": number, "file": slug, "color": colors[label], "peak": round(peak, 6)} | said
                for (number, (label, slug, peak)), said in zip(rows, presence, strict=True)
            ],
            "files": sorted(files),
            "versions": {"torch": torch.__version__, "diffusers": version("diffusers")},
        }


def token_files(tokens: tuple[Token, ...]) -> dict[str, bytes]:
    """Tokens by the file name they get in a result, "token_cat.safetensors"; in the order given."""
    names = slugs([" ".join(token.names) for token in tokens])
    return {f"token_{name}{SUFFIX}": token.to_bytes() for name, token in zip(names, tokens, strict=True)}


def _earlier(folder: Path) -> set[str]:
    """Overlays and masks that a settings.json in the folder owns up to: only names that `save` itself makes."""
    try:
        listed = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))["files"]
        return {name for name in listed if OWN.fullmatch(name)}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def load_picture(path: str | Path) -> Picture:
    """A file of `Picture.save_recording`, its recordings detached: `OVAM.bind` lets them be asked.

    Raises InputError, one sentence, for any other file.
    """
    path = Path(path)
    about, pixels, found = read_recordings(path)
    images = {name: Image.fromarray(x.numpy()) for name, x in pixels.items()}
    try:
        return Picture(
            image=images["image"],
            recording=found.recording,
            settings=_made_with(about, images.get("start")),
            goca=found.goca,
            features=found.features,
            model=_line(about["model"]),
            device=_line(about["device"]),
            dtype=_line(about["dtype"]),
            seconds=_seconds(about["seconds"]),
            others=found.others,
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f": {error}" if isinstance(error, InputError) else " lacks a setting or holds one of the wrong kind."
        raise InputError(f"The recording '{path.name}'{reason}") from None


def _line(text: Any) -> str:
    """What a file says of itself, as part of a sentence. Raises TypeError for what is no line of text."""
    if not isinstance(text, str) or len(text) > MAX_LINE or not text.isprintable():
        raise TypeError
    return text


def _seconds(value: Any) -> float:
    """Raises TypeError for what is no time."""
    if not isinstance(value, int | float) or not 0 <= value < MAX_WALL_TIME:
        raise TypeError
    return float(value)


def _made_with(about: dict[str, Any], start: Image.Image | None) -> GenerateSettings | PhotoSettings | None:
    """The settings of a recording's file; start: the picture that the run began from. Raises InputError, KeyError and
    TypeError for what is none.
    """
    if PhotoSettings.KIND in about:
        photo = PhotoSettings.from_json(about[PhotoSettings.KIND])
        photo.check_fields()
        return photo
    if GenerateSettings.KIND not in about:
        return None
    made = GenerateSettings.from_json(about[GenerateSettings.KIND])
    made.check_fields()
    if (made.start is None) != (start is None):
        raise TypeError
    return replace(made, start=start)


def load_settings(path: str | Path, made_by: type[MadeBy]) -> tuple[MadeBy, SegmentSettings, str, str]:
    """settings.json back to (what made the picture, what was asked, model, device); tokens and a start picture are read
    from beside it.

    made_by: GenerateSettings or PhotoSettings. Raises InputError if it is not one of `save`'s, or of the other kind.
    """
    path = Path(path)
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise InputError(f"There is no settings file '{path}' that can be read.") from None
    except (ValueError, RecursionError):
        raise InputError(f"'{path}' is not a JSON file.") from None
    if not isinstance(about, dict) or about.get("format") != made_by.FORMAT:
        raise InputError(f"'{path}' is not a settings.json of this program (format {made_by.FORMAT}).")
    try:
        picture = _with_start(made_by.from_json(about[made_by.KIND]), path.parent)
        asked = SegmentSettings.from_json(_lists(about["maps"]))
        asked = replace(asked, tokens=tuple(Token.load(path.parent / name) for name in asked.tokens))
        return picture, asked, str(about["model"]), str(about["device"])
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"'{path}' lacks a setting or holds one of the wrong kind.") from None


def _with_start(settings: MadeBy, folder: Path) -> MadeBy:
    """The same with the picture of START_FILE for its name. Raises TypeError for another one."""
    if not isinstance(settings, GenerateSettings) or settings.start is None:
        return settings
    if settings.start != START_FILE:
        raise TypeError
    return replace(settings, start=read_photo(folder / START_FILE))


def _lists(values: dict[str, Any]) -> dict[str, Any]:
    """The same. Raises TypeError where a list is something else, a text of several letters among them."""
    for key in ("words", "steps", "resolutions", "tokens"):
        if values.get(key) is not None and not isinstance(values[key], list):
            raise TypeError
    return values
