"""Attribution prompts: text to the embedding `[L, E]` whose tokens get heatmaps, and words to token positions.

Unlike the generation prompt, an attribution prompt is not padded: the softmax over its tokens (Eq. 3) knows nothing
but `<SoT>`, the words and `<EoT>` (T5 has no `<SoT>`, Gemma no `<EoT>`). How a family of models reads text is in
`families`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ovam_core.attention.heatmap import Attribution
from ovam_core.errors import InputError
from ovam_core.models.families import family_of
from ovam_core.models.family import EOT, SOT, Tokens

# Words of a caption that name nothing in the picture; the second kind may name all of it.
PLACE_WORDS = frozenset("next against inside outside above below front back top side left right beneath around".split())

PICTURE_WORDS = frozenset("photograph photo picture image painting drawing illustration view scene".split())


def caption_words(pipe: Any, caption: str, words: Sequence[str]) -> Attribution:
    """Words of the caption, as the pass itself has read it, padding included: what the paper asks for.

    Raises InputError for a word that is not in the caption.
    """
    return replace(words_in_sentence(pipe, caption, words), embedding=encode_padded(pipe, caption))


def listed_words(pipe: Any, caption: str, words: Sequence[str]) -> Attribution:
    """Any words, in one attribution prompt of their own, "cat, meadow"; `caption` is not looked at.

    The extension to words that are not in the caption.
    """
    return words_in_sentence(pipe, ", ".join(words), words)


def background_words(caption: str, words: Sequence[str]) -> tuple[str, ...]:
    """The caption's content words that are not asked for, in lower case, each once: they stand for the background.

    Words such as "photograph" only where nothing else is left. Part of speech is not known: "red" counts as
    "sky" does. No more than may be asked for together with `words`.
    """
    asked = {part for word in words for part in _words(word)}
    left = [x for x in dict.fromkeys(_words(caption)) if x not in asked | FUNCTION_WORDS | PLACE_WORDS]
    return tuple([x for x in left if x not in PICTURE_WORDS] or left)[: max(0, MAX_WORDS - len(words))]


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:[-'’][^\W_]+)*", text.lower())


MAX_WORDS = 32

MAX_WORD_CHARS = 200

# Words of a phrase that name nothing one could point at.
FUNCTION_WORDS = frozenset(
    """a an the this that these those of in on at to with and or by for from near under over behind beside between
    into onto is are be its his her their my your our some any very""".split()  # noqa: SIM905
)


def parse_words(text: str) -> list[str]:
    """Words of a text, "cat, car; the red bus" to ["cat", "car", "the red bus"]: split at commas, semicolons and line ends.

    Repeated words (whatever their case) are taken once, in the order given. Raises InputError for no word, a word
    without letter or digit, a word of more than MAX_WORD_CHARS, more than MAX_WORDS words.
    """
    words = [" ".join(part.split()) for part in re.split(r"[,;\n\r]+", text)]
    first: dict[str, str] = {}
    for word in filter(None, words):
        first.setdefault(word.lower(), word)
    return _check_words(list(first.values()))


def attribute_words(pipe, words: Sequence[str], template: str = "{}") -> list[Attribution]:
    """One attribution prompt a word, `<SoT> word <EoT>`: the map of a word does not depend on its neighbours.

    words: words or phrases; a word of several sub-tokens gets one map, the mean over them, a phrase the mean over its
    content words. template: the prompt around each word, such as "a photograph of a {}".
    Raises InputError for words that `parse_words` refuses, a template without {}, and prompts that are too long.
    """
    words = _check_words(words)
    if template.count("{}") != 1:
        raise InputError(f"The template {template[:80]!r} must contain {{}} once, where the word goes.")
    before, after = template.split("{}")
    return [words_in_sentence(pipe, before + word + after, [word]) for word in words]


def attribute_sentence(pipe, sentence: str) -> Attribution:
    """A whole sentence as one attribution prompt: one label a token, `<SoT>` and `<EoT>` included.

    With two text encoders whose tokens follow each other (HunyuanDiT), those of the first, then those of the second.
    Raises InputError for an empty sentence and for one longer than the text encoder's limit; nothing is cut.
    """
    family = family_of(pipe)
    tokens = family.tokenize(sentence)
    positions = tuple((i,) for i in range(len(tokens.names)))
    return Attribution(_encode(family, tokens), tokens.names, positions)


def words_in_sentence(pipe, sentence: str, words: Sequence[str]) -> Attribution:
    """Words inside one attribution sentence, which they share: one label a word.

    A word's map is the mean over its tokens, a phrase's the mean over its content words, at all occurrences in the sentence.
    Raises InputError for a word that is not in the sentence, and as `attribute_words`.
    """
    words = _check_words(words)
    family = family_of(pipe)
    tokens = family.tokenize(sentence)
    counted = [_positions(tokens, family.spelled(word)) for word in words]
    groups = tuple(tuple(one) for one in counted)
    shares = tuple(tuple(one.values()) for one in counted)
    alike = all(max(one, default=0) - min(one, default=0) < 1e-9 for one in shares)
    return Attribution(_encode(family, tokens), tuple(words), groups, None if alike else shares)


def background_embedding(pipe, sentence: str) -> Tensor:
    """The row that takes what no word asks for, `[1, E]`: the sentence's `<SoT>`, or its `<EoT>` where there is none (T5)."""
    found = attribute_sentence(pipe, sentence)
    row = next((i for i, label in enumerate(found.labels) if label in (SOT, EOT)), 0)
    return found.embedding[row : row + 1]


def encode_padded(pipe, prompt: str) -> Tensor:
    """The prompt as the pipeline itself encodes it for generation: `[77, E]` for CLIP, padding included.

    Padding that the pipeline masks takes no attention and is left out (T5 in PixArt, Gemma in Sana).
    Raises InputError for an empty prompt and for one that the pipeline would cut.
    """
    family = family_of(pipe)
    family.tokenize(prompt)
    with torch.no_grad():
        return family.encode_padded(prompt)


def token_strings(pipe, sentence: str) -> list[str]:
    """The tokens of a sentence as they will be labelled: "<SoT>", pieces of the text, "<EoT>"."""
    return list(family_of(pipe).tokenize(sentence).names)


def _check_words(words: Sequence[str]) -> list[str]:
    words = [words] if isinstance(words, str) else list(words)
    if not words:
        raise InputError("There is no word to look for: give at least one, separated by commas.")
    if len(words) > MAX_WORDS:
        raise InputError(f"{len(words)} words are too many: give at most {MAX_WORDS}.")
    for word in words:
        if not isinstance(word, str):
            raise InputError(f"The word {word!r} is not text.")
        if len(word) > MAX_WORD_CHARS:
            raise InputError(f"The word {word[:30]!r}... is longer than {MAX_WORD_CHARS} characters: shorten it.")
        if not any(_is_content(letter) for letter in word):
            raise InputError(f"{word!r} is not a word: it has neither a letter nor a digit.")
    return words


def _is_content(letter: str) -> bool:
    """Letters, digits and pictographs (emoji are Unicode's "other symbols")."""
    return unicodedata.category(letter)[0] in "LN" or unicodedata.category(letter) == "So"


def _encode(family, tokens: Tokens) -> Tensor:
    with torch.no_grad():
        return family.encode(tokens)


def _positions(tokens: Tokens, word: str) -> dict[int, float]:
    """The tokens of the content words of `word`, wherever it stands in the text, in order, with what each counts for.

    Every word counts alike, whatever the number of its tokens. All words are taken where none is a content word.
    """
    pattern = r"\s+".join(re.escape(part) for part in word.split())
    found = list(re.finditer(rf"(?<!\w){pattern}(?!\w)", tokens.text, flags=re.IGNORECASE))
    if not pattern or not found:
        raise InputError(f"{word!r} does not stand in the sentence {tokens.text[:80]!r}: use words of the sentence.")
    pieces = [
        (match.start() + piece.start(), match.start() + piece.end(), piece.group().lower())
        for match in found
        for piece in re.finditer(r"[^\W_]+|[^\w\s]+", match.group())
    ]
    named = [x for x in pieces if any(map(_is_content, x[2]))]
    content = [x for x in named if x[2] not in FUNCTION_WORDS] or named
    counts: dict[int, float] = {}
    for a, b, _ in content:
        own = [i for i, (start, end) in enumerate(tokens.spans) if end > start and start < b and end > a]
        for i in own:
            counts[i] = counts.get(i, 0.0) + 1 / len(own)
    total = sum(counts.values())
    return {i: count / total for i, count in sorted(counts.items())}


def caption_of(names: Sequence[str]) -> str:
    """ "A photograph of a cat, an aeroplane and the red bus": what to tell the model of a picture of these things."""
    names = [name.strip() for name in names if name.strip()]
    things = [name if name.split()[0].lower() in FUNCTION_WORDS else f"{_article(name)} {name}" for name in names]
    if len(things) < 2:
        return " ".join(["A photograph", *(f"of {thing}" for thing in things)])
    return f"A photograph of {', '.join(things[:-1])} and {things[-1]}"


def _article(name: str) -> str:
    return "an" if name[0].lower() in "aeiou" else "a"
