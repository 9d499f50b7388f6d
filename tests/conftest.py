"""Tiny pipelines of diffusers' own classes with random weights: the maths is the real one, the pictures are noise."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import string

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

pytest_plugins = ["page"]  # the server and the browser

torch.set_num_threads(1)  # the tiny pipelines lose time to threads that wait for each other

EMBED = 32


def make_tokenizer(max_length: int = 77) -> CLIPTokenizer:
    """A CLIP tokenizer that knows a few whole words, and single letters for the rest."""
    vocab: dict[str, int] = {}
    for letter in string.ascii_lowercase + string.digits + ".,!?'-#":
        for piece in (letter, letter + "</w>"):
            vocab[piece] = len(vocab)
    merges = []
    for word in ("the", "cat", "car", "red", "bus", "of", "photograph"):
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces[:2] = ["".join(pieces[:2])]
            vocab.setdefault(pieces[0], len(vocab))
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=list(dict.fromkeys(merges)), model_max_length=max_length)


def make_pipe(shape: str = "sd1", text_layers: int = 2) -> StableDiffusionPipeline:
    """shape "sd1": convolutional projections, one number of heads; "sd2": linear projections, a list of them."""
    torch.manual_seed(0)
    sd2 = shape == "sd2"
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=EMBED,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=[2, 4, 8] if sd2 else 4,
        use_linear_projection=sd2,
        upcast_attention=sd2,
    )
    # Random weights attend almost evenly: louder queries make the maps differ from pixel to pixel.
    for name, module in unet.named_modules():
        if name.endswith(("to_q", "to_k")):
            module.weight.data *= 4
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )
    tokenizer = make_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=EMBED,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=text_layers,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    pipe = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def tiny():
    """The SD 1 shaped pipeline, shared: tests that change a pipeline make their own."""
    return make_pipe()


@pytest.fixture(scope="session")
def tiny_sd2():
    return make_pipe("sd2")


@pytest.fixture
def fresh():
    return make_pipe()
