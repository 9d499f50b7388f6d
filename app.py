"""The page: `python app.py`. Its first page answers at once; behind it the model is opened and the tabs laid out.

What takes time to import is imported within functions; the work is in ovam_core and tabs/.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from importlib import import_module
from typing import TYPE_CHECKING, Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before gradio is imported

from ovam_core.errors import HubUnreachable, InputError, Stopped
from tabs.scratch import ended_by_signals, own_folder
from tabs.sentences import OUR_FAULT
from tabs.starting import Starting, WithoutStubs, ended_at_once, wanted_host, wanted_port

if TYPE_CHECKING:
    import gradio as gr

    from ovam_core import OVAM
    from ovam_core.picture import Picture
    from tabs.session import Sessions

IMPORTED = ("torch", "transformers", "diffusers", "ovam_core.ovam")  # in this order: each needs those before
STEPS = ("Loading libraries", "Opening the model", "Making the first picture")
WITHOUT_PICTURE = "Putting the page together"  # in place of the last
DRAWING = 40.0  # seconds that the first picture may take in all: at that pace it goes on, else the page does without it
PROXY = "The page cannot start: this machine does not reach its own address; set NO_PROXY=localhost,127.0.0.1."


def build(ovam: OVAM, notice: str = "", sessions: Sessions | None = None) -> gr.Blocks:
    """The whole page around one model, as in tabs/frame.py."""
    from tabs import frame

    return frame.build(ovam, notice, sessions)


def launch(page: gr.Blocks, **options: Any) -> Any:
    """Starts a page of `build`, as in tabs/frame.py."""
    from tabs import frame

    return frame.launch(page, **options)


# ------------------------------------------------------------------------------------------- the start


def load_libraries(starting: Starting) -> None:
    """What takes longest to import; the rest comes with the page."""
    if "gradio" not in sys.modules:
        sys.meta_path.insert(0, WithoutStubs())
    for number, name in enumerate(IMPORTED):
        starting.part(number, len(IMPORTED), name.partition(".")[0])
        import_module(name)
    from ovam_core.models.load import quiet

    quiet()


def open_model(opening: Callable[[str], None] = lambda _: None) -> tuple[OVAM, str]:
    """The model, and a notice to show (or ""): the embedded one stands in for a hub that cannot be reached.

    opening: told the name of each. A model that OVAM_MODEL asks for and that does not exist is an error, not a reason
    to show another: InputError.
    """
    from ovam_core.models.load import usual_model
    from ovam_core.models.presets import EMBEDDED
    from tabs.zerogpu import open_ovam

    wanted = os.environ.get("OVAM_MODEL")
    try:
        opening(wanted or usual_model())
        return open_ovam(), ""
    except InputError as error:
        if wanted and not isinstance(error, HubUnreachable):
            raise
        opening(EMBEDDED)
        notice = f"{wanted or usual_model()} could not be loaded, so this page runs on {EMBEDDED}. {error}"
        return open_ovam(EMBEDDED), notice


def opens_with_picture(ovam: OVAM) -> bool:
    """Not with a model that takes minutes for one, nor where a device is lent to whoever asks, and to nobody before."""
    from ovam_core.models.presets import EMBEDDED
    from tabs.zerogpu import is_zerogpu

    return not is_zerogpu() and (ovam.name == EMBEDDED or ovam.device.type != "cpu")


def first_picture(ovam: OVAM, on_step: Callable[[int, int], None] | None = None) -> Picture:
    """The first example, for a page that opens with a result. on_step: as of `OVAM.generate`; may raise Stopped."""
    from tabs.examples import EXAMPLES

    example = EXAMPLES[0]
    return ovam.generate(example.prompt, seed=example.seed, callback_on_step_end=on_step)


@contextmanager
def drawing(ovam: OVAM, report: Callable[[int, int], None]) -> Iterator[Callable[[], Picture | None]]:
    """Draws the first picture beside what the block does; gives what waits for it. The page does without one that
    cannot be drawn, or not soon. report: as `on_step` of `OVAM.draw`.
    """
    made: list[Picture] = []
    over, begun = threading.Event(), time.monotonic()

    def on_step(done: int, total: int) -> None:
        too_slow = time.monotonic() - begun > DRAWING * (done + 3) / (total + 3)
        if over.is_set() or too_slow:
            raise Stopped(done, total)
        report(done, total)

    def draw() -> None:
        try:
            made.append(first_picture(ovam, on_step))
        except (InputError, Stopped):
            return
        except Exception:
            logging.getLogger("ovam").exception("The first picture could not be drawn.")

    def wait() -> Picture | None:
        worker.join()
        return made[0] if made else None

    worker = threading.Thread(target=draw, daemon=True)
    worker.start()
    try:
        yield wait
    finally:
        over.set()
        worker.join()


def serve(ovam: OVAM, notice: str, starting: Starting | None = None) -> None:
    """The page, until it is ended; then nothing of it stays on the disk. Raises InputError where it cannot start."""
    with ended_by_signals(), own_folder():
        with _first_picture_of(ovam, starting) as picture:
            from tabs.session import Sessions

            sessions = Sessions(ovam.name)
            page = build(ovam, notice, sessions)
            sessions.first = picture()
        try:
            _launch_on(starting, page)
        except OSError as error:
            if page.is_running:
                raise
            raise InputError(f"The page cannot start: {error}") from None
        except Exception as error:
            import httpx

            if not isinstance(error, httpx.TransportError) and "proxy settings" not in str(error):  # of Gradio's words
                raise
            raise InputError(PROXY) from None
        finally:
            sessions.close()
            page.close(verbose=False)


def _first_picture_of(ovam: OVAM, starting: Starting | None) -> AbstractContextManager[Callable[[], Picture | None]]:
    """`drawing`, or none; the starting page says which."""

    def report(done: int, total: int) -> None:
        if starting is not None:
            starting.part(done, total, f"{done} of {total} steps")

    draws = opens_with_picture(ovam)
    if starting is not None:
        starting.step(2, STEPS[2] if draws else WITHOUT_PICTURE)
    return drawing(ovam, report) if draws else nullcontext(lambda: None)


def _launch_on(starting: Starting | None, page: gr.Blocks) -> None:
    if starting is None:
        launch(page)
        return
    from tabs.frame import in_place_of

    with in_place_of(starting):
        launch(page, server_name=starting.name, server_port=starting.port)


def main() -> int:
    with ExitStack() as opened:
        starting = None
        try:
            with ended_at_once():
                starting = opened.enter_context(Starting(wanted_host(), wanted_port(), STEPS))
                print(f"* This page is starting on {starting.address}", flush=True)
                load_libraries(starting)
                ovam, notice = open_model(starting.open_model)
            serve(ovam, notice, starting)
        except InputError as error:
            sys.stderr.write(f"Error: {error}\n")
            if starting is not None:
                starting.fail(str(error))
            return 2
        except KeyboardInterrupt:
            return 130
        except Exception:
            if starting is not None:
                starting.fail(OUR_FAULT)
            raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
