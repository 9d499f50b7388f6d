"""What `generate` and `photo` share: the options that ask of one picture, and the files that answer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ovam_core.cli.options import (
    MASKS,
    CutOptions,
    GridOptions,
    MethodOptions,
    ModelOptions,
    given,
    named,
    one_of,
    option,
    setting,
)
from ovam_core.settings import EVOLUTIONS, HALVES, SYSTEMS, GenerateSettings, PhotoSettings, SegmentSettings

if TYPE_CHECKING:
    from ovam_core.ovam import OVAM
    from ovam_core.picture import MadeBy, Picture


@dataclass(kw_only=True)
class SegmentOptions(ModelOptions, GridOptions, CutOptions, MethodOptions):
    """What is asked of one picture, and where the answers go."""

    words: list[str] | None = option("words to look for; quote phrases: 'red bus'", metavar="WORD...")  # noqa: RUF009
    attribution: str | None = setting(SegmentSettings, "sentence", metavar="SENTENCE")
    evolution: str | None = option(
        "take each word's heatmap apart, as an animated picture: " + ", ".join(EVOLUTIONS),
        said="steps, if nothing follows",
        panel=MASKS,
        metavar="[OVER]",
        check=one_of(EVOLUTIONS),
    )
    token: list[str] | None = option("token files whose classes to look for", metavar="FILE...")  # noqa: RUF009
    out: str = option("folder for the files", required=True, metavar="DIR", check=named)
    weights: str | None = option(
        "weights of a method with trained modules, a .pth file (SAM's: a folder, or a hub id), yours to bring from "
        "where its authors publish them: "
        + "; ".join(f"{name.lower().replace(' ', '-')}, {source}" for name, source in SYSTEMS.items()),
        panel=MASKS,
        metavar="FILE",
        check=named,
    )
    settings: str | None = option(
        "a settings.json of this command to use again; other options change it", metavar="FILE"
    )

    def about_maps(self) -> dict[str, Any]:
        """What was given about maps and masks, as fields of SegmentSettings."""
        from ovam_core.methods import method_named
        from ovam_core.tokens import Token

        found = given(tau=self.tau, alpha=self.alpha, crf=self.crf(), evolution=self.evolution)
        if self.resolutions is not None:  # an empty list is the model's own again, whatever --settings says
            found["resolutions"] = self.grids()
        if self.token is not None:
            found["tokens"] = tuple(Token.load(path) for path in self.token)
        if self.method is not None:
            found["method"] = method_named(self.method).name if self.weights is None else self._system(self.method)
        return found

    def _system(self, name: str) -> Any:
        """The system of this name with its weights, where it was not made yet."""
        from ovam_core.downstream.registry import with_weights
        from ovam_core.models.load import quiet

        quiet()
        return with_weights(name, self.weights or "") if isinstance(name, str) else name

    def with_system(self, asked: SegmentSettings) -> SegmentSettings:
        """The same, its method with the weights that were given."""
        return asked if self.weights is None else replace(asked, method=self._system(asked.method))


@dataclass(kw_only=True)
class HalfOptions:
    """Of the commands that ask of what was recorded of a guided run."""

    branch: str | None = option(
        "half of the guided batch that words are asked of; the unconditional one is the negative prompt's",
        said="conditional",
        choices=HALVES,
        panel=MASKS,
    )


@dataclass(kw_only=True)
class RecordingOptions:
    """Of the commands that record a picture."""

    recording: str | None = option(
        "file to keep the picture in with all that was recorded of it, for `segment`", metavar="FILE", check=named
    )

    def check_recording(self) -> None:
        """Raises InputError where no such file can be written."""
        from ovam_core.io.files import check_file_name

        if self.recording is not None:
            check_file_name(Path(self.recording))

    def keep(self, picture: Picture) -> None:
        if self.recording is not None:
            picture.save_recording(self.recording)


def read_asked(
    options: SegmentOptions, about_maps: dict[str, Any], made_by: type[MadeBy]
) -> tuple[MadeBy | None, SegmentSettings, str | None, str | None]:
    """What made the picture (None without --settings), what to ask of it, the model and the device."""
    from ovam_core.methods import check_settings, settings_of_text
    from ovam_core.picture import load_settings

    words = "" if options.words is None else ", ".join(options.words)
    if options.settings is None:
        asked = settings_of_text(words, options.attribution or "", **about_maps)
        before, model, device = None, options.model, options.device
    else:
        before, asked, model, device = load_settings(options.settings, made_by)
        if about_maps.get("method", asked.method) != asked.method:  # another method's are shares of another map's peak
            asked = replace(asked, tau=None, alpha=None, token_tau=None, token_alpha=None)
        asked = replace(asked, **about_maps)
        if options.words is not None or options.attribution is not None:
            fresh = settings_of_text(words, options.attribution or "")
            asked = replace(asked, words=fresh.words, sentence=fresh.sentence)
        model, device = options.model or model, options.device or device
    asked = options.with_system(asked)
    check_settings(asked)
    return before, asked, model, device


def check_asked(
    ovam: OVAM, made_with: GenerateSettings | PhotoSettings | None, asked: SegmentSettings, options: SegmentOptions
) -> SegmentSettings:
    """The same with the model's own numbers, once all is known to work: better before the image than after it."""
    from ovam_core.io.files import make_folder

    if asked.tokens:  # a number that is given holds for all
        asked = replace(asked, **given(token_tau=options.tau, token_alpha=options.alpha))
    asked = ovam.filled(asked)
    if made_with is not None:
        made_with.validate(ovam.pipe)
    ovam.check_answerable(asked, made_with)
    ovam.queries(asked)
    make_folder(options.out)
    return asked


def answer(ovam: OVAM, picture: Picture, asked: SegmentSettings, folder: str) -> None:
    """Heatmaps and masks, written and listed."""
    found = ovam.answer(picture, asked)
    found.save(folder)
    for label, peak, presence in zip(found.labels, found.peaks, found.presence, strict=True):
        said = "" if presence is None else f", presence {presence:.2f}"
        missing = " (probably not in the picture)" if ovam.is_absent(presence) else ""
        typer.echo(f"{label}: peak {peak:.2f}{said}{missing}")
    if about := ovam.adapter.about:
        typer.echo(about)
