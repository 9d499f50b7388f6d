"""The parts of `emoji-voc`, untrained: ordinary diffusers and transformers classes, nothing of our own."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import AddedToken, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from training.recipes import Recipe

START, END = "<|startoftext|>", "<|endoftext|>"
SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def tokenizer(words: list[str], longest: int) -> CLIPTokenizer:
    """Whole words as single tokens, anything else as the bytes CLIP itself starts from; `longest` tokens a text.

    A short limit matters: each padding token takes its share of an untrained attention.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [256 + number for number in range(256 - len(printable))]
    characters = [chr(code) for code in (*printable, *hidden)]
    symbols = [*characters, *(character + "</w>" for character in characters), START, END]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps({symbol: number for number, symbol in enumerate(symbols)}))
        Path(folder, "merges.txt").write_text("#version: 0.2\n")
        made = CLIPTokenizer.from_pretrained(folder, model_max_length=longest)
    made.add_tokens([AddedToken(word, single_word=True, normalized=True) for word in words])
    return made


def text_encoder(words: CLIPTokenizer, width: int) -> CLIPTextModel:
    """CLIP with no layers: a word's embedding is its own, so the end token cannot carry the sentence."""
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=0,
        num_attention_heads=4,
        max_position_embeddings=words.model_max_length,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        projection_dim=width,
    )
    encoder = CLIPTextModel(config)
    with torch.no_grad():  # what a word is should count for more than where it stands
        for name, weight in encoder.named_parameters():
            if "position_embedding" in name:
                weight *= 0.2
    return encoder


def with_common_words(
    words: CLIPTokenizer, encoder: CLIPTextModel, further: list[str]
) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """The same with `further` words that were never trained, a token each: all at the mean of the words that were."""
    learned = words.added_tokens_decoder
    known = [token.content for number, token in sorted(learned.items()) if not token.special]
    larger = tokenizer([*known, *(word for word in further if word not in known)], words.model_max_length)
    grown = text_encoder(larger, encoder.config.hidden_size)
    state = encoder.state_dict()
    (name,) = (name for name in state if name.endswith("token_embedding.weight"))
    table = state[name]
    mean = table[[words.convert_tokens_to_ids(word) for word in known]].mean(0, keepdim=True)
    state[name] = torch.cat([table, mean.expand(len(larger) - len(table), -1)])
    grown.load_state_dict(state)
    return larger, grown


def autoencoder(recipe: Recipe) -> AutoencoderKL:
    widths = recipe.vae_widths
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=recipe.latent_channels,
        norm_num_groups=8,
        sample_size=recipe.size,
        mid_block_add_attention=False,
    )


def unet(recipe: Recipe) -> UNet2DConditionModel:
    """Cross-attention at every resolution, the middle block included.

    The finest `plain_levels` have none on the way down, and no self-attention on the way up: there it is three quarters
    of the cost, and tells least.
    """
    attending = len(recipe.unet_widths) - recipe.plain_levels
    return UNet2DConditionModel(
        sample_size=recipe.latent_size,
        in_channels=recipe.latent_channels,
        out_channels=recipe.latent_channels,
        down_block_types=("DownBlock2D",) * recipe.plain_levels + ("CrossAttnDownBlock2D",) * attending,
        up_block_types=("CrossAttnUpBlock2D",) * len(recipe.unet_widths),
        only_cross_attention=(True,) * recipe.plain_levels + (False,) * attending,
        block_out_channels=recipe.unet_widths,
        layers_per_block=recipe.unet_layers,
        time_embedding_dim=recipe.time_width,
        attention_head_dim=recipe.heads,
        cross_attention_dim=recipe.text_width,
        norm_num_groups=16,
    )


def train_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        **SCHEDULE, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )


def pipeline(vae, text_encoder, words, unet) -> StableDiffusionPipeline:
    """The ordinary pipeline that `save_pretrained` writes."""
    scheduler = DPMSolverMultistepScheduler(
        **SCHEDULE, prediction_type="v_prediction", timestep_spacing="trailing", steps_offset=1
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=words,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def parameters(module: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())
