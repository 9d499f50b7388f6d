"""`ovam photo`: the heatmap and mask of any word in a photograph."""

from __future__ import annotations

from dataclasses import dataclass, replace

import typer

from ovam_core.cli.options import PHOTO, NoiseOptions, argument, given, open_model, option, setting
from ovam_core.cli.segment import RecordingOptions, SegmentOptions, answer, check_asked, read_asked
from ovam_core.settings import PhotoSettings


@dataclass(kw_only=True)
class Options(SegmentOptions, RecordingOptions, NoiseOptions):
    """The heatmap and mask of any word in a photograph.

    Noises a photograph, looks at it in one forward pass, and writes it with a heatmap, an overlay and a mask for each
    word, all at its own size.
    """

    image: str = argument("the photograph: JPEG, PNG, or what else Pillow reads")
    caption: str | None = option("what it shows; '' for none", said="lists the words", panel=PHOTO, metavar="TEXT")
    seed: int | None = setting(PhotoSettings, "seed", said="0", panel=PHOTO)


def run(options: Options) -> None:
    """Reads everything, refuses what is wrong, and only then loads the model."""
    from ovam_core.io.pictures import read_photo
    from ovam_core.methods import method_named
    from ovam_core.ovam import default_caption

    about_photo = given(caption=options.caption, seed=options.seed) | options.noise()
    photo = read_photo(options.image)
    before, asked, model, device = read_asked(options, options.about_maps(), PhotoSettings)
    ovam = open_model(model, device)
    caption = default_caption(asked)
    wanted = replace(PhotoSettings.for_model(ovam.pipe, caption) if before is None else before, **about_photo)
    asked = check_asked(ovam, wanted, asked, options)
    options.check_recording()
    with_goca = ovam.serves_goca if options.recording else method_named(asked.method).needs_goca
    picture = ovam.look_at(photo, wanted, with_goca=with_goca, keep=method_named(asked.method).keeps)
    options.keep(picture)
    answer(ovam, picture, asked, options.out)
    height, width = picture.recording.image_size
    seen = f"'{wanted.caption}', seen as {width}x{height}"
    typer.echo(f"{seen}, {picture.seconds:.1f} s on {picture.device}: {options.out}")
