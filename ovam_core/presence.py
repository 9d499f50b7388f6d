"""Presence scores of what is asked of a picture: which words each label is compared with, on the model's own scale."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from ovam_core.attention.heatmap import AttributionPrompt
from ovam_core.attention.presence import calibrated, raw_presence
from ovam_core.attention.reading import Reading
from ovam_core.attention.recording import Branch, Recording
from ovam_core.errors import InputError
from ovam_core.methods import rows_of_labels
from ovam_core.models.presets import defaults_for, recommended_part
from ovam_core.models.reading import EOT, FUNCTION_WORDS, SOT
from ovam_core.models.registry import adapter_of
from ovam_core.models.words import plain
from ovam_core.query import PICTURE_WORDS, PLACE_WORDS, Query, attribute_words

if TYPE_CHECKING:
    from ovam_core.models.adapter import Pipeline

# What a pixel could be where the caption does not say it.
SCENERY = tuple("sky grass road sea wall sand snow forest floor field night mountains".split())
# Heads of phrases that name where things are. Their attention lies thinly on all of a picture and the score says that
# they are not there ("grass" 0.05 on grass): a measured scale, which is one of things, does not hold for them.
SURROUNDINGS = frozenset(SCENERY) | frozenset(
    "water ocean lake river street wood woods meadow lawn winter sunset sunrise ground beach desert hill mountain city "
    "room indoors outdoors background foreground scenery landscape horizon air cloud clouds tile tiles carpet "
    "ceiling pavement surroundings".split()
)
# Below it a word is said to be probably not there: rather too few than too many, as other names of what is there
# (kitten, animal) score lower than its own.
UNLIKELY = 0.2
MAX_PHRASES = 16  # of a caption
MAX_KNOWN = 256  # words that are kept read


def caption_phrases(caption: str) -> list[str]:
    """Runs of content words, plain, each once: "A red bus next to a cat" to ["red bus", "cat"].

    An adjective stays with its noun, so that it is not taken for a rival of it.
    """
    runs: list[list[str]] = [[]]
    for part in re.findall(r"[\w'-]+|[^\w\s]", plain(caption)):
        if part in FUNCTION_WORDS | PLACE_WORDS | PICTURE_WORDS or not any(map(str.isalnum, part)):
            runs.append([])
        else:
            runs[-1].append(part)
    return list(dict.fromkeys(" ".join(run) for run in runs if run))[:MAX_PHRASES]


def named_words(label: str) -> frozenset[str]:
    """What a label names, for comparing: content words without the s of a plural; none for "the" and "<SoT>"."""
    words = [] if label in (SOT, EOT) else re.findall(r"\w+", plain(label))
    return frozenset(word.removesuffix("s") for word in words if word not in FUNCTION_WORDS)


def names_surroundings(label: str) -> bool:
    """Whether a phrase names where things are, by its last word: "the blue sky" does, "a road bike" does not."""
    return next(reversed(re.findall(r"\w+", plain(label))), "") in SURROUNDINGS


class PresenceScorer:
    """Says of words and tokens whether they are in a picture at all, from its recording.

    Each is compared with the caption's phrases and with SCENERY; a phrase that shares a word with it is left out. The
    rivals are read once and kept, as reading takes longer than all else.
    """

    def __init__(self, pipe: Pipeline):
        self._pipe = pipe
        self._known: tuple[Reading, dict[str, AttributionPrompt]] = (Reading(), {})

    def scores(
        self, recording_of: Callable[[Branch], Recording | None], queries: Sequence[Query], caption: str
    ) -> list[float | None]:
        """One a label of all queries: 0 to 1, None for what names nothing ("<SoT>", "the") or was not recorded, and on
        a measured scale for surroundings.

        A half where present and absent words are as likely, where the model's preset has been measured; else the raw
        score. recording_of: the recording of a half of the guided batch, None without. caption: "" where not known.
        """
        measured = defaults_for(self._pipe).presence
        scale = measured or (1.0, 0.0)
        labels = [label for query in queries for label in query.labels]
        raw = self.raw(recording_of, queries, caption)
        return [
            None
            if x is None or not named_words(label) or (measured and names_surroundings(label))
            else calibrated(x, *scale)
            for x, label in zip(raw, labels, strict=True)
        ]

    def raw(
        self, recording_of: Callable[[Branch], Recording | None], queries: Sequence[Query], caption: str
    ) -> list[float | None]:
        """The same of every label, before it is brought to the model's own scale."""
        rivals = self._read([*caption_phrases(caption), *SCENERY])
        others = [named_words(label) for one in rivals for label in one.labels]
        found: dict[int, float | None] = {}
        places = rows_of_labels(queries)
        for branch in dict.fromkeys(query.branch for query in queries):
            chosen = [n for n, query in enumerate(queries) if query.branch == branch]
            recording = recording_of(branch)
            if recording is None:  # a method of its own looks at both halves
                found.update((row, None) for n in chosen for row in places[n])
                continue
            prompts = [prompt for n in chosen for prompt in self._prompts(queries[n])]
            own = [named_words(label) for n in chosen for label in queries[n].labels]
            compared = torch.tensor([[not words & other for other in others] for words in own])
            raw = raw_presence(recommended_part(self._pipe, recording), prompts, rivals, compared)
            found.update(zip([row for n in chosen for row in places[n]], raw, strict=True))
        return [found[row] for row in range(len(found))]

    def _prompts(self, query: Query) -> list[AttributionPrompt]:
        """As the query asks; words that a method reads together, each on its own."""
        return [query.prompt] if query.prompt is not None else attribute_words(self._pipe, query.labels)

    def _read(self, words: Sequence[str]) -> list[AttributionPrompt]:
        """The words that can be read, each in a prompt of its own."""
        reading = adapter_of(self._pipe).reading
        known = self._known[1] if self._known[0].is_same(reading) and len(self._known[1]) < MAX_KNOWN else {}
        for word in (word for word in words if word not in known):
            try:
                known[word] = attribute_words(self._pipe, [word])[0]
            except InputError:  # a long clause, or a mark of a language that this text encoder does not know
                continue
        self._known = reading, known
        return [known[word] for word in words if word in known]
