"""TODO: what this module is."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import numpy as np
import torch
from PIL import Image

from ovam_core import plot, tokens
from ovam_core.attention.goca import GocaRecording
from ovam_core.attention.mask import label_map
from ovam_core.attention.recording import Recording
from ovam_core.errors import InputError
from ovam_core.io.files import make_folder, write
from ovam_core.io.names import slugs
from ovam_core.settings import GenerateSettings, MapSettings, PhotoSettings

Made = TypeVar("Made")  # GenerateSettings or PhotoSettings

SETTINGS_FILE = "settings.json"


# ------------------------------------------------------------------------------------- image, then maps


@dataclass
class Generation:
    """An image with the recording it was made under, or a photograph with its own. `seconds`: wall time of the whole call."""

    image: Image.Image
    recording: Recording
    settings: GenerateSettings | PhotoSettings
    model: str
    device: str
    seconds: float
    dtype: str = "float32"
    goca: GocaRecording | None = None  # of one pass, for the methods that need it
    # The last heatmaps with what they answered: a new threshold needs no new ones.
    _last: tuple[Any, torch.Tensor] | None = field(default=None, repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        """Bytes held: the recordings, the image and the last maps."""
        last = 0 if self._last is None else self._last[1].nbytes
        last += 0 if self.goca is None else self.goca.nbytes
        return self.recording.nbytes + self.image.width * self.image.height * 3 + last


@dataclass
class Maps:
    """Answers of `ask`. heatmaps: float32 [L, H, W] in [0, 1] at image size; masks: bool [L, H, W]; peaks: maxima."""

    labels: list[str]
    heatmaps: np.ndarray
    masks: np.ndarray
    peaks: list[float]


def _distinct(labels: Sequence[str]) -> list[str]:
    """A sentence may hold a token twice; galleries, legends and files need names that differ."""
    seen: dict[str, int] = {}
    for_all = []
    for label in labels:
        seen[label] = seen.get(label, 0) + 1
        for_all.append(label if seen[label] == 1 else f"{label} ({seen[label]})")
    return for_all


def _npz(maps: Maps) -> bytes:
    buffer = io.BytesIO()
    words = np.array(maps.labels, dtype=np.str_)
    np.savez_compressed(buffer, maps=maps.heatmaps.astype(np.float32), words=words)
    return buffer.getvalue()


def contents(generation: Generation, maps: Maps, settings: MapSettings) -> dict[str, bytes]:
    """Every file of a result, by name, its tokens among them. The same result gives the same bytes: nothing here holds a
    time or a path of this machine.
    """
    kept = _token_files(settings.tokens)
    files = {"image.png": plot.png(generation.image), "heatmaps.npz": _npz(maps)}
    vmax = max(maps.peaks)  # one scale for all words, as in the app
    colors = plot.word_colors(maps.labels)
    for label, slug, heatmap, mask in zip(maps.labels, slugs(maps.labels), maps.heatmaps, maps.masks, strict=True):
        files[f"overlay_{slug}.png"] = plot.png(plot.overlay(generation.image, heatmap, vmax))
        files[f"mask_{slug}.png"] = plot.png(plot.mask_image(mask))
    files["labels.png"] = plot.png(plot.label_image(label_map(maps.heatmaps, maps.masks)))
    about = {
        "format": generation.settings.FORMAT,
        "model": generation.model,
        "device": generation.device,
        "dtype": generation.dtype,
        generation.settings.KIND: asdict(generation.settings),
        "maps": asdict(settings) | {"tokens": list(kept)},
        "words": [
            {"word": label, "label": index, "file": slug, "color": colors[label], "peak": round(peak, 6)}
            for index, (label, slug, peak) in enumerate(zip(maps.labels, slugs(maps.labels), maps.peaks), start=1)
        ],
        "files": sorted([*files, *kept, SETTINGS_FILE]),
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
    }
    files[SETTINGS_FILE] = (json.dumps(about, indent=2, ensure_ascii=False) + "\n").encode()
    return files | kept


def _token_files(paths: Sequence[str]) -> dict[str, bytes]:
    """Token files by the name they get in a result, "token_cat.safetensors"; in the order given."""
    names = slugs([" ".join(tokens.load(path).names) for path in paths])
    return {f"token_{name}{tokens.SUFFIX}": Path(path).read_bytes() for name, path in zip(names, paths, strict=True)}


def save(folder: str | Path, generation: Generation, maps: Maps, settings: MapSettings) -> list[Path]:
    """Writes a result into a folder, made if need be; each file is written beside its place and renamed.

    image.png; heatmaps.npz (`maps` float32 [L, H, W] in [0, 1] at image size, `words`); overlay_<word>.png and
    mask_<word>.png for each word; labels.png (ids in the order of the words, VOC palette); token_<class>.safetensors for
    each token asked for; settings.json, from which
    `python -m ovam_core generate --settings` makes the same bytes on the same machine, as `photo --settings` does with
    a photograph.
    Files of an earlier result in the folder that this one does not have are taken away.
    """
    folder = make_folder(folder)
    files = contents(generation, maps, settings)
    for name in _earlier(folder) - files.keys():
        (folder / name).unlink(missing_ok=True)
    for name, data in files.items():
        write(folder / name, data)
    return [folder / name for name in files]


def _earlier(folder: Path) -> set[str]:
    """Overlays and masks that a settings.json in the folder owns up to: only names that `save` itself makes."""
    try:
        listed = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))["files"]
        return {name for name in listed if re.fullmatch(r"(overlay|mask)_[\w-]+\.png|token_[\w-]+\.safetensors", name)}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def save_zip(path: str | Path, generation: Generation, maps: Maps, settings: MapSettings) -> Path:
    """The same files as `save`, in one zip."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:  # PNG and npz are compressed already
        for name, data in contents(generation, maps, settings).items():
            archive.writestr(zipfile.ZipInfo(name), data)  # ZipInfo's fixed date keeps the bytes the same
    write(Path(path), buffer.getvalue())
    return Path(path)


def load_settings(path: str | Path, made_by: type[Made] = GenerateSettings) -> tuple[Made, MapSettings, str, str]:
    """settings.json back to (settings of the image, maps, model, device). made_by: the class of the first,
    GenerateSettings or PhotoSettings.

    Raises InputError if it is not one of `save`'s, or of another kind.
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
        made = made_by(**_known(made_by, about[made_by.KIND]))
        asked = MapSettings(**_known(MapSettings, about["maps"]))
        asked = replace(
            asked, **{key: _tuple(getattr(asked, key)) for key in ("words", "steps", "resolutions", "tokens")}
        )
        # Its tokens lie beside it.
        asked = replace(asked, tokens=tuple(str(path.parent / name) for name in asked.tokens))
        return made, asked, str(about["model"]), str(about["device"])
    except (KeyError, TypeError):
        raise InputError(f"'{path}' lacks a setting or holds one of the wrong kind.") from None


def _known(cls: type, values: dict) -> dict:
    unknown = set(values) - {one.name for one in fields(cls)}
    if unknown:
        raise InputError(f"The settings hold '{sorted(unknown)[0]}', which this version does not know.")
    return values


def _tuple(value: Any) -> tuple | None:
    """A list of the file. Raises TypeError for anything else, a text of several letters among them."""
    if value is not None and not isinstance(value, list | tuple):
        raise TypeError
    return None if value is None else tuple(value)
