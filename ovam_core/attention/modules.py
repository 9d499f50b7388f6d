"""The model's own modules, called after the run as they were in it: for keys of any words.

What a run sets for its own time (the scale of its LoRA layers) belongs to the recording; what is changed in the weights
themselves afterwards (a LoRA fused into them, others loaded over them) is noticed by `check_same`.
"""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovam_core.errors import InputError

# Weights of other dtypes, and those that a hook casts for each call, are stored in one and computed in another.
COMPUTED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What moving weights and rounding them may change in a key, as a share of its length; a bfloat16 alone errs by 0.004.
MAX_CHANGE = 0.01

# What a LoRA layer was set to, by layer.
LoraSettings = Mapping[nn.Module, dict[str, Any]]


def call_frozen(module: nn.Module, *inputs: Any, dtype: torch.dtype | None = None) -> Tensor:
    """`module(*inputs)` with no gradient for its weights; tensors in the dtype and on the device of the weights.

    The module may be elsewhere than the inputs (CPU offload) and in another dtype. dtype: what it computes in, for
    weights that are stored in another one (float8, packed); None leaves the inputs as they are there. Its own forward
    is called, with the hooks on it. Raises InputError for weights that are gone (on the device "meta").
    """
    if isinstance(module, nn.Linear) and is_projection(module, inputs[0].device):
        return F.linear(inputs[0].to(module.weight.dtype), module.weight.detach())
    own: Iterable[tuple[str, Tensor]] = module.named_parameters()
    parameters = dict(own)
    weights = parameters or dict(module.named_buffers())
    if not weights:
        return module(*inputs)
    first = next(iter(weights.values()))
    if first.is_meta and not any(hasattr(x, "_hf_hook") for x in module.modules()):
        raise InputError("The model's weights are gone (on the device 'meta'): load the model again.")
    computed = _is_computed_as_stored(module, parameters.values())
    taken = first.dtype if computed else dtype

    def brought(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = x.to(taken) if x.is_floating_point() and taken is not None else x
        return x if first.is_meta else x.to(first.device)  # accelerate's hooks bring weights and input together

    arguments = tuple(brought(x) for x in inputs)
    replaced = _replaced(weights, first.device)
    # A hook that casts weights back after the call would do it to those that are kept for the gradient, too.
    kept = nullcontext() if computed else torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda x: x)
    with kept if torch.is_grad_enabled() else nullcontext():
        return torch.func.functional_call(module, replaced, arguments) if replaced else module(*arguments)


def is_projection(module: Any, device: torch.device) -> bool:
    """Whether it is no more than a matrix on this device, which no one listens to: what most keys are made by."""
    if type(module) is not nn.Linear or module.bias is not None or "forward" in vars(module) or is_heard(module):
        return False
    weight = module.weight
    known = type(weight) is nn.Parameter and weight.dtype in COMPUTED and not weight.is_inference()
    return known and weight.device == device and not hasattr(module, "_diffusers_hook")


def _is_computed_as_stored(module: nn.Module, parameters: Collection[Tensor]) -> bool:
    """Whether the weights' dtype is the one that the module computes in: no hook casts them, none is packed."""
    cast = any(hasattr(x, "_diffusers_hook") for x in module.modules())
    return len(parameters) > 0 and not cast and all(x.dtype in COMPUTED for x in parameters)


def _replaced(weights: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Stand-ins for weights that cannot take part as they are.

    Those that would get a gradient; those of inference mode, which autograd does not take; and those on another device
    than the first, as a LoRA's are that was taken out of the model before it was moved.
    """
    graded = torch.is_grad_enabled()
    stand_ins = {}
    for name, weight in weights.items():
        if graded and weight.is_inference():
            stand_ins[name] = weight.detach().clone()
        elif graded and weight.requires_grad:
            stand_ins[name] = weight.detach()
        if weight.device != device and not weight.is_meta:
            stand_ins[name] = stand_ins.get(name, weight).to(device)
    return stand_ins


def lora_settings(model: nn.Module) -> LoraSettings:
    """What the LoRA layers among a model's modules are set to now; empty where it has none."""
    names = ("scaling", "_active_adapter", "merged_adapters", "_disable_adapters")
    layers = [x for x in model.modules() if isinstance(vars(x).get("scaling"), dict)]
    return {x: {name: copy.copy(vars(x)[name]) for name in names if name in vars(x)} for x in layers}


def as_set(module: nn.Module, settings: LoraSettings) -> nn.Module:
    """The module as it was when `lora_settings` were taken: itself where they are not of it.

    Else one like it that holds the same weights and has settings of its own, whatever is set on the first, or taken out
    of it, later.
    """
    return _twin(module, settings) if any(x in settings for x in module.modules()) else module


def _twin(module: nn.Module, settings: LoraSettings) -> nn.Module:
    twin = type(module).__new__(type(module))
    own = {name: copy.copy(x) if isinstance(x, dict | list | set) else x for name, x in vars(module).items()}
    twin.__dict__ = own | settings.get(module, {}) | {"training": False}
    twin._modules = {name: None if x is None else _twin(x, settings) for name, x in module._modules.items()}
    return twin


def is_heard(module: nn.Module) -> bool:
    """Whether someone listens to a module or one within it."""
    return any(x._forward_hooks or x._forward_pre_hooks for x in module.modules())


def without_hooks(module: nn.Module) -> nn.Module:
    """One like it, of the same weights, that no one listens to; what offloads and casts weights goes on."""
    twin = _twin(module, {})
    for one in twin.modules():
        one._forward_hooks, one._forward_pre_hooks = OrderedDict(), OrderedDict()
    return twin


class Unbound(nn.Module):
    """Stands for a module of the model in a recording that is detached from it.

    lora: what the LoRA layers within that module were set to in the run, by their names there.
    """

    def __init__(self, lora: Mapping[str, dict[str, Any]]):
        super().__init__()
        self.lora = dict(lora)

    def forward(self, *_inputs: Any) -> Tensor:
        raise InputError("This recording is detached from its model: bind it to the model first, with `OVAM.bind`.")


def unbound(module: nn.Module) -> Unbound:
    """What stands for a module of the model where that is not at hand."""
    if isinstance(module, Unbound):
        return module
    settings = lora_settings(module)
    return Unbound({name: settings[x] for name, x in module.named_modules() if x in settings})


def as_recorded(module: nn.Module, stand_in: nn.Module) -> nn.Module:
    """The module of a model, set as the one that `stand_in` stands for. Raises InputError where it lacks its LoRA."""
    wanted = stand_in.lora if isinstance(stand_in, Unbound) else {}
    there = {name: x for name, x in module.named_modules() if isinstance(vars(x).get("scaling"), dict)}
    if not wanted.keys() <= there.keys() or not all(_has_adapters(there[name], x) for name, x in wanted.items()):
        raise InputError("The recording was made with a LoRA that is not loaded here: load it as it was in the run.")
    return as_set(module, {there[name]: settings for name, settings in wanted.items()})


def _has_adapters(layer: Any, settings: dict[str, Any]) -> bool:
    """Whether what was in use in a LoRA layer is there, and how much of it was."""
    there, wanted = vars(layer)["scaling"].keys(), settings["scaling"].keys()
    active = settings.get("_active_adapter", [])
    return wanted <= there and not (there - wanted) & ({active} if isinstance(active, str) else set(active))


@functools.lru_cache(maxsize=64)
def probe(*shape: int, seed: int = 0) -> Tensor:
    """Numbers to try a module with, the same ones each time: float32 of this shape, not to be changed."""
    with torch.inference_mode(False):
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check_same(tried: Iterable[tuple[str, Tensor, Tensor]]) -> None:
    """Raises InputError where what a layer makes of a probe is not what it made of it at the end of the run.

    tried: name of the layer, then and now. Waits for the device once.
    """
    found = [(name, then.detach(), now.detach()) for name, then, now in tried]
    if not found:
        return
    names, before, after = zip(*found, strict=True)
    starts = np.cumsum([0, *(x.numel() for x in before[:-1])])
    then, now = (
        torch.cat([x.to(one[0].device).float().flatten() for x in one]).cpu().double().numpy()
        for one in (before, after)
    )
    lengths = np.sqrt(np.add.reduceat(then**2, starts)).clip(1e-30)
    changes = np.sqrt(np.add.reduceat((now - then) ** 2, starts)) / lengths
    for name, change, *pair in zip(names, changes, before, after, strict=True):
        if change > max(MAX_CHANGE, *(4 * torch.finfo(x.dtype).eps for x in pair)):
            raise InputError(
                f"The weights of the layer {name} are no longer those that made this picture (a LoRA was fused or "
                "unfused, or others were loaded over them): put them back, or make the picture again."
            )
