"""Small models of all classes of transformers, from their configs, and inputs for them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from .sizes import BESIDE, IMAGE, LARGEST, LENGTH, OPEN, SIZES, TINY, VOCABULARY

# the auto class's table → what its models are called with
TABLES = {
    "SEQUENCE_CLASSIFICATION": "text",
    "CAUSAL_LM": "text",
    "SEQ_TO_SEQ_CAUSAL_LM": "text",
    "MASKED_LM": "text",
    "TOKEN_CLASSIFICATION": "text",
    "IMAGE_TEXT_TO_TEXT": "text",
    "IMAGE_CLASSIFICATION": "vision",
    "SEMANTIC_SEGMENTATION": "vision",
    "VIDEO_CLASSIFICATION": "vision",
    "AUDIO_CLASSIFICATION": "audio",
    "CTC": "audio",
    "SPEECH_SEQ_2_SEQ": "audio",
}


class NotBuiltError(Exception):
    """There is no small model of this class, or no input for it is known; says why."""


def classes() -> list[tuple[str, str]]:
    """Kind of input and class, in the order of the tables."""
    found: dict[str, str] = {}
    for table, kind in TABLES.items():
        for names in getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES").values():
            for name in names if isinstance(names, tuple) else (names,):
                found.setdefault(name, kind)
    return [(kind, name) for name, kind in found.items()]


def small_config(kind: type, depth: int = 0) -> Any:
    """A config with small numbers where the class has them, and small configs inside; it lies in `depth` others."""
    plain, beside = kind(), BESIDE.get(getattr(kind, "model_type", ""), {})
    given = fitted_fields(plain.to_dict(), beside.get("num_hidden_layers", SIZES["num_hidden_layers"])) | beside
    for key, inner in (getattr(kind, "sub_configs", None) or {}).items():
        held = getattr(plain, key, None)
        if held is not None and depth < 3:
            given[key] = small_config(type(held) if inner is transformers.AutoConfig else inner, depth + 1)
    try:
        return kind(**given)
    except Exception:
        return kind(**{key: value for key, value in given.items() if not key.endswith("token_id")})


def fitted_fields(fields: dict[str, Any], layers: int) -> dict[str, Any]:
    """The fields that have small numbers, and the lists with an entry for each layer, of so many layers."""
    given = {}
    for key, value in fields.items():
        if isinstance(value, list) and (len(value) == fields.get("num_hidden_layers") or key.endswith("layer_types")):
            value = given[key] = [*{repr(entry): entry for entry in value}.values(), *value][:layers]
        if key in SIZES and (value is not None or key in OPEN or key.endswith("token_id")):
            given[key] = fitted(SIZES[key], value)
        elif key == "rope_parameters" and value:
            given[key] = value | fitted_fields(value, layers)
    return given


def fitted(size: Any, like: Any) -> Any:
    """A small number in the form that the class has: as many of them, whole where it has whole ones."""
    if isinstance(like, (list, tuple)) and not isinstance(size, list):
        return type(like)(fitted(size, part) for part in like)
    if isinstance(size, list) and not isinstance(like, (list, tuple)):
        return like
    return int(size) if isinstance(like, int) else size


def small_model(name: str) -> nn.Module:
    """A model of a class, in eval mode, with its dropouts off and weights large enough for a signal to come through.

    Raises:
        NotBuiltError: if it cannot be built from small numbers.
    """
    made = getattr(transformers, name, None)
    if made is None or getattr(made, "config_class", None) is None:
        raise NotBuiltError("no such class here")
    try:
        config = small_config(made.config_class)
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in made(config).parameters())
        if size > LARGEST:
            raise NotBuiltError(f"{size:,} parameters with small numbers")
        torch.manual_seed(0)
        model: nn.Module = made(config)
    except NotBuiltError:
        raise
    except Exception as error:
        raise NotBuiltError(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}") from error
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        for parameter in model.parameters():
            spread = float(parameter.std()) if parameter.ndim > 1 else 0.0
            if 0 < spread < TINY:
                parameter *= parameter[0].numel() ** -0.5 / spread
    return model.eval()


def small_inputs(model: Any, kind: str) -> dict[str, Tensor]:
    """What it can be called with: two samples."""
    torch.manual_seed(1)
    takes, name, config = inspect.signature(model.forward).parameters, type(model).__name__, model.config
    main = MAIN[kind] if MAIN[kind] in takes and model.main_input_name not in MAKERS else model.main_input_name
    names = next((names for word, names in CALLED_WITH.items() if word in name), (main,))
    if "decoder_input_ids" in takes and config.is_encoder_decoder:
        names = (*names, "decoder_input_ids")
    for argument in names:
        if argument not in MAKERS:
            raise NotBuiltError(f"no input known for {argument!r}")
    return {argument: MAKERS[argument](config, name) for argument in names}


def asked(config: Any, *names: str, default: Any) -> Any:
    """What a config, or one inside it, says under the first of some names that it knows."""
    inner = [value for value in vars(config).values() if isinstance(value, transformers.PreTrainedConfig)]
    for name in names:
        for holder in (config, *inner):
            if isinstance(getattr(holder, name, None), (int, list, tuple)):
                return getattr(holder, name)
    return default


def _text(config: Any, name: str) -> Tensor:
    books = asked(config, "num_codebooks", default=1) if "Musicgen" in name else 1
    text = torch.randint(3, VOCABULARY - 2, (2 * books, LENGTH))
    text[:, -1] = 1  # the end of the text, which some heads look for
    return text


def _boxes(config: Any, name: str) -> Tensor:
    corners = torch.randint(0, 8, (2, LENGTH, 2))
    boxes = torch.cat([corners, corners + 4], dim=-1)
    return boxes / 16 if "Bros" in name or "Udop" in name else boxes


def _image(config: Any, name: str) -> Tensor:
    size = asked(config, "image_size", "input_size", "crop_size", default=IMAGE)
    sides = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    frames = (asked(config, "num_frames", "frames_per_clip", default=4),) if "VideoClassification" in name else ()
    return torch.randn(2, *frames, asked(config, "num_channels", "in_chans", default=3), *sides)


def _features(config: Any, name: str) -> Tensor:
    bins = asked(config, *BINS, default=16)
    length = 2 * asked(config, "max_source_positions", default=16)
    return torch.randn(2, bins, length) if "Whisper" in name else torch.randn(2, length, bins)


def _sound(config: Any, name: str) -> Tensor:
    if name.startswith("AST"):
        return torch.randn(2, config.max_length, config.num_mel_bins)
    return torch.randn(2, 1600)


BINS = ("feature_projection_input_dim", "input_feat_per_channel", "num_mel_bins")
MAIN = {"text": "input_ids", "vision": "pixel_values", "audio": "input_features"}
MAKERS: dict[str, Callable[[Any, str], Tensor]] = {
    "input_ids": _text,
    "decoder_input_ids": _text,
    "bbox": _boxes,
    "pixel_values": _image,
    "pixel_values_videos": _image,
    "input_features": _features,
    "input_values": _sound,
}
# a word of the class's name → what it is called with, where that is not its main input alone
CALLED_WITH = {
    "Bros": ("input_ids", "bbox"),
    "Udop": ("input_ids", "bbox"),
    "BlipFor": ("pixel_values", "input_ids"),
    "DiffusionGemma": ("input_ids", "decoder_input_ids"),
    "ShieldGemma2": ("input_ids",),
    "SpeechEncoderDecoder": ("input_values",),
}


def first_output(found: Any) -> Tensor:
    """The logits, or the first numbers that a model gives."""
    logits = getattr(found, "logits", None)
    every = [logits, *(found.values() if hasattr(found, "values") else found)]
    for tensor in every:
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.ndim:
            return tensor
    raise NotBuiltError("no output of floating-point numbers")
