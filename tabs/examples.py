"""The pictures that the page offers to make, with their thumbnails; `python -m tabs.examples` draws these anew."""

from __future__ import annotations

import base64
import html
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ovam_core.models.presets import EMBEDDED
from ovam_core.ovam import OVAM

FOLDER = Path(__file__).parent / "assets" / "examples"
SIDE = 128  # pixels of a thumbnail's longer side


@dataclass(frozen=True)
class Example:
    """What is drawn, from which seed, and the words to look for, comma separated."""

    prompt: str
    words: str
    seed: int

    @property
    def link(self) -> dict[str, str]:
        return {"prompt": self.prompt, "words": self.words, "seed": str(self.seed)}


# Of a dozen or more seeds each, those whose masks agree most with the annotator's, then by eye.
EXAMPLES = (
    Example("A photograph of a bird and a boat on the sea", "bird, ship", 9),
    Example("A photograph of a sheep and a car on grass", "lamb, car", 0),
    Example("A photograph of a dog and a car on a road", "puppy, car", 9),
    Example("A photograph of a cat and a dog on grass", "cat, dog", 8),
    Example("A photograph of a bus on a road at sunset", "bus", 7),
    Example("A photograph of a train", "train", 4),
)


def thumbnail(number: int, model: str) -> str:
    """The picture of an example as a data URL; "" for a model that it was not drawn with."""
    file = FOLDER / f"{number}.webp"
    if model != EMBEDDED or not file.is_file():
        return ""
    return f"data:image/webp;base64,{base64.b64encode(file.read_bytes()).decode()}"


def buttons(model: str, examples: Sequence[Example] = EXAMPLES) -> str:
    """A button an example, as HTML: its picture where there is one, and its prompt."""
    return f'<div class="examples" role="group" aria-label="Examples">{"".join(_buttons(model, examples))}</div>'


def _buttons(model: str, examples: Sequence[Example]) -> list[str]:
    made = []
    for number, example in enumerate(examples):
        picture = thumbnail(number, model)
        shown = f'<img src="{picture}" alt="" width="{SIDE}" height="{SIDE}">' if picture else ""
        link, prompt = html.escape(json.dumps(example.link)), html.escape(example.prompt)
        made.append(
            f'<button type="button" data-link="{link}" title="{prompt}" aria-label="Example: {prompt}">'
            f"{shown}<span>{html.escape(short(example.prompt))}</span></button>"
        )
    return made


def short(prompt: str) -> str:
    """What a prompt shows, without how every prompt begins."""
    return prompt.removeprefix("A photograph of ")


def draw() -> None:
    """Draws all thumbnails with the embedded model."""
    ovam = OVAM.from_pretrained(EMBEDDED, "cpu")
    FOLDER.mkdir(parents=True, exist_ok=True)
    for old in FOLDER.glob("*.webp"):
        old.unlink()
    for number, example in enumerate(EXAMPLES):
        picture = ovam.generate(example.prompt, seed=example.seed).image
        picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        picture.save(buffer, format="WEBP", quality=88)
        (FOLDER / f"{number}.webp").write_bytes(buffer.getvalue())


if __name__ == "__main__":
    sys.exit(draw())
