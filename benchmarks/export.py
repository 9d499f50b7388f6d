"""Images a minute of `export`, and the share of its time that is not diffusion; with one process and with several.

    python benchmarks/export.py [--images 8] [--processes 1 2] [--model MODEL] [--steps N] [--threads N]

The share is 1 - (seconds inside the pipeline) / (seconds of the whole export), in the slowest process: maps, masks, dense
CRF, encoding, writing, the metadata, the start of the workers. Loading the model counts in neither. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--model")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--threads", type=int, help="CPU threads a process (all cores over the processes)")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--one", metavar="DIR", help=argparse.SUPPRESS)  # one of the processes, writing its times there
    return parser.parse_args()


def one(options: argparse.Namespace) -> None:
    """A share of the export; its times go to a file."""
    from ovam_core.data.export import ExportSettings, export
    from ovam_core.data.prompts import template_prompts, work_list
    from ovam_core.data.runs import launched
    from ovam_core.data.voc import VOC_CLASSES
    from ovam_core.models.load import load_pipeline

    process, device = launched(None)
    pipe = load_pipeline(options.model, device)
    settings = ExportSettings.for_model(
        pipe, steps=options.steps, threads=options.threads, batch_size=options.batch_size
    )
    prompts = template_prompts("A photograph of a {}", VOC_CLASSES)
    each = -(-options.images // len(prompts))
    work = work_list(prompts, VOC_CLASSES, each, limit=-(-options.images // each))
    summary = export(pipe, work, settings, Path(options.one) / "out", process=process)
    times = {**vars(summary.timings), "made": summary.made, "model": pipe.ovam_name, "threads": settings.threads}
    (Path(options.one) / f"{process.rank}.json").write_text(json.dumps(times))


def timed(options: argparse.Namespace, processes: int) -> list[dict]:
    """The times of each process of an export."""
    own = [str(Path(__file__).resolve())]
    for name in ("images", "model", "steps", "batch_size"):
        if getattr(options, name) is not None:
            own += ["--" + name.replace("_", "-"), str(getattr(options, name))]
    launch = [sys.executable]
    if processes > 1:
        launch += [
            "-m",
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            str(processes),
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "--main_process_port",
            "0",
        ]
    import torch

    if not torch.cuda.is_available():
        own += ["--threads", str(options.threads or max(1, (os.cpu_count() or 1) // processes))]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [*launch, *own, "--one", folder], cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(processes)]


def main() -> None:
    options = arguments()
    if options.one is not None:
        one(options)
        return
    print("| processes | threads | images | seconds | images/min | diffusion s | maps s | waiting s | not diffusion |")
    print("|---|---|---|---|---|---|---|---|---|")
    for processes in options.processes:
        times = timed(options, processes)
        slowest = max(times, key=lambda one: one["total"])
        made, total = sum(one["made"] for one in times), slowest["total"]
        share = max(1 - one["generation"] / one["total"] for one in times if one["made"])
        print(
            f"| {processes} | {slowest['threads'] or '-'} | {made} | {total:.1f} | {60 * made / total:.1f} | {slowest['generation']:.1f} "
            f"| {slowest['maps']:.2f} | {slowest['waiting']:.2f} | {share:.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
