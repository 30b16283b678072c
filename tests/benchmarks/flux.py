"""A pipeline of diffusers' Flux2, small enough for a test, and what PEFT's benchmark uses around it."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM


def write_flux(folder: Path, guided: bool) -> None:
    """A pipeline of the benchmark's classes, as small as these let it be."""
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )

    words = Tokenizer(WordLevel({"<end>": 0, "?": 1, "cat": 2, "dog": 3}, unk_token="?"))
    words.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>", unk_token="?")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "vocab_size": 4}
    Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(4, 4),
            layers_per_block=1,
            latent_channels=2,
            norm_num_groups=2,
        ),
        text_encoder=Qwen3ForCausalLM(Qwen3Config(**heads, **size, pad_token_id=0)),
        tokenizer=tokenizer,
        transformer=Flux2Transformer2DModel(
            in_channels=8,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=1,
            joint_attention_dim=24,
            timestep_guidance_channels=8,
            axes_dims_rope=(2, 2, 2, 2),
            guidance_embeds=guided,
        ),
    ).save_pretrained(folder)


def transforms() -> ModuleType:
    """What the harness uses of torchvision.transforms, which is bound to the build of torch."""

    def to_tensor(picture: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255

    def compose(steps: list[Any]) -> Any:
        def through(picture: Any) -> Any:
            for step in steps:
                picture = step(picture)
            return picture

        return through

    made: Any = ModuleType("torchvision.transforms")
    made.InterpolationMode = Image.Resampling
    made.Compose, made.ToTensor = compose, lambda: to_tensor
    made.Resize = lambda size, interpolation: lambda picture: picture.resize(size, interpolation)
    made.Normalize = lambda mean, std: lambda pixels: (pixels - mean[0]) / std[0]
    return made
