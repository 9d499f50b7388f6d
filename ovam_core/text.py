"""Attribution prompts: text to the embedding `[L, E]` whose tokens get heatmaps, and words to token positions.

Unlike the generation prompt, an attribution prompt is not padded: the softmax over its tokens (Eq. 3) knows nothing
but `<SoT>`, the words and `<EoT>`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_WORDS = 32
MAX_WORD_CHARS = 200
SOT, EOT = "<SoT>", "<EoT>"

# Words of a phrase that name nothing one could point at.
FUNCTION_WORDS = frozenset(
    """a an the this that these those of in on at to with and or by for from near under over behind beside between
    into onto is are be its his her their my your our some any very""".split()  # noqa: SIM905
)


@dataclass(frozen=True, eq=False)
class Attribution:
    """An attribution prompt, encoded.

    embedding: `[L, E]` in the text encoder's dtype, on its device, `<SoT>` and `<EoT>` included.
    labels: what gets a map; groups: for each label the rows of `embedding` whose maps are averaged.
    """

    embedding: Tensor
    labels: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class _Tokens:
    """The tokens of a text, special ones included: ids, and for each the (start, end) of its letters in `text`."""

    text: str
    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


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

    words: words or phrases; a word of several sub-tokens, or a phrase, gets one map, the mean over the tokens of its
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

    Raises ValueError for an empty sentence and for one longer than the text encoder's limit; nothing is cut.
    """
    tokens = _tokenize(pipe, sentence)
    positions = tuple((i,) for i in range(len(tokens.ids)))
    return Attribution(_encode(pipe, tokens.ids), tuple(_names(pipe, tokens)), positions)


def words_in_sentence(pipe, sentence: str, words: Sequence[str]) -> Attribution:
    """Words inside one attribution sentence, which they share: one label a word.

    A word's map is the mean over the tokens of its content words, at all its occurrences in the sentence.
    Raises ValueError for a word that is not in the sentence, and as `attribute_words`.
    """
    words = _check_words(words)
    tokens = _tokenize(pipe, sentence)
    groups = tuple(_positions(pipe, tokens, word) for word in words)
    return Attribution(_encode(pipe, tokens.ids), tuple(words), groups)


def encode_padded(pipe, prompt: str) -> Tensor:
    """The prompt as the pipeline itself encodes it for generation: `[77, E]` for CLIP, padding included.

    Raises ValueError for an empty prompt and for one that the pipeline would cut.
    """
    _tokenize(pipe, prompt)
    with torch.no_grad():
        return pipe.encode_prompt(prompt, pipe._execution_device, 1, False)[0][0]


def token_strings(pipe, sentence: str) -> list[str]:
    """The tokens of a sentence as they will be labelled: "<SoT>", pieces of the text, "<EoT>"."""
    return _names(pipe, _tokenize(pipe, sentence))


def _check_words(words: Sequence[str]) -> list[str]:
    words = [words] if isinstance(words, str) else list(words)
    if not words:
        raise ValueError("There is no word to look for: give at least one, separated by commas.")
    if len(words) > MAX_WORDS:
        raise ValueError(f"{len(words)} words are too many: give at most {MAX_WORDS}.")
    for word in words:
        if len(word) > MAX_WORD_CHARS:
            raise ValueError(
                f"The word {word[:30]!r}... is longer than {MAX_WORD_CHARS} characters: shorten it."
            )
        if not any(_is_content(letter) for letter in word):
            raise ValueError(f"{word!r} is not a word: it has neither a letter nor a digit.")
    return words


def _is_content(letter: str) -> bool:
    """Letters, digits and pictographs (emoji are Unicode's "other symbols")."""
    return unicodedata.category(letter)[0] in "LN" or unicodedata.category(letter) == "So"


def _tokenize(pipe, text: str) -> _Tokens:
    if getattr(pipe, "text_encoder_2", None) is not None:
        raise ValueError(
            "Pipelines with two text encoders are not supported yet: load Stable Diffusion 1 or 2."
        )
    text = _convert(pipe, text)
    if not text.strip():
        raise ValueError("The text is empty: write at least one word.")
    encoded = pipe.tokenizer(text, return_offsets_mapping=True)  # not padded, not truncated
    limit = min(pipe.tokenizer.model_max_length, pipe.text_encoder.config.max_position_embeddings)
    if len(encoded.input_ids) > limit:
        raise ValueError(
            f"The text has {len(encoded.input_ids)} tokens and the text encoder takes {limit}, its start and end "
            "included: shorten it."
        )
    return _Tokens(text, tuple(encoded.input_ids), tuple(map(tuple, encoded.offset_mapping)))


def _convert(pipe, text: str) -> str:
    """Textual inversion tokens of several vectors, spelled out as the pipeline does before it tokenises."""
    convert = getattr(pipe, "maybe_convert_prompt", None)
    return convert(text, pipe.tokenizer) if convert else text


def _encode(pipe, ids: Sequence[int]) -> Tensor:
    """`[L, E]`: the text encoder's first output, as the pipeline takes it."""
    batch = torch.tensor([ids], device=pipe._execution_device)
    uses_mask = getattr(pipe.text_encoder.config, "use_attention_mask", False)
    with torch.no_grad():
        return pipe.text_encoder(batch, attention_mask=torch.ones_like(batch) if uses_mask else None)[0][0]


def _names(pipe, tokens: _Tokens) -> list[str]:
    special = {pipe.tokenizer.bos_token_id: SOT, pipe.tokenizer.eos_token_id: EOT}
    last = len(tokens.ids) - 1
    names = []
    for i, (token, (start, end)) in enumerate(zip(tokens.ids, tokens.spans, strict=True)):
        is_end = i in (0, last) and token in special  # CLIP's unknown token is the end token too
        names.append(special[token] if is_end else tokens.text[start:end].strip())
    return names


def _positions(pipe, tokens: _Tokens, word: str) -> tuple[int, ...]:
    """The tokens of the content words of `word`, wherever it stands in the text; of all its words if none is."""
    pattern = r"\s+".join(re.escape(part) for part in _convert(pipe, word).split())
    found = list(re.finditer(rf"(?<!\w){pattern}(?!\w)", tokens.text, flags=re.IGNORECASE))
    if not found:
        raise ValueError(
            f"{word!r} does not stand in the sentence {tokens.text[:80]!r}: use words of the sentence."
        )
    pieces = [
        (match.start() + piece.start(), match.start() + piece.end(), piece.group().lower())
        for match in found
        for piece in re.finditer(r"[^\W_]+|[^\w\s]+", match.group())
    ]
    named = [x for x in pieces if any(map(_is_content, x[2]))]
    content = [x for x in named if x[2] not in FUNCTION_WORDS] or named
    return tuple(
        i
        for i, (start, end) in enumerate(tokens.spans)
        if end > start and any(start < b and end > a for a, b, _ in content)
    )
