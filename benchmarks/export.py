"""Images a minute of `export`, and the share of its time that is not diffusion; with one process and with several.

    python -m benchmarks.export [--images 8] [--processes 1 2] [--model MODEL] [--steps N] [--threads N]

The share is 1 - (seconds inside the pipeline) / (seconds of the whole export), in the slowest process: maps, masks,
dense CRF, encoding, writing, the metadata, the start of the workers. Loading the model counts in neither. Prints a
Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

from ovam_core import OVAM
from ovam_core.data import VOC_CLASSES, ExportSettings, export_dataset, template_prompts, work_list
from ovam_core.data.runs import cores, launched

HEADER = """| processes | threads | images | seconds | images/min | diffusion s | maps s | waiting s | not diffusion |
|---|---|---|---|---|---|---|---|---|"""


def export_share(options: argparse.Namespace, folder: Path) -> None:
    """This process's share of an export into `folder`/out; its times go to `folder`/<rank>.json."""
    process, device = launched(None)
    ovam = OVAM.from_pretrained(options.model, device)
    settings = ExportSettings.for_model(
        ovam, steps=options.steps, threads=options.threads, batch_size=options.batch_size
    )
    prompts = template_prompts("A photograph of a {}", VOC_CLASSES)
    each = -(-options.images // len(prompts))
    work = work_list(prompts, VOC_CLASSES, each, limit=-(-options.images // each))
    summary = export_dataset(ovam, work, settings, folder / "out", process=process)
    times = {**vars(summary.timings), "made": summary.made, "threads": settings.threads}
    (folder / f"{process.rank}.json").write_text(json.dumps(times))


def export_times(options: argparse.Namespace, processes: int) -> list[dict[str, Any]]:
    """The times of each process of an export. Raises what any of them raised."""
    if not torch.cuda.is_available():
        threads = options.threads or max(1, cores() // processes)
        options = argparse.Namespace(**{**vars(options), "threads": threads})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_process, (processes, port, options, Path(folder)), nprocs=processes)
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(processes)]


def _process(rank: int, processes: int, port: int, options: argparse.Namespace, folder: Path) -> None:
    """What a process of `accelerate launch` does: its place stands in the environment."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        export_share(options, folder)


def row(processes: int, times: Sequence[dict[str, Any]]) -> str:
    """The line of the table."""
    slowest = max(times, key=lambda process: process["total"])
    made, total = sum(process["made"] for process in times), slowest["total"]
    share = max(1 - process["generation"] / process["total"] for process in times if process["made"])
    cells = (
        processes,
        slowest["threads"] or "-",
        made,
        f"{total:.1f}",
        f"{60 * made / total:.1f}",
        f"{slowest['generation']:.1f}",
        f"{slowest['maps']:.2f}",
        f"{slowest['waiting']:.2f}",
        f"{share:.1%}",
    )
    return f"| {' | '.join(map(str, cells))} |"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.export", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--model")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--threads", type=int, help="CPU threads a process (all cores over the processes)")
    parser.add_argument("--batch-size", type=int)
    options = parser.parse_args(arguments)
    print(HEADER)
    for processes in options.processes:
        print(row(processes, export_times(options, processes)), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
