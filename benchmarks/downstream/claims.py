"""mIoU of the arms, what one is over another, and what that says of the paper's claims.

mIoU is VOC's: IoU of 21 classes, background among them, from counts that are summed over the test pictures; of an arm
the mean over its seeds. Intervals are 95 % bootstraps over the test pictures, the same draws for every arm: they do not
hold what another training set or another seed would change, which is why each seed's figure stands beside.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.downstream.arms import Arm, Sizes
from ovam_core.data.metrics import iou, table
from ovam_core.data.voc import VOC_CLASSES

DRAWS = 2000

WHAT = """`{command}` made this page and the JSON beside it: Table 3 of the paper on the embedded model, `{model}`,
    with rendered scenes in the place of VOC's photographs."""
SPRITES = """**Generator and test scenes share their sprites.** The generator was trained on the very drawings that the
    test scenes are made of: it knows the objects of the test by heart, as no generator knows those of
    photographs. So what is gained here is an upper bound."""
READ = """"yes" and "no": the interval lies above or below zero. Each seed is another network and, of real pictures,
    another part."""
HOW = (
    """Segmenter: a SegFormer with random weights, {parameters:.1f} M parameters, {side} px. Every arm takes
    {steps} steps of {batch} pictures at a rate that falls from {rate:g}, on its first set, and {further} at
    a rate that falls from a tenth of that, on its second; an arm of one set takes both on that.""",
    """"Real": rendered scenes with exact masks, of seeds that no training of the generator saw. Test: {test}
    scenes of other seeds.""",
    """Synthetic: {generated} pictures of captions of such scenes, of one to three objects, made once and labelled
    by `ovam export` by names and by tokens; the annotator is the small network that was trained on exact
    masks. All four sets hold the same {both} pictures, which the filters keep in both exports: the masks
    alone differ.""",
    """Filters as in the paper: coverage of 5 to 95 %, and without the lowest 30 % of each class. The paper orders
    those by CLIP similarity. The embedded model has no CLIP image tower; here it is the presence score of
    the names that `ovam export --min-presence 0` writes, which the model's own attention gives and which
    asks no other model. What that does is measured below. A picture of several classes goes if it is among
    the lowest of any.""",
    """mIoU over 21 classes, background among them, as VOC has it; the mean of {seeds} seeds. Intervals: 95 %
    bootstrap over the test pictures, the same draws for all arms. They do not hold what another seed would
    change.""",
)
FILTER = """What the filter does: it keeps {names} pictures by names and {tokens} by tokens. Of the classes asked for
    the annotator finds {there:.0f} % on 1 % of the picture at least, and {there_of_kept:.0f} % of those of
    the pictures kept by names. A class that is there has a higher score than the same class where it is not
    in {pairs_won:.0f} % of such pairs (50 % is chance)."""


@dataclass(frozen=True)
class Claim:
    """That `better` is at least `worse`, by the names of the arms."""

    text: str
    better: str
    worse: str


def claims_of(sizes: Sizes) -> list[Claim]:
    few, twice, full = (f"real {count}" for count in (sizes.few, sizes.twice, sizes.full))
    claims = []
    for way in ("tokens", "names"):
        own = f"synthetic by {way}"
        claims += [
            Claim(
                f"halves the need for real pictures (by {way}, then {few}, over {twice})", f"{own}, then {few}", twice
            ),
            Claim(f"helps where real pictures are few (by {way}, then {few}, over {few})", f"{own}, then {few}", few),
            Claim(f"helps where they are many (by {way}, then {full}, over {full})", f"{own}, then {full}", full),
        ]
    return [
        *claims,
        Claim("tokens over names", "synthetic by tokens", "synthetic by names"),
        Claim(f"tokens over names, then {few}", f"synthetic by tokens, then {few}", f"synthetic by names, then {few}"),
        Claim("the annotator's masks over names", "synthetic, the annotator's masks (ceiling)", "synthetic by names"),
        Claim("names over masks of other pictures", "synthetic by names", "synthetic, masks of other pictures (floor)"),
    ]


def scores(counts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """mIoU [draws, seeds] of counts [seeds, N, classes, 3], picture n taken `weights[draw, n]` times."""
    seeds, pictures, *rest = counts.shape
    summed = np.einsum("dn,nx->dx", weights, counts.swapaxes(0, 1).reshape(pictures, -1).astype(float))
    return np.nanmean(iou(summed.reshape(len(weights), seeds, *rest)), axis=-1)


def once(counts: np.ndarray) -> np.ndarray:
    """mIoU [seeds] of the test pictures as they are."""
    return scores(counts, np.ones((1, counts.shape[1])))[0]


def drawn(pictures: int, seed: int = 0) -> np.ndarray:
    """How often each picture is in each draw: [draws, pictures]."""
    return np.random.default_rng(seed).multinomial(pictures, np.full(pictures, 1 / pictures), DRAWS).astype(float)


def percent(values: Any) -> list[float]:
    return [round(100 * float(value), 2) for value in np.atleast_1d(values)]


def figures_of(arm: Arm, counts: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    of_labels = zip(("background", *VOC_CLASSES), iou(counts.sum(axis=1)).T, strict=True)
    by_class = {name: percent(np.nanmean(own))[0] for name, own in of_labels if not np.isnan(own).all()}
    return {
        "name": arm.name,
        "first": arm.first,
        "then": arm.then,
        "miou": percent(once(counts).mean())[0],
        "interval": percent(np.quantile(scores(counts, weights).mean(axis=1), [0.025, 0.975])),
        "seeds": percent(once(counts)),
        "by_class": by_class,
    }


def verdict(claim: Claim, counts: Mapping[str, np.ndarray], weights: np.ndarray) -> dict[str, Any]:
    better, worse = counts[claim.better], counts[claim.worse]
    apart = (scores(better, weights) - scores(worse, weights)).mean(axis=1)
    low, high = percent(np.quantile(apart, [0.025, 0.975]))
    seeds = percent(once(better) - once(worse))
    agree = sum(value > 0 for value in seeds)
    says = "yes" if low > 0 else "no" if high < 0 else "cannot be told"
    return {
        "claim": claim.text,
        "better": claim.better,
        "worse": claim.worse,
        "gain": percent((once(better) - once(worse)).mean())[0],
        "interval": [low, high],
        "seeds": seeds,
        "verdict": f"{says}; {agree} of {len(seeds)} seeds gain",
    }


def measure(
    arms: Sequence[Arm], counts: Mapping[str, np.ndarray], claims: Sequence[Claim]
) -> dict[str, list[dict[str, Any]]]:
    """counts: by the arms' names, [seeds, N, 21, 3]."""
    weights = drawn(next(iter(counts.values())).shape[1])
    return {
        "arms": [figures_of(arm, counts[arm.name], weights) for arm in arms],
        "claims": [verdict(claim, counts, weights) for claim in claims],
    }


# ------------------------------------------------------------------------------------------------ the report


def report(figures: Mapping[str, Any]) -> str:
    """In Markdown."""
    synthetic, kept = figures["synthetic"], figures["synthetic"]["kept"]
    said = figures["training"] | {
        "parameters": figures["network"]["parameters"] / 1e6,
        "side": figures["network"]["side"],
    }
    said |= {"test": figures["pictures"]["test"], "generated": synthetic["generated"], "both": kept["both"]}
    said |= {"seeds": len(figures["seeds"])}
    rows = [
        [
            arm["name"],
            figures["pictures"][arm["first"]] if arm["first"] == arm["then"] else "",
            f"{arm['miou']:.1f}",
            "{:.1f} to {:.1f}".format(*arm["interval"]),
            ", ".join(f"{value:.1f}" for value in arm["seeds"]),
        ]
        for arm in figures["arms"]
    ]
    tested = [
        [
            claim["claim"],
            claim["verdict"],
            f"{claim['gain']:+.1f}",
            "{:+.1f} to {:+.1f}".format(*claim["interval"]),
            ", ".join(f"{value:+.1f}" for value in claim["seeds"]),
        ]
        for claim in figures["claims"]
    ]
    return f"""# Does it help? A segmenter trained on the export

{paragraph(WHAT.format(**figures))}

{paragraph(SPRITES)}

## The arms

{table(["trained on", "pictures", "mIoU", "95 %", "each seed"], rows)}

## The claims

{table(["claim", "holds?", "mIoU points", "95 %", "each seed"], tested)}

{paragraph(READ)}

## How

{chr(10).join(paragraph(line.format(**said), "* ") for line in HOW)}

{paragraph(FILTER.format(**kept, **synthetic["filter"]))}
"""


def paragraph(text: str, first: str = "") -> str:
    return textwrap.fill(
        first + " ".join(text.split()), 118, subsequent_indent=" " * len(first), break_long_words=False
    )
