"""Tiny pipelines of diffusers' own classes with random weights: the maths is the real one, the pictures are noise."""

from __future__ import annotations

import functools
import inspect
import string

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

# They lose time to threads that wait for each other; and a process forked after threads have run (export_child.py)
# would wait for them for ever.
torch.set_num_threads(1)

WORDS = ("the", "cat", "car", "red", "bus", "of", "photograph", "a")
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


def make_small() -> StableDiffusionPipeline:
    """The tiny pipeline with 8 x 8 latents for an image of 64 pixels: a step takes milliseconds."""
    parts = make_pipe().components
    torch.manual_seed(1)
    parts["vae"] = AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
    ).eval()
    pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.ovam_name = "small"
    return pipe


# -------------------------------------------------------------------------------------------- cross-attention


def make_vae(levels: int = 2, **more) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        **more,
    ).eval()


def make_t5(width: int) -> tuple[T5Tokenizer, T5EncoderModel]:
    """Whole words, and letters for the rest."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [("▁" + word, -1.0) for word in WORDS]
    pieces += [(x, -5.0) for x in string.ascii_lowercase + string.digits + ".,!?'-"]
    config = T5Config(vocab_size=len(pieces), d_model=width, d_kv=8, d_ff=16, num_layers=2, num_heads=2, pad_token_id=0)
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512), T5EncoderModel(config).eval()


def make_clip(tokenizer, width: int, kind=CLIPTextModel):
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        projection_dim=width,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return kind(config).eval()


def make_sdxl(layers: int = 1, depths: tuple[int, ...] = (1, 1, 2)):
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16, 32),
        layers_per_block=layers,
        norm_num_groups=8,
        cross_attention_dim=32 + 24,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 2, 4),
        transformer_layers_per_block=depths,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 24,
    )
    first, second = make_tokenizer(), make_tokenizer()
    second.pad_token = "!"  # as in the published model: the two encoders see different padding
    return StableDiffusionXLPipeline(
        vae=make_vae(),
        text_encoder=make_clip(first, 32),
        text_encoder_2=make_clip(second, 24, CLIPTextModelWithProjection),
        tokenizer=first,
        tokenizer_2=second,
        unet=unet.eval(),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        add_watermarker=False,
    )


def make_sd15() -> StableDiffusionPipeline:
    """Four levels, attention in three of them and in the middle."""
    parts = make_pipe().components
    parts["unet"] = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=2,
        norm_num_groups=4,
        cross_attention_dim=EMBED,
        attention_head_dim=2,
    ).eval()
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)


def make_pixart(kind, layers: int = 2):
    tokenizer, encoder = make_t5(24)
    transformer = PixArtTransformer2DModel(
        sample_size=32,
        num_layers=layers,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=24,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=24,
    )
    scheduler = DDIMScheduler(clip_sample=False)
    return kind(tokenizer, encoder, make_vae(), transformer.eval(), scheduler)


def make_sana(qk_norm: str | None, timestep_scale: float):
    letters = string.ascii_letters + string.digits + "▁.,!?'\"-:;()>\n"
    vocab = {x: i for i, x in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *letters])}
    merges = []
    for word in WORDS:
        left = "▁"
        for letter in word:
            merges.append((left, letter))
            left += letter
            vocab.setdefault(left, len(vocab))
    tokenizer = GemmaTokenizer(vocab=vocab, merges=list(dict.fromkeys(merges)), add_bos_token=True)
    config = Gemma2Config(
        vocab_size=len(vocab),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=4096,
    )
    transformer = SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=4,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=16,
        qk_norm=qk_norm,
        timestep_scale=timestep_scale,
    )
    blocks = 3
    vae = AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock",) * blocks,
        decoder_block_types=("ResBlock",) * blocks,
        encoder_block_out_channels=(8,) * blocks,
        decoder_block_out_channels=(8,) * blocks,
        encoder_qkv_multiscales=((),) * blocks,
        decoder_qkv_multiscales=((),) * blocks,
        encoder_layers_per_block=(1,) * blocks,
        decoder_layers_per_block=(1,) * blocks,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return SanaPipeline(tokenizer, Gemma2Model(config).eval(), vae.eval(), transformer.eval(), scheduler)


def make_hunyuan(layers: int = 4):
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    pieces += [mark + x for x in string.ascii_lowercase for mark in ("", "##") if mark + x not in pieces]
    bert = BertConfig(
        vocab_size=len(pieces),
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
    )
    tokenizer_2, t5 = make_t5(16)
    transformer = HunyuanDiT2DModel(
        sample_size=16,
        num_layers=layers,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        hidden_size=24,
        in_channels=4,
        cross_attention_dim=24,
        cross_attention_dim_t5=16,
        pooled_projection_dim=16,
        use_style_cond_and_image_meta_size=False,
    )
    return HunyuanDiTPipeline(
        vae=make_vae(4),
        text_encoder=BertModel(bert).eval(),
        tokenizer=BertTokenizer(vocab={x: i for i, x in enumerate(pieces)}),
        transformer=transformer.eval(),
        scheduler=DDIMScheduler(clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=t5,
        tokenizer_2=tokenizer_2,
    )


def make_pixart_1024():
    """PixArt-Alpha of 1024 pixels is told the image's size and shape; here the model of that kind draws small ones."""
    pipe = make_pixart(PixArtAlphaPipeline)
    pipe.transformer = PixArtTransformer2DModel.from_config(pipe.transformer.config, sample_size=128).eval()
    return pipe


def make_sdxl_without_zeros():
    pipe = make_sdxl()
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    return pipe


# -------------------------------------------------------------------------------------------- joint attention


def make_sd3(qk_norm=None, dual=(), with_t5=True):
    transformer = SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=72,
        caption_projection_dim=16,
        pooled_projection_dim=32 + 24,
        pos_embed_max_size=48,
        dual_attention_layers=dual,
        qk_norm=qk_norm,
    )
    first, second = make_tokenizer(), make_tokenizer()
    second.pad_token = "!"
    tokenizer, t5 = make_t5(72) if with_t5 else (None, None)
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=make_vae(shift_factor=0.1),
        text_encoder=make_clip(first, 32, CLIPTextModelWithProjection),
        tokenizer=first,
        text_encoder_2=make_clip(second, 24, CLIPTextModelWithProjection),
        tokenizer_2=second,
        text_encoder_3=t5,
        tokenizer_3=tokenizer,
    )


class ShortFlux(FluxPipeline):
    """Flux that pads prompts to 32 tokens: of its 512 most would be padding."""

    @functools.wraps(FluxPipeline.__call__)
    def __call__(self, *args, **more):
        return super().__call__(*args, **{"max_sequence_length": 32} | more)

    __call__.__signature__ = inspect.signature(FluxPipeline.__call__).replace(
        parameters=[
            x.replace(default=32) if x.name == "max_sequence_length" else x
            for x in inspect.signature(FluxPipeline.__call__).parameters.values()
        ]
    )


def make_flux(guidance_embeds, layers: int = 3, singles: int = 1, kind=FluxPipeline):
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=layers,
        num_single_layers=singles,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=32,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(2, 2, 4),
    )
    clip, (tokenizer, t5) = make_tokenizer(), make_t5(24)
    return kind(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=make_vae(shift_factor=0.1),
        text_encoder=make_clip(clip, 32),
        tokenizer=clip,
        text_encoder_2=t5,
        tokenizer_2=tokenizer,
        transformer=transformer.eval(),
    )


# As Mistral's: a start token, the system message, and the prompt within an instruction.
TEMPLATE = """{{ bos_token }}{% for m in messages %}\
{% if m['role'] == 'system' %}[SYS]{{ m['content'][0]['text'] }}[/SYS]\
{% else %}[INST]{{ m['content'][0]['text'] }}[/INST]{% endif %}{% endfor %}"""


def make_mistral(width: int):
    """A byte-level tokenizer that knows a few whole words, and a language model deep enough for the pipeline."""
    marks = ["<pad>", "<s>", "</s>", "[SYS]", "[/SYS]", "[INST]", "[/INST]"]
    vocab = {x: i for i, x in enumerate([*marks, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    merges = []
    for word in WORDS:
        for left in ("Ġ", ""):
            for letter in word:
                if left:
                    merges.append((left, letter))
                left += letter
                vocab.setdefault(left, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(dict.fromkeys(merges))))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(marks)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=TEMPLATE,
        padding_side="left",
        model_max_length=512,
    )
    text = MistralConfig(
        vocab_size=len(vocab),
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=31,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=1024,
    )
    vision = PixtralVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=16, patch_size=8
    )
    config = Mistral3Config(text_config=text, vision_config=vision, image_token_index=len(vocab) - 1)
    return fast, Mistral3ForConditionalGeneration(config).eval()


def make_flux2():
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=3,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=3 * 16,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
    )
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )
    tokenizer, mistral = make_mistral(16)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return Flux2Pipeline(scheduler, vae.eval(), mistral, tokenizer, transformer.eval())


# ---------------------------------------------------------------------------------------------------- by name

CROSS = {
    "sd": make_pipe,
    "sdxl": make_sdxl,
    "pixart-alpha": lambda: make_pixart(PixArtAlphaPipeline),
    "pixart-sigma": lambda: make_pixart(PixArtSigmaPipeline),
    "sana": lambda: make_sana(None, 1.0),
    "sana-1.5": lambda: make_sana("rms_norm_across_heads", 0.001),
    "hunyuan": make_hunyuan,
}

JOINT = {
    "sd3": make_sd3,
    "sd3.5": lambda: make_sd3("rms_norm", (0, 1)),
    "sd3-without-t5": lambda: make_sd3(with_t5=False),
    "flux-dev": lambda: make_flux(True),
    "flux-schnell": lambda: make_flux(False),
    "flux-2": make_flux2,
}


def loud(pipe):
    """With self-attention that looks at few pixels: five products with an even one leave nothing to compare."""
    for name, weight in pipe.transformer.named_parameters():
        if name.endswith(("attn1.to_q.weight", "attn1.to_k.weight")):
            weight.data *= 6
    return pipe


BUILDS = {  # the published models' own numbers of levels and blocks; and one with several single-stream blocks
    "sd-1.5": make_sd15,
    "sdxl-1.0": lambda: make_sdxl(2, (1, 2, 10)),
    "pixart-28": lambda: loud(make_pixart(PixArtSigmaPipeline, 28)),
    "hunyuan-40": lambda: make_hunyuan(40),
    "flux-57": lambda: make_flux(True, 19, 38, ShortFlux),
    "flux-singles": lambda: make_flux(True, 2, 3, ShortFlux),
}


@functools.cache
def pipe_of(name: str):
    """A pipeline of CROSS, JOINT or BUILDS, shared by the tests: they leave it as it is."""
    torch.manual_seed(0)
    pipe = (CROSS | JOINT | BUILDS)[name]()
    model = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    # Random weights attend almost evenly and hardly change the text: louder ones make the maps differ among pixels.
    for key, weight in model.named_parameters():
        if key.endswith(("to_q.weight", "to_k.weight", "add_q_proj.weight", "add_k_proj.weight")):
            weight.data *= 4
        if "norm1_context" in key or "modulation_txt" in key:
            weight.data *= 4
        if any(part in key for part in ("norm_q", "norm_k", "norm_added")):
            weight.data = torch.randn_like(weight) + 1
    if name == "hunyuan":
        model.text_embedding_padding.data *= 2
    pipe.set_progress_bar_config(disable=True)
    return pipe
