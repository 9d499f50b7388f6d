"""The command line of the benchmark of segmenters: see the package."""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from benchmarks.downstream import __doc__ as about
from benchmarks.downstream import pictures
from benchmarks.downstream.arms import Sizes, arms_of, keep_sets, run, set_of
from benchmarks.downstream.claims import claims_of, measure, report
from benchmarks.downstream.pictures import Annotate, planned, rendered, synthetic
from benchmarks.downstream.segmenter import Training, build, parameters
from benchmarks.quality import fingerprint
from benchmarks.written import write
from ovam_core.data.runs import cores, digest
from ovam_core.io.files import write_atomically
from ovam_core.models.load import embedded_folder
from ovam_core.models.presets import EMBEDDED
from ovam_core.settings import LIBRARY
from ovam_core.tokens import folder_for, library
from training import annotator

SMALL = {
    "sizes": Sizes(few=4, twice=8, full=16, generated=12, test=6),
    "training": Training(steps=3, further=2, batch=4),
    "seeds": (0, 1),
    "denoising": 3,
}
WHOLE = {"sizes": Sizes(), "training": Training(), "seeds": (0, 1, 2), "denoising": None}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.downstream", description=about.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="tiny numbers: only that it runs")
    parser.add_argument("--generated", type=int, help="synthetic pictures before the filters (1000)")
    parser.add_argument("--tokens", default=LIBRARY, help="folder of the tokens (the model's own)")
    parser.add_argument("--processes", type=int, default=cores(), help="of one thread each; 0: all in this one")
    parser.add_argument(
        "--work", type=Path, default=Path("outputs/downstream"), help="for what a stopped run goes on from"
    )
    parser.add_argument("--out", type=Path, help="for downstream.md and downstream.json (benchmarks)")
    options = parser.parse_args(arguments)
    options.out = options.out or Path("outputs/downstream-small" if options.small else "benchmarks")
    return options


def annotator_weights() -> Path:
    return annotator.FOLDER / "diffusion_pytorch_model.safetensors"


@contextmanager
def processes(count: int) -> Iterator[Executor | None]:
    if not count:
        yield None
        return
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
        yield pool


def main(arguments: Sequence[str] | None = None, annotate: Annotate | None = None) -> int:
    """annotate: default the trained annotator."""
    options = parse(arguments)
    annotate = annotate or partial(annotator.annotate, annotator.load())
    choice = SMALL if options.small else WHOLE
    sizes, training, seeds = choice["sizes"], choice["training"], choice["seeds"]
    sizes = replace(sizes, generated=options.generated or sizes.generated)
    asked = {"sizes": asdict(sizes), "training": asdict(training), "denoising": choice["denoising"]}
    asked |= {"network": build(0).config.to_diff_dict(), "annotator": digest(annotator_weights().read_bytes())}
    tokens = library(EMBEDDED, folder_for(EMBEDDED) if options.tokens == LIBRARY else Path(options.tokens))
    folder = options.work / fingerprint(embedded_folder(), tokens, asked)[:16]
    folder.mkdir(parents=True, exist_ok=True)

    with processes(options.processes) as pool:
        plan = planned(sizes.generated, folder, choice["denoising"], options.tokens)
        facts = folder / "synthetic.json"
        if not facts.exists():
            sets, found = synthetic(plan, annotate, pool)
            sets |= {"real": rendered(pictures.REAL, sizes.full), "test": rendered(pictures.TEST, sizes.test)}
            keep_sets(sets, folder)
            write_atomically(facts, json.dumps(found).encode())
        arms = arms_of(sizes)
        counts = run(arms, seeds, folder, training, pool)

    network = build(0)
    figures = {
        "model": EMBEDDED,
        "command": "python -m benchmarks.downstream" + (" --small" if options.small else ""),
        "seeds": list(seeds),
        "training": asdict(training),
        "network": {"parameters": parameters(network), "side": pictures.SIDE},
        "synthetic": json.loads(facts.read_text()),
        "pictures": {name: len(set_of(name, folder, 0)) for name in ["test", *{arm.first for arm in arms}]},
        **measure(arms, counts, claims_of(sizes)),
    }
    write(options.out, "downstream", figures, report(figures))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
