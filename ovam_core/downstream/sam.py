"""Segment Anything: SAM (Kirillov et al., ICCV 2023, arXiv 2304.02643) and SAM 2 (Ravi et al., arXiv 2408.00714), as
transformers has them, prompted by where our maps say that a word is; and by a click.

    method = SAM("facebook/sam-vit-base")
    found = ovam.segment(picture, ["cat"], method=method)
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ovam_core.attention.heatmap import resize
from ovam_core.errors import InputError, OutOfMemory, is_out_of_memory
from ovam_core.methods import Asks, Cut, Method, method_named
from ovam_core.models.presets import ModelDefaults
from ovam_core.picture import Picture
from ovam_core.query import Query
from ovam_core.settings import DEFAULT_METHOD, SegmentSettings

if TYPE_CHECKING:
    from ovam_core.models.adapter import Pipeline

# transformers' classes by the kind that config.json names: model, processor and, where a processor without torchvision
# is there, its image processor.
SAM_CLASSES = {
    "sam": ("SamModel", "SamProcessor", "SamImageProcessorPil"),
    "sam2": ("Sam2Model", "Sam2Processor", None),
    "sam2_video": ("Sam2Model", "Sam2Processor", None),  # SAM 2 is published with its memory for videos
}
NO_TORCHVISION = (
    "SAM 2 needs torchvision, which is not installed here: install it with `pip install 'ovam[sam]'`, or take a SAM of "
    "the first kind, such as facebook/sam-vit-base."
)
KEPT_PICTURES = 4  # whose embeddings are kept: 4 to 17 MB each, and seconds of a CPU
ASKED_PARTS = 8  # of a mask, which are asked for one by one, the largest first
LEAST_PART = 0.05  # of the mask's area
GRAIN = 128  # pixels of a side on which parts are told apart


@dataclass(frozen=True)
class Prompt:
    """One object: a point (x, y) upon it and, or None, the box (left, top, right, bottom) around it, in pixels."""

    point: tuple[int, int]
    box: tuple[int, int, int, int] | None = None


class Segmenter:
    """A SAM with its processor. Thread safe.

    weights: a folder of `save_pretrained`, or a hub id such as "facebook/sam-vit-base". Raises InputError, one
    sentence, for what is none, what cannot be reached or is not whole, and for a SAM 2 without torchvision.
    """

    def __init__(self, weights: str | Path):
        self.name = str(weights)
        self._model, self._processor = _loaded(self.name)
        self._lock = Lock()
        self._seen: OrderedDict[bytes, Any] = OrderedDict()  # embeddings of pictures

    @torch.no_grad()
    def masks(self, image: Image.Image, prompts: Sequence[Prompt], device: str | torch.device = "cpu") -> np.ndarray:
        """The mask of each prompt, bool `[prompts, H, W]` at the picture's size, by transformers' own calls.

        All of the prompts have a box, or none: with one, the single mask that SAM is asked for; without, that of its
        three (the whole, a part, a part of it) which it rates highest. Raises InputError, where its weights give no
        numbers, and OutOfMemory.
        """
        image = image.convert("RGB")
        if not prompts:
            return np.zeros((0, image.height, image.width), bool)
        with self._lock:
            try:
                return self._found(image, prompts, device)
            except Exception as error:
                if isinstance(error, InputError) or not is_out_of_memory(error):
                    raise
                raise OutOfMemory("The device has too little memory for SAM: take a smaller one, or the CPU.") from None

    def _found(self, image: Image.Image, prompts: Sequence[Prompt], device: str | torch.device) -> np.ndarray:
        boxed = prompts[0].box is not None
        asked: dict[str, Any] = {
            "input_points": [[[list(one.point)] for one in prompts]],
            "input_labels": [[[1] for _ in prompts]],
        }
        if boxed:
            asked["input_boxes"] = [[list(one.box or ()) for one in prompts]]
        self._model.to(device)
        given = self._processor(images=image, **asked, return_tensors="pt")
        sizes = [given.pop(name) for name in ("original_sizes", "reshaped_input_sizes") if name in given]
        told = {name: x.to(device, x.dtype if name == "input_labels" else torch.float32) for name, x in given.items()}
        embeddings = self._embeddings(image, told.pop("pixel_values"))
        found = self._model(image_embeddings=embeddings, **told, multimask_output=not boxed)
        scores = found.iou_scores[0]
        if not bool(torch.isfinite(scores).all()):
            raise InputError(f"The SAM of {self.name[:100]} gives no numbers: its weights are damaged, get them again.")
        rows = torch.arange(len(prompts), device=scores.device)
        best = found.pred_masks[0][rows, scores.argmax(dim=-1)][None, :, None].cpu()
        return self._processor.post_process_masks(best, *sizes)[0][:, 0].numpy()

    def _embeddings(self, image: Image.Image, pixels: Tensor) -> Any:
        """What the image encoder makes of a picture; that of the last few is kept. pixels: `[1, 3, h, w]`."""
        key = hashlib.blake2b(image.tobytes(), salt=str(image.width).encode(), digest_size=16).digest()
        if key not in self._seen:
            self._seen[key] = self._model.get_image_embeddings(pixels)
        self._seen.move_to_end(key)
        while len(self._seen) > KEPT_PICTURES:
            self._seen.popitem(last=False)
        kept = self._seen[key]
        return [x.to(pixels.device) for x in kept] if isinstance(kept, list) else kept.to(pixels.device)


def check_weights(weights: str | Path) -> str:
    """The kind of SAM, a key of SAM_CLASSES, of a folder or hub id, by its config.json alone.

    Raises InputError for another model, and what cannot be used here.
    """
    import transformers
    from transformers.utils import is_torchvision_available

    name = os.path.expanduser(str(weights))
    if not os.path.isdir(name) and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise InputError(
            f"There is no folder '{name[:200]}' of SAM's weights: give one, or a hub id such as facebook/sam-vit-base."
        )
    try:
        kind = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False).model_type
    except Exception as error:  # a stranger's file, or the hub, has many ways to fail
        raise _unreadable(name, error) from None
    if kind not in SAM_CLASSES:
        raise InputError(
            f"'{name[:200]}' is a model of the kind '{str(kind)[:40]}' and no SAM: give the weights of SAM or SAM 2, "
            "such as facebook/sam-vit-base."
        )
    if SAM_CLASSES[kind][2] is None and not is_torchvision_available():
        raise InputError(NO_TORCHVISION)
    return kind


def _loaded(name: str) -> tuple[Any, Any]:
    """(model, processor)."""
    import transformers

    model_class, processor_class, image_class = SAM_CLASSES[check_weights(name)]
    name = os.path.expanduser(name)
    try:
        model, found = getattr(transformers, model_class).from_pretrained(
            name, output_loading_info=True, torch_dtype=torch.float32
        )
        processor = getattr(transformers, processor_class)
        if image_class is None:
            return _whole(name, model, found), processor.from_pretrained(name)
        images = getattr(transformers, image_class).from_pretrained(name)
        return _whole(name, model, found), processor(images)
    except InputError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise OutOfMemory(
                f"There is too little memory to load the SAM of {name[:100]}: take a smaller one."
            ) from None
        raise _unreadable(name, error) from None


def _whole(name: str, model: Any, found: dict[str, Any]) -> Any:
    """The model. Raises InputError where transformers made some of its weights up."""
    if missing := sorted(found["missing_keys"]):
        raise InputError(f"The SAM of {name[:200]} lacks '{missing[0][:100]}': get the whole model.")
    return model.eval().requires_grad_(False)


def _unreadable(name: str, error: Exception) -> InputError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(".")
    return InputError(
        f"The SAM of '{name[:200]}' cannot be loaded; give a folder of its weights, or a hub id where the hub can be "
        f"reached: {reason}."
    )


# ------------------------------------------------------------------------------------------ from masks to prompts


def parts_of(mask: Tensor) -> list[Tensor]:
    """The connected parts of a mask, bool `[H, W]` each, the largest first; told apart on GRAIN pixels a side."""
    grain = -(-max(mask.shape) // GRAIN)
    small = F.max_pool2d(mask[None, None].float(), grain, ceil_mode=True)
    numbers = small * torch.arange(1, small.numel() + 1, device=mask.device).reshape(small.shape)
    before = torch.zeros_like(numbers)
    while not torch.equal(numbers, before):  # the largest number of a part spreads over it
        before, numbers = numbers, F.max_pool2d(numbers, 3, stride=1, padding=1) * small
    wide = numbers[0, 0].repeat_interleave(grain, 0).repeat_interleave(grain, 1)[: mask.shape[0], : mask.shape[1]]
    parts = [(wide == number) & mask for number in torch.unique(numbers[small > 0])]
    return sorted(parts, key=lambda part: -int(part.sum()))


def prompts_of(mask: Tensor, heat: Tensor) -> list[Prompt]:
    """A box around each larger part of a mask, and the point in it where the map is largest; both `[H, W]`."""
    prompts = []
    for part in parts_of(mask)[:ASKED_PARTS]:
        if part.sum() < LEAST_PART * mask.sum():
            break
        rows, columns = part.any(dim=1).nonzero().flatten().tolist(), part.any(dim=0).nonzero().flatten().tolist()
        y, x = divmod(int(heat.masked_fill(~part, -torch.inf).argmax()), heat.shape[1])
        prompts.append(Prompt((x, y), (columns[0], rows[0], columns[-1], rows[-1])))
    return prompts


# ------------------------------------------------------------------------------------------ as a method


class SAM:
    """Another method's maps and cut, the mask by SAM: each larger part of the mask that `base` cuts, before any dense
    CRF, is a box, and the largest value in it a point; the label's mask is all that SAM finds by them.

    weights: see `Segmenter`, or one that is there. base: a method, or its name; tau and alpha are its own. Maps are
    those of `base`, so that peaks, label map and evolution are what they were.
    """

    crf: ClassVar[bool] = False
    cuts_each: ClassVar[bool] = False  # SAM's masks are of the picture, too

    def __init__(self, weights: str | Path | Segmenter, base: str | Method = DEFAULT_METHOD):
        self.base = method_named(base)
        self.segmenter = weights if isinstance(weights, Segmenter) else Segmenter(weights)
        self.name = SAM.__name__ if self.base.name == DEFAULT_METHOD else f"{self.base.name} + {SAM.__name__}"
        self.about = f"Boxes and points of {self.base.name}'s maps, by which Segment Anything finds the masks."
        self.asks: Asks = self.base.asks
        self.takes_tokens = self.base.takes_tokens
        self.run_steps, self.step = self.base.run_steps, self.base.step
        self.needs_goca, self.needs_features = self.base.needs_goca, self.base.needs_features
        self.keeps, self.weighs_grids = self.base.keeps, self.base.weighs_grids
        self.keeps, self.weighs_grids = self.base.keeps, self.base.weighs_grids
        self.has_alpha = self.base.has_alpha

    def check(self, settings: SegmentSettings) -> None:
        self.base.check(settings)

    def check_words(self, pipe: Pipeline, caption: str, words: Sequence[str]) -> None:
        self.base.check_words(pipe, caption, words)

    def words(self, pipe: Pipeline, settings: SegmentSettings) -> list[Query]:
        return self.base.words(pipe, settings)

    def cut(self, query: Query, given: Cut, preset: ModelDefaults | None) -> Query:
        return self.base.cut(query, given, preset)

    def heatmaps(self, pipe: Pipeline, picture: Picture, queries: Sequence[Query]) -> Tensor:
        return self.base.heatmaps(pipe, picture, queries)

    def masks(
        self,
        picture: Picture,
        maps: Tensor,
        queries: Sequence[Query],
        crf: bool = True,  # noqa: ARG002
        on_label: Callable[[], None] | None = None,
    ) -> np.ndarray:
        cut = torch.from_numpy(self.base.masks(picture, maps, queries, crf=False))
        heat = resize(maps[: len(cut)].detach(), (picture.image.height, picture.image.width)).float().cpu()
        refined = []
        for mask, own in zip(cut, heat, strict=True):
            if on_label is not None:
                on_label()
            refined.append(self.segmenter.masks(picture.image, prompts_of(mask, own), maps.device).any(axis=0))
        return np.stack(refined)
