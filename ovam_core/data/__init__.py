"""Prompts in, data sets out: `export_dataset` makes them, `evaluate_dataset` measures a method on one."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ovam_core.data.annotated import read_annotated
    from ovam_core.data.evaluate import EvaluateSettings, evaluate_dataset
    from ovam_core.data.export import ExportSettings, export_dataset
    from ovam_core.data.label_folder import read_set
    from ovam_core.data.label_sets import LABEL_SETS
    from ovam_core.data.prompts import read_prompts, template_prompts, work_list
    from ovam_core.data.voc import VOC_CLASSES
    from ovam_core.data.voc_folder import read_voc

__all__ = [
    "LABEL_SETS",
    "VOC_CLASSES",
    "EvaluateSettings",
    "ExportSettings",
    "evaluate_dataset",
    "export_dataset",
    "read_annotated",
    "read_prompts",
    "read_set",
    "read_voc",
    "template_prompts",
    "work_list",
]

_HOMES = {
    "LABEL_SETS": "label_sets",
    "VOC_CLASSES": "voc",
    "EvaluateSettings": "evaluate",
    "ExportSettings": "export",
    "evaluate_dataset": "evaluate",
    "export_dataset": "export",
    "read_annotated": "annotated",
    "read_prompts": "prompts",
    "read_set": "label_folder",
    "read_voc": "voc_folder",
    "template_prompts": "prompts",
    "work_list": "prompts",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ovam_core.data' has no attribute '{name}'")
    return getattr(import_module(f"ovam_core.data.{_HOMES[name]}"), name)
