"""What a pipeline's run is guided by, and which calls of its denoiser are its steps: heard while it runs."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ovam_core.errors import InputError

if TYPE_CHECKING:
    from ovam_core.models.adapter import Pipeline


class Listener:
    """What the recorder hears of a run beside the denoiser's own calls."""

    def __init__(self, pipe: Pipeline):
        self._pipe = pipe
        self._hooks: list[_MethodHook] = []

    @property
    def guided(self) -> bool:
        """Whether the batch is [negative, positive]."""
        return self._pipe.do_classifier_free_guidance

    def counts(self, _arguments: dict[str, Any]) -> bool:
        """Whether a call of the denoiser with these keyword arguments is a step of the run, and no pass beside it."""
        return True

    def remove(self) -> None:
        """Takes back all that was put on the pipeline."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


class BinListener(Listener):
    """Refuses a size that the pipeline would replace by a near one and crop: maps would not fit the image."""

    def __init__(self, pipe: Pipeline):
        super().__init__(pipe)
        self._hooks.append(_MethodHook(pipe.image_processor, "classify_height_width_bin", self._on_bin))

    def _on_bin(self, method: Callable, arguments: dict[str, Any]) -> None:
        height, width = arguments["height"], arguments["width"]
        drawn_height, drawn_width = method(**arguments)
        if (drawn_height, drawn_width) != (height, width):
            raise InputError(
                f"The pipeline would draw {drawn_width}x{drawn_height} and crop it to {width}x{height}, and the "
                "maps would not fit the image: add use_resolution_binning=False."
            )


class EncodeListener(BinListener):
    """For pipelines that do not keep whether they guide: they say it where they encode the prompt."""

    def __init__(self, pipe: Pipeline):
        super().__init__(pipe)
        self._guided: bool | None = None
        self._hooks.append(_MethodHook(pipe, "encode_prompt", self._on_encode))

    def _on_encode(self, _method: Callable, arguments: dict[str, Any]) -> None:
        self._guided = bool(arguments["do_classifier_free_guidance"])

    @property
    def guided(self) -> bool:
        if self._guided is None:
            raise InputError("Nothing says whether this run is guided: call the pipeline, or record with branch='all'.")
        return self._guided


class SkipListener(Listener):
    """Stable Diffusion 3.5's skip-layer guidance makes a pass beside the guided batch, which is no step."""

    def counts(self, arguments: dict[str, Any]) -> bool:
        return arguments.get("skip_layers") is None


class PassListener(Listener):
    """For models that have guidance as an input; a true negative prompt has passes of its own, which do not count."""

    def __init__(self, pipe: Pipeline):
        super().__init__(pipe)
        self._pass = ""
        self._hooks.append(_MethodHook(pipe.transformer, "cache_context", self._on_pass))

    @property
    def guided(self) -> bool:
        return False

    def _on_pass(self, _method: Callable, arguments: dict[str, Any]) -> None:
        self._pass = arguments["name"]

    def counts(self, _arguments: dict[str, Any]) -> bool:
        return self._pass != "uncond"


class _MethodHook:
    """Calls `before(method, arguments by name)` ahead of an object's method in this thread, until `remove`."""

    def __init__(self, owner: Any, name: str, before: Callable[[Callable, dict[str, Any]], None]):
        method, thread = getattr(owner, name), threading.get_ident()
        signature = inspect.signature(method)

        @functools.wraps(method)
        def hooked(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread:  # someone else's question about another recording
                return method(*args, **kwargs)
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            before(method, bound.arguments)
            return method(*args, **kwargs)

        self._owner, self._name = owner, name
        self._former = vars(owner).get(name)  # of the object itself, another hook perhaps
        setattr(owner, name, hooked)

    def remove(self) -> None:
        if self._former is None:
            delattr(self._owner, self._name)
        else:
            setattr(self._owner, self._name, self._former)
