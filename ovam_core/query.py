"""Attribution prompts: text to the embedding `[L, E]` whose tokens get heatmaps, and words to token positions.

Unlike the generation prompt, an attribution prompt is not padded: the softmax over its tokens (Eq. 3) knows nothing
but `<SoT>`, the words and `<EoT>` (T5 has no `<SoT>`, Gemma no `<EoT>`). How a family of models reads text is in
`families`.
"""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

from ovam_core.attention.heatmap import AttributionPrompt
from ovam_core.attention.recording import Branch
from ovam_core.errors import InputError
from ovam_core.models.reading import EOT, FUNCTION_WORDS, SOT, Tokens
from ovam_core.models.registry import UNNAMED, adapter_of, model_name
from ovam_core.models.remembered import recalled, remember
from ovam_core.models.words import content_words, find_word, has_weight, listed, plain
from ovam_core.settings import SegmentSettings
from ovam_core.tokens import Token, last_part

if TYPE_CHECKING:
    from ovam_core.models.adapter import Adapter, Pipeline

# Words of a caption that name nothing in the picture; the second kind may name all of it.
PLACE_WORDS = frozenset("next against inside outside above below front back top side left right beneath around".split())

PICTURE_WORDS = frozenset("photograph photo picture image painting drawing illustration view scene".split())


def caption_words(pipe: Pipeline, caption: str, words: Sequence[str]) -> AttributionPrompt:
    """Words of the caption, as the pass itself has read it, padding included: what the paper asks for.

    Raises InputError for a word that is not in the caption.
    """
    family, asked = adapter_of(pipe), words_in_sentence(pipe, caption, words)
    rows = family.padded_rows(family.tokenize(caption))
    groups = tuple(tuple(rows[row] for row in group) for group in asked.groups)
    return replace(asked, embedding=encode_padded(pipe, caption), groups=groups)


def listed_words(pipe: Pipeline, _caption: str, words: Sequence[str]) -> AttributionPrompt:
    """Any words, in one attribution prompt of their own, "cat, meadow"; the caption is not looked at.

    The extension to words that are not in the caption.
    """
    return words_in_sentence(pipe, ", ".join(words), words)


def background_words(caption: str, words: Sequence[str]) -> tuple[str, ...]:
    """The caption's content words that are not asked for, in lower case, each once: they stand for the background.

    Words such as "photograph" only where nothing else is left. Part of speech is not known: "red" counts as
    "sky" does. No more than may be asked for together with `words`.
    """
    left = [x for x in content_words(caption, words) if x not in FUNCTION_WORDS | PLACE_WORDS]
    return tuple([x for x in left if x not in PICTURE_WORDS] or left)[: max(0, MAX_WORDS - len(words))]


MAX_WORDS = 32

MAX_WORD_CHARS = 200


def parse_words(text: str) -> list[str]:
    """Words of a text, "cat, car; the red bus" to ["cat", "car", "the red bus"]: split at commas and semicolons of any
    script and at line ends.

    Repeated words (whatever their case) are taken once, in the order given. Raises InputError for no word, a word
    without letter or digit, with a weight "(cat:1.3)", of more than MAX_WORD_CHARS, more than MAX_WORDS words.
    """
    first: dict[str, str] = {}
    for word in listed(text):
        first.setdefault(plain(word), word)
    return _check_words(list(first.values()))


def attribute_words(pipe: Pipeline, words: Sequence[str], template: str = "{}") -> list[AttributionPrompt]:
    """One attribution prompt a word, `<SoT> word <EoT>`: the map of a word does not depend on its neighbours.

    words: words or phrases; a word of several sub-tokens gets one map, the mean over them, a phrase the mean over its
    content words. template: the prompt around each word, such as "a photograph of a {}".
    Raises InputError for words that `parse_words` refuses, a template without {}, and prompts that are too long.
    """
    words = _check_words(words)
    if template.count("{}") != 1:
        raise InputError(f"The template {template[:80]!r} must contain {{}} once, where the word goes.")
    before, after = template.split("{}")
    return _read(pipe, [(before + word + after, (word,)) for word in words])


def attribute_sentence(pipe: Pipeline, sentence: str) -> AttributionPrompt:
    """A whole sentence as one attribution prompt: one label a token, `<SoT>` and `<EoT>` included.

    With two text encoders whose tokens follow each other (HunyuanDiT), those of the first, then those of the second.
    Raises InputError for an empty sentence and for one longer than the text encoder's limit; nothing is cut.
    """
    return _read(pipe, [(sentence, None)])[0]


def words_in_sentence(pipe: Pipeline, sentence: str, words: Sequence[str]) -> AttributionPrompt:
    """Words inside one attribution sentence, which they share: one label a word.

    A word's map is the mean over its tokens, a phrase's the mean over its content words, at all occurrences in the
    sentence. Raises InputError for a word that is not in the sentence, and as `attribute_words`.
    """
    return _read(pipe, [(sentence, tuple(_check_words(words)))])[0]


def background_embedding(pipe: Pipeline, sentence: str) -> Tensor:
    """The row that takes what no word asks for, `[1, E]`: the sentence's `<SoT>`, or its `<EoT>` where there is none
    (T5).
    """
    found = attribute_sentence(pipe, sentence)
    row = next((i for i, label in enumerate(found.labels) if label in (SOT, EOT)), 0)
    return found.embedding[row : row + 1]


def encode_padded(pipe: Pipeline, prompt: str) -> Tensor:
    """The prompt as the pipeline itself encodes it for generation: `[77, E]` for CLIP, padding included.

    Padding that the pipeline masks takes no attention and is left out (T5 in PixArt, Gemma in Sana).
    Raises InputError for an empty prompt and for one that the pipeline would cut.
    """
    family = adapter_of(pipe)
    family.tokenize(prompt)
    with torch.no_grad():
        return family.encode_padded(prompt)


def token_strings(pipe: Pipeline, sentence: str) -> list[str]:
    """The tokens of a sentence as they will be labelled: "<SoT>", pieces of the text, "<EoT>"."""
    return list(adapter_of(pipe).tokenize(sentence).names)


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
        if has_weight(word):
            raise InputError(
                f"{word!r} has a weight, which is read literally here, as one more word: leave brackets and number out."
            )
    return words


def _is_content(letter: str) -> bool:
    """Letters, digits and pictographs (emoji are Unicode's "other symbols")."""
    return unicodedata.category(letter)[0] in "LN" or unicodedata.category(letter) == "So"


def _read(pipe: Pipeline, asked: Sequence[tuple[str, tuple[str, ...] | None]]) -> list[AttributionPrompt]:
    """An attribution prompt for each (text, words in it), all read in one go; None for the words: all of its tokens."""
    family = adapter_of(pipe)
    reading, question = family.reading, tuple(asked)
    known = recalled(family, question, reading)
    if known is not None:
        return known
    read = family.tokenize_all([text for text, _ in asked])
    found = [_labelled(family, tokens, words) for tokens, (_, words) in zip(read, asked, strict=True)]
    with torch.no_grad():
        embeddings = family.encode_all(read)
    pairs = zip(embeddings, found, strict=True)
    prompts = [AttributionPrompt(embedding, *labelled, reading) for embedding, labelled in pairs]
    remember(family, question, reading, read, prompts)
    return prompts


def _labelled(family: Adapter, tokens: Tokens, words: tuple[str, ...] | None) -> tuple[Any, Any, Any]:
    """Labels, groups and shares of an AttributionPrompt."""
    if words is None:
        return tokens.names, tuple((row,) for row in range(len(tokens.names))), None
    counted = [_positions(tokens, family.spelled(word)) for word in words]
    shares = tuple(tuple(one.values()) for one in counted)
    alike = all(max(one, default=0) - min(one, default=0) < 1e-9 for one in shares)
    return words, tuple(map(tuple, counted)), None if alike else shares


def _positions(tokens: Tokens, word: str) -> dict[int, float]:
    """The tokens of the content words of `word`, wherever it stands in the text, in order, with what each counts for.

    Every word counts alike, whatever the number of its tokens. All words are taken where none is a content word.
    """
    found = find_word(tokens.text, word, tokens.spans)
    if not found:
        raise InputError(f"{word!r} does not stand in the sentence {tokens.text[:80]!r}: use words of the sentence.")
    named = [piece for pieces in found for piece in pieces if any(map(_is_content, piece.text))]
    content = [piece for piece in named if piece.text not in FUNCTION_WORDS] or named
    counts: dict[int, float] = {}
    for piece in content:
        spans = enumerate(tokens.spans)
        own = [i for i, (start, end) in spans if end > start and start < piece.end and end > piece.start]
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


# ---------------------------------------------------------------------------------------------------- queries


@dataclass(frozen=True, eq=False)
class Query:
    """What is asked for, ready to be asked: words of a text, or a token, and how their maps are cut.

    labels: what gets a map. prompt: their attribution prompt; None for words that a method reads together (GoCA). tau,
    alpha: threshold (Eq. 9) and self-attention floor (Eq. 8), 0 to 1. branch: half of the guided batch that it belongs
    to. kind: whether it is asked for by words or by a token. mark: of the text, or of the token's own numbers, by which
    a run knows its questions again: an embedding that is computed differs in its last bits with the number of threads.
    """

    labels: tuple[str, ...]
    prompt: AttributionPrompt | None
    tau: float = 0.4
    alpha: float = 0.85
    branch: Branch = "conditional"
    kind: Literal["word", "token"] = "word"
    mark: str = ""

    @property
    def attribution(self) -> AttributionPrompt:
        """The prompt. Raises InputError where it has none."""
        if self.prompt is None:
            raise InputError(f"'{', '.join(self.labels)}' was not read as an attribution prompt of its own.")
        return self.prompt


def word_queries(pipe: Pipeline, words: Sequence[str], sentence: str = "", template: str = "{}") -> list[Query]:
    """Words, each in a prompt of its own; with a sentence, words found in it, or all of its tokens without words.

    Raises InputError as `attribute_words`, `attribute_sentence` and `words_in_sentence` do.
    """
    if sentence.strip():
        prompt = words_in_sentence(pipe, sentence, words) if words else attribute_sentence(pipe, sentence)
        return [Query(prompt.labels, prompt, mark=sentence)]
    prompts = attribute_words(pipe, words, template=template) if words else []
    return [Query(prompt.labels, prompt, mark=template.replace("{}", prompt.labels[0])) for prompt in prompts]


def token_query(pipe: Pipeline, token: Token) -> Query:
    """A token with the tau, alpha and half of the batch that its file names. Raises InputError as `token_prompt`
    does.
    """
    prompt = token_prompt(pipe, token)
    return Query(prompt.labels, prompt, token.tau, token.alpha, token.branch, "token")


def branch_of(tokens: Sequence[Token]) -> Branch:
    """The half of the guided batch to record for these tokens: the one that they were found on.

    Raises InputError for tokens of different halves, which no one recording serves.
    """
    branches: set[Branch] = {token.branch for token in tokens} or {"conditional"}
    if len(branches) > 1:
        raise InputError("These tokens were found on different halves of the guided batch; use them one at a time.")
    return branches.pop()


def halves_of(settings: SegmentSettings) -> Branch:
    """What to record of the guided batch so that all of this can be asked: a half, or "all" for both."""
    halves: set[Branch] = {token.branch for token in settings.tokens}
    if settings.words or settings.sentence.strip() or not halves:
        halves.add(cast(Branch, settings.branch or "conditional"))
    return halves.pop() if len(halves) == 1 else "all"


def token_prompt(pipe: Pipeline, token: Token) -> AttributionPrompt:
    """The token as an attribution prompt: one label a class, the background and the rivals without one.

    A token of one row gets this text encoder's `<SoT>` (T5: `</s>`) as its background row, as a softmax over one token
    is constant. Raises InputError for a token of another width; warns for one of another model.
    """
    token.validate()
    width = adapter_of(pipe).embed_dim
    if token.embedding.shape[1] != width:
        raise InputError(
            f"The token '{', '.join(token.names)}' is {token.embedding.shape[1]} wide and this model takes {width}; "
            f"it was made with {token.model or 'another model'}."
        )
    dtype = adapter_of(pipe).denoiser.dtype
    if float(token.embedding.abs().max()) > torch.finfo(dtype).max:
        kind = str(dtype).removeprefix("torch.")
        raise InputError(
            f"The token '{', '.join(token.names)}' holds numbers that {kind}, in which this model computes, does not "
            "know: load the model in float32, or make the token again with a larger proximity."
        )
    name = model_name(pipe)
    if name != UNNAMED and last_part(name) != last_part(token.model):
        warnings.warn(
            f"The token '{', '.join(token.names)}' was made with {token.model or 'an unnamed model'}, not with {name}: "
            "its maps may mean nothing here.",
            stacklevel=2,
        )
    embedding = token.embedding.to(pipe._execution_device)
    if len(embedding) == 1:
        start = background_embedding(pipe, "A photograph")
        embedding = torch.cat([start.to(embedding), embedding])
    groups = tuple((row,) for row in range(1, 1 + len(token.names)))
    return AttributionPrompt(embedding, token.names, groups)
