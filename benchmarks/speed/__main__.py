"""The command line of the benchmark of speed: see the package."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.speed import __doc__ as about
from benchmarks.speed.common import Bench, Measurement, run
from benchmarks.speed.growth import growth_images, growth_sides, growth_steps, growth_tokens
from benchmarks.speed.heatmap import heatmap
from benchmarks.speed.many_prompts import many_prompts
from benchmarks.speed.page import page_start, page_words
from benchmarks.speed.question import dense_crf, epoch, layout, question
from benchmarks.speed.recording import recording_embedded, recording_sd15, recording_sdxl
from benchmarks.speed.self_attention import self_attention
from benchmarks.speed.sizes import CPU, CUDA, SMOKE
from benchmarks.speed.starting import starting_commands, starting_page
from benchmarks.speed.token import token

ROWS: dict[int, tuple[Measurement, ...]] = {
    1: (recording_embedded, recording_sd15, recording_sdxl),
    2: (heatmap,),
    3: (token,),
    4: (self_attention,),
    5: (page_start, starting_page, starting_commands, page_words),
    6: (growth_tokens, growth_steps, growth_sides, growth_images),
    7: (many_prompts,),
    8: (question, epoch, layout, dense_crf),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=about.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: only that it runs")
    parser.add_argument("--rows", type=int, nargs="+", choices=tuple(ROWS), default=tuple(ROWS))
    parser.add_argument("--out", type=Path, default=Path("outputs/speed"), help="for the table and its JSON")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; choose --device cpu.")
    sizes = SMOKE if options.smoke else CUDA if options.device == "cuda" else CPU
    texts: list[str] = []

    def report(text: str) -> None:
        texts.append(text)
        print(text, flush=True)

    rows = {row: ROWS[row] for row in options.rows}
    figures = run(Bench(torch.device(options.device), sizes), rows, report)
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"{'smoke-' if options.smoke else ''}{options.device}"
    (options.out / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    (options.out / f"{name}.md").write_text("\n".join(texts) + "\n", encoding="utf-8")
    return 1 if figures["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
