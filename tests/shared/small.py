"""Small models of all classes of transformers, from their configs, and inputs for them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

VOCABULARY, LENGTH, IMAGE, PATCH = 64, 6, 16, 8
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
WIDTHS = ("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embed_dim", "embedding_size", "encoder_hidden_dim")
SIZES: dict[str, Any] = {
    **dict.fromkeys(WIDTHS, 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_encoder_layers", "depth", "n_decoder_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 2),
    **dict.fromkeys(("decoder_attention_heads", "num_key_value_heads", "num_kv_heads", "n_head_kv"), 2),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("d_inner", "n_inner", "moe_intermediate_size", "shared_expert_intermediate_size"), 48),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_target_positions"), 64),
    **{"vocab_size": VOCABULARY, "d_kv": 16, "head_dim": 16, "kv_channels": 16, "attention_head_size": 16},
    **{"n_group": 1, "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8},
    **{"qk_nope_head_dim": 8, "v_head_dim": 16, "first_k_dense_replace": 1, "n_shared_experts": 1},
    **{"image_size": IMAGE, "patch_size": PATCH, "num_mel_bins": 16, "max_source_positions": 32, "state_size": 4},
    **{"conv_dim": [16, 16], "conv_stride": [4, 4], "conv_kernel": [8, 4], "num_feat_extract_layers": 2},
    **{"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "num_codevector_groups": 2},
    **{"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 16, "q_rank": 8},
    **dict.fromkeys(("pad_token_id", "bos_token_id", "decoder_start_token_id", "cls_token_id"), 0),
    **dict.fromkeys(("eos_token_id", "sep_token_id"), 1),
    **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "dropout"), 0.0),
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout", "activation_dropout"), 0.0),
    **dict.fromkeys(("dropout_rate", "layerdrop", "encoder_layerdrop", "decoder_layerdrop", "drop_path_rate"), 0.0),
    **dict.fromkeys(("mask_time_prob", "mask_feature_prob", "feat_proj_dropout", "final_dropout"), 0.0),
}
LARGEST = 3_000_000


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
    """A config with small numbers where the class has them, and small configs inside."""
    plain = kind()
    given = {key: SIZES[key] for key in plain.to_dict() if key in SIZES}
    for key in ("conv_dim", "conv_stride", "conv_kernel"):
        if key in given and not isinstance(getattr(plain, key), (list, tuple)):
            del given[key]
    given = {key: value for key, value in given.items() if getattr(plain, key, None) is not None or "token_id" in key}
    for key, inner in (getattr(kind, "sub_configs", None) or {}).items():
        held = getattr(plain, key, None)
        if held is not None and depth < 3 and inner is not transformers.AutoConfig:
            given[key] = small_config(inner, depth + 1)
        elif held is not None and depth < 3:
            given[key] = small_config(type(held), depth + 1)
    layers = given.get("num_hidden_layers", 2)
    for key, value in plain.to_dict().items():  # one per layer
        long = isinstance(value, list) and key.endswith(("layer_types", "layers_block_type", "mlp_layer_types"))
        if long and key not in given:
            given[key] = (list(dict.fromkeys(value)) * layers)[:layers]
    try:
        return kind(**given)
    except Exception:
        own = {key: value for key, value in given.items() if not key.endswith("token_id")}
        return kind(**own)


def small_model(name: str) -> nn.Module:
    """A model of a class, in eval mode, with all its dropouts off.

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
        raise NotBuiltError(
            f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"
        ) from error
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.eval()


def small_inputs(model: Any, kind: str) -> dict[str, Tensor]:
    """What it can be called with: two samples."""
    torch.manual_seed(1)
    takes = inspect.signature(model.forward).parameters
    config = model.config
    text = torch.randint(3, VOCABULARY - 2, (2, LENGTH))
    text[:, -1] = 1  # the end of the text, which some heads look for
    named: dict[str, Tensor] = {}
    main = model.main_input_name
    if main == "pixel_values" or (kind == "vision" and "pixel_values" in takes):
        channels = getattr(config, "num_channels", 3)
        size = getattr(config, "image_size", IMAGE)
        sides = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
        frames = (getattr(config, "num_frames", 4),) if "VideoClassification" in type(model).__name__ else ()
        named["pixel_values"] = torch.randn(2, *frames, channels, *sides)
    elif main == "input_features" or (kind == "audio" and "input_features" in takes):
        bins = getattr(config, "num_mel_bins", None) or getattr(config, "feature_size", 16)
        length = 2 * getattr(config, "max_source_positions", 16)
        shape = (2, bins, length) if "Whisper" in type(model).__name__ else (2, length, bins)
        named["input_features"] = torch.randn(*shape)
    elif main == "input_values" or (kind == "audio" and "input_values" in takes):
        named["input_values"] = torch.randn(2, 400)
    elif "input_ids" in takes:
        named["input_ids"] = text
    else:
        raise NotBuiltError(f"no input known for {main!r}")
    if "decoder_input_ids" in takes and getattr(config, "is_encoder_decoder", False):
        named["decoder_input_ids"] = text
    return named


def first_output(found: Any) -> Tensor:
    """The logits, or the first numbers that a model gives."""
    logits = getattr(found, "logits", None)
    every = [logits, *(found.values() if hasattr(found, "values") else found)]
    for tensor in every:
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.ndim:
            return tensor
    raise NotBuiltError("no output of floating-point numbers")
