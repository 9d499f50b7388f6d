"""Render every picture of the world once and pack them into `sprites.webp` (RGBA atlas) and `sprites.json`.

Run again only when `nouns.py` gains pictures: `python -m training.sprites`. It needs Debian's
`fonts-noto-color-emoji` (SIL OFL 1.1, see LICENSE-sprites.txt); nothing else does.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from training.nouns import NOUNS

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
HERE = Path(__file__).parent
CELL = 112


def render_emoji(text: str) -> Image.Image:
    """One emoji, RGBA, cropped to its own pixels."""
    font = ImageFont.truetype(FONT, 109)
    canvas = Image.new("RGBA", (200, 200))
    ImageDraw.Draw(canvas).text((20, 20), text, font=font, embedded_color=True)
    return canvas.crop(canvas.getbbox())


def draw_table(round_top: bool) -> Image.Image:
    """A dining table with a cloth or a round top, in the flat style of the emoji; drawn here, MIT."""
    image = Image.new("RGBA", (544, 400))
    draw = ImageDraw.Draw(image)
    wood, dark, cloth = (176, 112, 56, 255), (121, 72, 33, 255), (240, 232, 220, 255)
    if round_top:
        draw.polygon([(248, 130), (296, 130), (302, 330), (242, 330)], fill=dark)
        draw.polygon([(160, 372), (242, 310), (302, 310), (384, 372), (350, 380), (272, 340), (194, 380)], fill=dark)
        draw.ellipse([24, 60, 520, 190], fill=dark)
        draw.ellipse([24, 40, 520, 170], fill=wood)
        draw.ellipse([180, 75, 364, 132], fill=cloth, outline=(200, 190, 175, 255), width=6)
    else:
        for x in (60, 430):
            draw.polygon([(x, 150), (x + 54, 150), (x + 44, 388), (x + 10, 388)], fill=dark)
        draw.polygon([(110, 50), (434, 50), (532, 150), (12, 150)], fill=wood)
        draw.rectangle([12, 150, 532, 188], fill=dark)
        draw.polygon([(190, 50), (354, 50), (384, 188), (160, 188)], fill=cloth)
        draw.line([(178, 104), (366, 104)], fill=(205, 70, 60, 255), width=10)
    return image.resize((136, 100), Image.LANCZOS).crop(image.resize((136, 100), Image.LANCZOS).getbbox())


def picture(text: str) -> Image.Image:
    return draw_table(text == "@roundtable") if text.startswith("@") else render_emoji(text)


def fit(image: Image.Image) -> Image.Image:
    scale = CELL / max(image.size)
    return image.resize([max(1, round(side * scale)) for side in image.size], Image.LANCZOS)


def pack() -> None:
    """Write the atlas, 16 cells a row, and the index: name -> [[x, y, width, height], ...]."""
    cells = [(noun.name, fit(picture(text))) for noun in NOUNS for text in noun.emoji]
    columns = 16
    atlas = Image.new("RGBA", (columns * CELL, -(-len(cells) // columns) * CELL))
    index: dict[str, list[list[int]]] = {}
    for number, (name, image) in enumerate(cells):
        x, y = number % columns * CELL, number // columns * CELL
        atlas.paste(image, (x, y))
        index.setdefault(name, []).append([x, y, *image.size])
    atlas.save(HERE / "sprites.webp", lossless=True, quality=100, method=6)
    (HERE / "sprites.json").write_text(json.dumps(index, indent=None, ensure_ascii=False) + "\n")


@cache
def load() -> dict[str, tuple[Image.Image, ...]]:
    """Every noun's pictures: name -> RGBA images, long side 112 pixels."""
    atlas = Image.open(HERE / "sprites.webp").convert("RGBA")
    index = json.loads((HERE / "sprites.json").read_text())
    return {
        name: tuple(atlas.crop((x, y, x + width, y + height)) for x, y, width, height in boxes)
        for name, boxes in index.items()
    }


def check(image: Image.Image) -> float:
    """Share of the cell that is opaque: a picture the font lacks renders as an empty or hollow box."""
    return float((np.asarray(image)[..., 3] > 127).mean())


if __name__ == "__main__":
    pack()
    for name, images in load().items():
        for number, image in enumerate(images):
            if check(image) < 0.2:
                print(f"{name} {number}: only {check(image):.0%} opaque, look at it")
