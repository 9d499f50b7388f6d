"""Open-vocabulary attention maps: record a diffusion pipeline once, ask for the heatmap of any word afterwards.

from ovam_core import OVAM

ovam = OVAM.from_pretrained("emoji-voc")
picture = ovam.generate("A photograph of a cat and a car on grass", seed=1)
found = ovam.segment(picture, ["cat", "car", "animal"])
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "2.3.0"

if TYPE_CHECKING:
    from ovam_core.attention.heatmap import heatmaps
    from ovam_core.attention.recording import Recording
    from ovam_core.errors import InputError
    from ovam_core.hooks.recorder import record
    from ovam_core.methods import METHODS, Method
    from ovam_core.optimization import optimize
    from ovam_core.ovam import OVAM
    from ovam_core.picture import Picture, Segmentation
    from ovam_core.tokens import Token

__all__ = [
    "METHODS",
    "OVAM",
    "InputError",
    "Method",
    "Picture",
    "Recording",
    "Segmentation",
    "Token",
    "__version__",
    "heatmaps",
    "optimize",
    "record",
]

# Imported when they are first used: `ovam --help` and the page's first paint wait for no torch.
_HOMES = {
    "METHODS": "methods",
    "OVAM": "ovam",
    "InputError": "errors",
    "Method": "methods",
    "Picture": "picture",
    "Recording": "attention.recording",
    "Segmentation": "picture",
    "Token": "tokens",
    "heatmaps": "attention.heatmap",
    "optimize": "optimization",
    "record": "hooks.recorder",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ovam_core' has no attribute '{name}'")
    return getattr(import_module(f"ovam_core.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
