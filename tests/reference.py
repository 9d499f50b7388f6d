"""Plain forms of the paper's equations, to check ovam_core against: no cleverness, no code shared with it.

`Spy` listens to whole attention modules (not to `to_q`), and the probabilities are made anew from each layer's own
`to_q` and `to_k`.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from ovam_core.methods import Cut
from ovam_core.query import Query
from ovam_core.settings import SegmentSettings


def generate(pipe, prompt="a photograph of the cat", steps=3, guidance=4.0, height=32, width=48, seed=0, **more):
    """Float images `[images, 3, height, width]` of a short run."""
    return pipe(
        prompt,
        num_inference_steps=steps,
        guidance_scale=guidance,
        height=height,
        width=width,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
        **more,
    ).images


class Spy:
    """What each attention module of the down and up blocks was given: name -> [(pixels, text or None)] a step.

    middle: and of the middle block.
    """

    def __init__(self, pipe, kind="attn2", middle=False):
        self.modules = {
            name: module
            for name, module in pipe.unet.named_modules()
            if name.endswith(kind) and name.startswith(("down_blocks", "up_blocks", "mid_block")[: 2 + middle])
        }
        self.seen = {name: [] for name in self.modules}

    def __enter__(self):
        def listen(name):
            def hook(module, args, kwargs):
                self.seen[name].append((args[0].detach().clone(), kwargs.get("encoder_hidden_states")))

            return hook

        self.handles = [x.register_forward_pre_hook(listen(name), with_kwargs=True) for name, x in self.modules.items()]
        return self

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()


@torch.no_grad()
def probabilities(module, pixels, text):
    """Eq. 3 for one item of the batch: `[heads, n, tokens]`. pixels `[n, C]`, text `[tokens, E]`."""
    q = module.to_q(pixels).float()
    k = module.to_k(text).float()
    d = q.shape[-1] // module.heads
    out = []
    for h in range(module.heads):
        part = slice(h * d, (h + 1) * d)
        out.append(torch.softmax(q[:, part] @ k[:, part].T / d**0.5, dim=-1))
    return torch.stack(out)


def triple_loop(spy, item, grids, size, embedding=None, steps=None, names=None):
    """Eq. 5 over layers, steps and heads, each map resized on its own, divided by their number.

    item: which entry of the UNet's batch; grids: n -> (height, width); embedding None: the text the layer was given.
    """
    total, count = 0, 0
    for name, calls in spy.seen.items():
        if names is not None and name not in names:
            continue
        for step, (pixels, text) in enumerate(calls):
            if steps is not None and step not in steps:
                continue
            tokens = text[item] if embedding is None else embedding
            for attention in probabilities(spy.modules[name], pixels[item], tokens):
                grid = attention.T.reshape(1, -1, *grids[attention.shape[0]])
                total = total + F.interpolate(grid, size=size, mode="bilinear", align_corners=False)[0]
                count += 1
    return total / count


def assert_refused(said: str, part: str) -> None:
    """What a command writes to stderr when it refuses: one sentence, not too long, that holds `part`."""
    assert said.startswith("Error: "), said
    assert "\n" not in said, said
    assert len(said) < 600, said
    assert part in said, said


def found_by(method, pipe, picture, words=(), tokens=(), background=None):
    """What a method finds at its published thresholds: labels, maps [labels, h, w] and masks [labels, H, W].

    tokens: attribution prompts. background: the nouns that GoCA compares with, None for the caption's.
    """
    method = method if background is None else replace(method, background=tuple(background))
    queries = method.words(pipe, SegmentSettings(words=tuple(words))) if words else []
    queries += [Query(prompt.labels, prompt, kind="token") for prompt in tokens]
    queries = [method.cut(query, Cut(), None) for query in queries]
    with torch.no_grad():
        maps = method.heatmaps(pipe, picture, queries)
        masks = method.masks(picture, maps, queries)
    labels = tuple(label for query in queries for label in query.labels)
    return SimpleNamespace(labels=labels, maps=maps[: len(labels)], masks=masks)
