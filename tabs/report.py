"""An export as the page shows it, as HTML: how far it is, its pictures, what came of each class, what was left out, and
the list of exports that are kept.
"""

from __future__ import annotations

import html
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ovam_core.data.export import Estimate, Plan, Summary, duration
from ovam_core.data.prompts import Item, Skipped
from ovam_core.plot import VOC_PALETTE

from .exports import Export, address

SHOWN = 24  # pairs of image and label map
LISTED = 100  # rows of a table of what was left out
DOTS = 600  # of the plot
CHARS = 160  # of a prompt

NOTHING_YET = (
    '<p class="nothing">Images and label maps appear here as they are made; the data set is one zip at the end.</p>'
)


def size_text(nbytes: float) -> str:
    """ "12 kB", "3.4 MB", "1.2 GB"."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if nbytes >= size * 0.95:
            return f"{nbytes / size:,.1f} {unit}"
    return f"{max(1, round(nbytes / 1e3))} kB"


def counted(number: int, one: str, many: str = "") -> str:
    """ "1 image", "2 images"."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _short(text: str, most: int = CHARS) -> str:
    return html.escape(text if len(text) <= most else text[: most - 1] + "…")


# ------------------------------------------------------------------------------------------ before it begins


def forecast(planned: Plan, usual: Estimate | None, limit: float) -> str:
    """What an export would make: how many images, how large, how long.

    usual: measured on this server, None before its first export. limit: seconds that a run may last.
    """
    settings, left = planned.settings, planned.images - planned.done
    size = f"at most {size_text(planned.largest_bytes)}"
    time_left = "how long is known after the first export here"
    if usual is not None:
        size = f"about {size_text(usual.bytes)}, {size}"
        time_left = f"about {duration(usual.seconds)}" if left else "nothing to wait for"
    there = f" Made already: {planned.done:,}; Export goes on with the rest." if planned.done and left else ""
    there = " All are made already." if not left else there
    longer = ""
    if usual is not None and usual.seconds > limit:
        longer = f" One run lasts {duration(limit)} at most here; press Export again to go on."
    by_name = [name for name, by in planned.by.items() if by == "word"]
    asked = ""
    if settings.tokens is not None and by_name:
        asked = f" No token is here for {_short(', '.join(by_name))}: asked for by name."
    skipped = skipped_fold(planned.skipped)
    return (
        f'<p class="forecast"><b>{counted(planned.images, "image")}</b> of {settings.width} × {settings.height} px · '
        f"{size} · {time_left}.{there}{longer}{asked}</p>{skipped}"
    )


def refused(sentence: str) -> str:
    """Why an export cannot begin. sentence: HTML."""
    return f'<p class="refused">{sentence}</p>'


# ---------------------------------------------------------------------------------------------- while it runs


def bar(done: int, total: int, new: int, seconds: float, now: Item | None = None, stale: bool = False) -> str:
    """How far it is, how fast, how long still. now: what is being made. stale: whether what is shown is of
    another export.
    """
    rate = new / seconds if new and seconds > 0 else 0.0
    pace = f" · {_rate(rate)} · {duration((total - done) / rate)} left" if rate and done < total else ""
    lines = "" if now is None else f"<p>Now: “{_short(now.prompt)}”, seed {now.seed}</p>"
    if stale:
        lines += '<p class="stale">Still shown is the export before, until the first image of this one is there.</p>'
    return (
        f'<div class="bar"><progress max="{total}" value="{done}" aria-label="images done"></progress>'
        f"<span><b>{done:,}</b> of {total:,}{pace}</span></div>{lines}"
    )


def _rate(rate: float) -> str:
    return f"{rate * 60:.0f} a minute" if rate * 60 >= 1 else f"{rate * 3600:.0f} an hour"


# ---------------------------------------------------------------------------------------------- its pictures


def gallery(folder: Path, rows: Sequence[dict[str, Any]]) -> str:
    """The newest images beside their label maps. rows: of all images of the data set that are done, the newest last."""
    if not rows:
        return NOTHING_YET
    shown = rows[::-1][:SHOWN]
    more = len(rows) - len(shown)
    note = f'<p class="more">and {more:,} more in the data set</p>' if more else ""
    return f'<div class="pairs">{"".join(_pair(folder, row) for row in shown)}</div>{note}'


def _pair(folder: Path, row: dict[str, Any]) -> str:
    image, labels = (address(folder / row[name]) for name in ("file_name", "mask_file_name"))
    prompt = html.escape(row["prompt"])
    found = ", ".join(f"{name} {share:.0%}" for name, share in zip(row["classes"], row["coverages"], strict=True))
    found = html.escape(found)
    dropped = "" if row["kept"] else f'<span class="dropped">dropped: {html.escape(row["reason"])}</span>'
    chips = "".join(map(_chip, row["classes"], row["class_ids"], row["coverages"]))
    return f"""<figure><button type="button" aria-label="Enlarge: {prompt}, seed {row["seed"]}: {found}">
<img src="{image}" loading="lazy" alt="{prompt}"><img src="{labels}" loading="lazy" alt="Label map: {found}"></button>
<figcaption><span class="legend">{chips}{dropped}</span><span class="prompt">{prompt} · seed {row["seed"]}</span>
</figcaption></figure>"""


def _chip(name: str, label: int, share: float) -> str:
    return f'<span><i style="background:{color(label)}"></i>{html.escape(name)} {share:.0%}</span>'


def color(label: int) -> str:
    """Of a label in the label maps: VOC's, hex."""
    return "#" + bytes(VOC_PALETTE[3 * label : 3 * label + 3]).hex()


# ------------------------------------------------------------------------------------------- what came of it


def results(summary: Summary) -> str:
    """A plot and a table of the classes, and what was left out, with the reason."""
    rows = summary.rows or []
    if not rows:
        return "<p>No image was finished.</p>" + skipped_fold(summary.skipped)
    by_class = summary.by_class()
    return plot(rows, by_class) + table(by_class) + dropped_fold(rows) + skipped_fold(summary.skipped)


def table(by_class: Sequence[dict[str, Any]]) -> str:
    """Class, images, kept, dropped and why. by_class: of `Summary`."""
    heads = ("class", "images", "kept", "too small", "too large", "mean coverage")
    rows = [
        (html.escape(row["class"]), row["images"], row["kept"], row["small"], row["large"], _mean(row))
        for row in by_class
    ]
    return _table(heads, rows, "summary")


def _mean(row: dict[str, Any]) -> str:
    return f"{row['coverage']:.0%}" if row["kept"] else "–"


def _table(heads: Iterable[str], rows: Iterable[Iterable[Any]], kind: str) -> str:
    """Cells are HTML."""
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def plot(rows: Sequence[dict[str, Any]], by_class: Sequence[dict[str, Any]]) -> str:
    """A strip a class: a dot an image at the share of it that the class covers, a bar at the mean of those kept."""
    dots: dict[str, list[tuple[float, bool]]] = {row["class"]: [] for row in by_class}
    for row in rows:
        for name, share in zip(row["classes"], row["coverages"], strict=True):
            dots[name].append((share, row["kept"]))
    each = max(1, DOTS // len(dots))
    said = "; ".join(f"{row['class']}: {_spread(dots[row['class']], row)}" for row in by_class)
    strips = "".join(_strip(row, _thinned(dots[row["class"]], each)) for row in by_class)
    some = f" {each:,} of each class are drawn." if any(len(own) > each for own in dots.values()) else ""
    return f"""<figure class="coverage"><h3>Coverage by class</h3>
<div role="img" aria-label="Share of the image that each class covers. {html.escape(said)}.">{strips}
<p class="axis"><span></span><span><i>0</i><i>25</i><i>50</i><i>75</i><i>100%</i></span><span></span></p></div>
<figcaption>A dot an image, hollow where the filters drop it; the bar is the mean of those kept.{some}</figcaption>
</figure>"""


def _spread(dots: Sequence[tuple[float, bool]], row: dict[str, Any]) -> str:
    shares = [share for share, _ in dots]
    mean = f", mean {row['coverage']:.0%} of {row['kept']:,} kept" if row["kept"] else ", none kept"
    return f"{counted(len(shares), 'image')} from {min(shares):.0%} to {max(shares):.0%}{mean}"


def _thinned(dots: Sequence[tuple[float, bool]], most: int) -> list[tuple[float, bool]]:
    """At most so many, evenly chosen by their size."""
    dots = sorted(dots)
    count = min(len(dots), most)
    return [dots[number * len(dots) // count] for number in range(count)]


def _strip(row: dict[str, Any], dots: Sequence[tuple[float, bool]]) -> str:
    # Lengths in percent: the plot is as wide as it may be, and its dots stay round.
    circles = "".join(
        f'<circle cx="{share:.2%}" cy="{13 + 3 * (number % 3 - 1)}" r="3.5" class="{"kept" if kept else "lost"}"/>'
        for number, (share, kept) in enumerate(dots)
    )
    at = f"{row['coverage']:.2%}"
    mean = f'<line x1="{at}" x2="{at}" y1="3" y2="23" class="mean"/>' if row["kept"] else ""
    return f"""<p class="strip"><span>{html.escape(row["class"])}</span><svg height="26" aria-hidden="true">
<line x1="0" x2="100%" y1="13" y2="13" class="rule"/>{circles}{mean}</svg><span>{_mean(row)}</span></p>"""


def skipped_fold(skipped: Sequence[Skipped]) -> str:
    """The prompts that no image is made of, each with the reason; "" for none."""
    rows = [(html.escape(one.source), _short(one.prompt), html.escape(one.reason)) for one in skipped[:LISTED]]
    return _fold(
        counted(len(skipped), "prompt is", "prompts are") + " skipped", ("where", "prompt", "reason"), rows, skipped
    )


def dropped_fold(rows: Sequence[dict[str, Any]]) -> str:
    """The images that the filters drop, each with the reason; "" for none."""
    dropped = [row for row in rows if not row["kept"]]
    cells = [
        (html.escape(Path(row["file_name"]).stem), _short(row["prompt"]), html.escape(row["reason"]))
        for row in dropped[:LISTED]
    ]
    return _fold(
        counted(len(dropped), "image is", "images are") + " dropped by the filters",
        ("image", "prompt", "reason"),
        cells,
        dropped,
    )


def _fold(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], everything: Sequence[Any]) -> str:
    if not everything:
        return ""
    more = len(everything) - len(rows)
    note = f'<p class="more">and {more:,} more, listed in the data set</p>' if more else ""
    return f'<details class="left-out"><summary>{title}</summary>{_table(heads, rows, "reasons")}{note}</details>'


def download(export: Export) -> str:
    """A link to the zip, which says how large it is; "" where there is none."""
    try:
        size = export.zip.stat().st_size
    except OSError:
        return ""
    where = f'href="{address(export.zip)}" download="ovam-data-set.zip"'
    return f'<a class="take" {where}>Download zip · {size_text(size)}</a>'


# ------------------------------------------------------------------------------------------ those that are kept


def kept(exports: Sequence[Export], keep: float, visitor: str) -> str:
    """The list of a visitor's exports, unfinished ones first. keep: seconds that each waits. visitor: what the browser
    is to remember, to find them again.
    """
    return f'<div class="exports" data-visitor="{html.escape(visitor)}">{_listed(exports, keep)}</div>'


def _listed(exports: Sequence[Export], keep: float) -> str:
    if not exports:
        return ""
    groups = (
        ("Unfinished", [one for one in exports if not one.finished]),
        ("Finished", [one for one in exports if one.finished]),
    )
    lists = "".join(f"<h3>{title}</h3><ul>{''.join(map(_entry, members))}</ul>" for title, members in groups if members)
    until = f"Each waits {counted(round(keep / 3600), 'hour')} from its last use on, also when this page is reloaded."
    return f'{lists}<p class="until">{until}</p>'


def _entry(export: Export) -> str:
    when = f'<time data-at="{export.asked:.0f}">{time.strftime("%H:%M UTC", time.gmtime(export.asked))}</time>'
    classes = _short(", ".join(dict.fromkeys(name for item in export.work.items for name in item.classes)), 80)
    running = " · being made now" if export.flag is not None else ""
    facts = (
        f"{classes} · {export.done:,} of {counted(export.total, 'image')} · "
        f"{counted(export.settings.steps, 'step')} · {when}{running}"
    )
    title = _short(export.title, 90)
    resume = "" if export.finished or export.flag is not None else _button("resume", "Resume", export)
    opened = _button("open", "Open", export) if export.flag is None and export.done else ""
    progress = ""
    if not export.finished:
        progress = f'<progress max="{export.total}" value="{export.done}" aria-hidden="true"></progress>'
    taken = download(export) if export.finished else ""
    return f"""<li><p><b>{title}</b><span>{facts}</span>{progress}</p>
<p class="acts">{resume}{opened}{taken}{_button("remove", "Remove", export)}</p></li>"""


def _button(act: str, text: str, export: Export) -> str:
    label = f"{text} the export of {html.escape(export.title[:80])}"
    return f'<button type="button" data-act="{act}" data-export="{export.key}" aria-label="{label}">{text}</button>'
