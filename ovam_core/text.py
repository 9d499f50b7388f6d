"""Attribution prompts: text to the embedding `[L, E]` whose tokens get heatmaps, and words to token positions.

Unlike the generation prompt, an attribution prompt is not padded: the softmax over its tokens (Eq. 3) knows nothing
but `<SoT>`, the words and `<EoT>` (T5 has no `<SoT>`, Gemma no `<EoT>`). How a family of models reads text is in
`families`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .families import family_of
from .family import EOT, SOT, Tokens

MAX_WORDS = 32
MAX_WORD_CHARS = 200

# Words of a phrase that name nothing one could point at.
FUNCTION_WORDS = frozenset(
    """a an the this that these those of in on at to with and or by for from near under over behind beside between
    into onto is are be its his her their my your our some any very""".split()  # noqa: SIM905
)


@dataclass(frozen=True, eq=False)
class Attribution:
    """An attribution prompt, encoded.

    embedding: `[L, E]` in the text encoder's dtype, on its device, the special tokens included.
    labels: what gets a map; groups: for each label the rows of `embedding` whose maps are averaged; shares: what each of
    them counts for, one in sum, None where they count alike.
    """

    embedding: Tensor
    labels: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]
    shares: tuple[tuple[float, ...], ...] | None = None

    def means(self, maps: Tensor, rows: Sequence[int] | None = None) -> list[Tensor]:
        """One map a label, `[...]` each, of one a row, `[L, ...]`; rows: those of `embedding` that `maps` holds, default all."""
        if rows is not None:
            maps = maps[[rows.index(row) if row in rows else 0 for row in range(len(self.embedding))]]
        if self.shares is None:
            return [maps[list(group)].mean(dim=0) for group in self.groups]
        return [
            torch.einsum("r,r...->...", maps.new_tensor(shares), maps[list(group)])
            for group, shares in zip(self.groups, self.shares, strict=True)
        ]


def parse_words(text: str) -> list[str]:
    """Words of a text, "cat, car; the red bus" to ["cat", "car", "the red bus"]: split at commas, semicolons and line ends.

    Repeated words (whatever their case) are taken once, in the order given. Raises ValueError for no word, a word
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
    Raises ValueError for words that `parse_words` refuses, a template without {}, and prompts that are too long.
    """
    words = _check_words(words)
    if template.count("{}") != 1:
        raise ValueError(f"The template {template[:80]!r} must contain {{}} once, where the word goes.")
    before, after = template.split("{}")
    return [words_in_sentence(pipe, before + word + after, [word]) for word in words]


def attribute_sentence(pipe, sentence: str) -> Attribution:
    """A whole sentence as one attribution prompt: one label a token, `<SoT>` and `<EoT>` included.

    With two text encoders whose tokens follow each other (HunyuanDiT), those of the first, then those of the second.
    Raises ValueError for an empty sentence and for one longer than the text encoder's limit; nothing is cut.
    """
    family = family_of(pipe)
    tokens = family.tokenize(sentence)
    positions = tuple((i,) for i in range(len(tokens.names)))
    return Attribution(_encode(family, tokens), tokens.names, positions)


def words_in_sentence(pipe, sentence: str, words: Sequence[str]) -> Attribution:
    """Words inside one attribution sentence, which they share: one label a word.

    A word's map is the mean over its tokens, a phrase's the mean over its content words, at all occurrences in the sentence.
    Raises ValueError for a word that is not in the sentence, and as `attribute_words`.
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
    Raises ValueError for an empty prompt and for one that the pipeline would cut.
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
        raise ValueError("There is no word to look for: give at least one, separated by commas.")
    if len(words) > MAX_WORDS:
        raise ValueError(f"{len(words)} words are too many: give at most {MAX_WORDS}.")
    for word in words:
        if not isinstance(word, str):
            raise ValueError(f"The word {word!r} is not text.")
        if len(word) > MAX_WORD_CHARS:
            raise ValueError(f"The word {word[:30]!r}... is longer than {MAX_WORD_CHARS} characters: shorten it.")
        if not any(_is_content(letter) for letter in word):
            raise ValueError(f"{word!r} is not a word: it has neither a letter nor a digit.")
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
        raise ValueError(f"{word!r} does not stand in the sentence {tokens.text[:80]!r}: use words of the sentence.")
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
