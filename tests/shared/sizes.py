"""Small numbers for the configs of transformers: by the field's name, and what single model types ask beside them."""

from __future__ import annotations

from typing import Any

VOCABULARY, LENGTH, IMAGE, PATCH = 64, 6, 32, 8
LARGEST, TINY = 40_000_000, 0.05
# a small number → the fields that it is for
BY_SIZE: list[tuple[Any, str]] = [
    (
        32,
        (
            "hidden_size d_model n_embd dim emb_dim embed_dim embedding_size encoder_hidden_dim hidden_sizes "
            "embed_dims neck_hidden_sizes out_hidden_size text_hidden_size embedding_dim audio_hidden_size "
            "hidden_size_global d_latents lru_width base_channels image_size "
            "max_source_positions input_size crop_size "
        ),
    ),
    (
        2,
        (
            "num_hidden_layers n_layer n_layers num_layers num_decoder_layers num_encoder_layers "
            "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
            "num_key_value_heads num_kv_heads n_head_kv num_blocks linear_num_heads "
            "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads "
            "swa_num_key_value_heads num_self_attention_heads num_cross_attention_heads index_n_heads "
            "num_experts_per_tok moe_topk top_k_experts moe_k num_experts_per_token num_feat_extract_layers "
            "num_conv_pos_embedding_groups num_codevector_groups num_filters "
        ),
    ),
    (
        1,
        (
            "encoder_layers decoder_layers depth n_decoder_layers depths n_attn_blocks "
            "num_self_attends_per_block num_block_repeats n_group num_expert_group topk_group "
            "first_k_dense_replace n_shared_experts eos_token_id sep_token_id "
        ),
    ),
    (0, ("num_kv_shared_layers pad_token_id bos_token_id decoder_start_token_id cls_token_id blank_token_id ")),
    (
        48,
        (
            "intermediate_size d_ff ffn_dim hidden_dim encoder_ffn_dim decoder_ffn_dim d_inner n_inner "
            "moe_intermediate_size shared_expert_intermediate_size ffn_hidden_size expert_ffn_hidden_size "
            "moe_shared_expert_intermediate_size "
        ),
    ),
    (
        4,
        (
            "num_experts num_local_experts n_routed_experts moe_num_experts mamba_n_heads mamba_d_state "
            "state_size shape_size num_conv_pos_embeddings "
        ),
    ),
    (
        VOCABULARY,
        (
            "vocab_size entity_vocab_size src_vocab_size tgt_vocab_size shape_vocab_size "
            "encoder_hash_byte_group_vocab ngram_vocab_size_base num_embeddings vocab_size_per_layer_input "
        ),
    ),
    (64, "max_position_embeddings n_positions max_target_positions"),
    (
        16,
        (
            "d_kv head_dim kv_channels attention_head_size qk_rope_head_dim qk_nope_head_dim v_head_dim "
            "linear_head_dim mamba_d_head num_mel_bins conv_channels hidden_size_per_layer_input "
        ),
    ),
    (8, "kv_lora_rank q_lora_rank rotary_dim num_latents latent_channels patch_size q_rank"),
    ([2, 3, 3], "mrope_section"),
    (6, "coordinate_size canvas_length"),
    ([16, 16], "conv_dim"),
    ([4, 4], "conv_stride"),
    ([8, 4], "conv_kernel"),
    (
        0.0,
        (
            "hidden_dropout_prob attention_probs_dropout_prob attention_dropout dropout resid_pdrop "
            "embd_pdrop attn_pdrop hidden_dropout activation_dropout dropout_rate layerdrop encoder_layerdrop "
            "decoder_layerdrop drop_path_rate mask_time_prob mask_feature_prob feat_proj_dropout "
            "final_dropout "
        ),
    ),
]
SIZES = {field: size for size, fields in BY_SIZE for field in fields.split()}
# given also where the class itself leaves them open
OPEN = {"head_dim", "num_key_value_heads", "vocab_size", "num_experts_per_tok", "n_routed_experts"}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MROPE = {"rope_parameters": {**ROPE, "mrope_section": [2, 3, 3]}}
HALF_MROPE = {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}}
BOTH = {"full_attention": ROPE, "sliding_attention": ROPE}
SWIN = {"depths": [1, 1], "num_heads": [2, 2], "num_layers": 2, "window_size": 2, "hidden_size": 64, "patch_size": 4}
# model type → what its fields ask of each other, beside the numbers above
BESIDE: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": BOTH},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "t5": {"decoder_start_token_id": 0},
    "udop": {"decoder_start_token_id": 0},
    "chameleon": {"vocabulary_map": {"<image>": 4}},
    "emu3": {"vocabulary_map": {"<image>": 4}},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "lilt": {"hidden_size": 48},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "codegen": {"n_head": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 4, "n_groups": 2},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "dots1": {"n_shared_experts": 1},
    "qwen2_vl_text": MROPE,
    "qwen2_5_vl_text": MROPE,
    "qwen2_5_omni_text": MROPE,
    "glm4v_text": MROPE,
    "paddleocr_vl_text": MROPE,
    "qwen4_exp_text": {
        **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16},
        **{"indexer_budget": 8, "indexer_compress_ratio": 2},
    },
    "glm4v_moe_text": HALF_MROPE,
    "glm_ocr_text": HALF_MROPE,
    "bros": {"hidden_size": 64},
    "textnet": {"stem_out_channels": 32},
    "shieldgemma2": {"yes_token_index": 4, "no_token_index": 5},
    "step3p5": {"sliding_window": 4},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48},
    "glm5_next_text": {"qk_rope_head_dim": 0, "head_dim": 0},
    "hgnet_v2": {"hidden_sizes": [256, 512, 1024, 2048]},
    "mistral4": {"head_dim": 32},
    "falcon_h1": {"mamba_d_ssm": 64},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "zaya": {"num_experts_per_tok": 1},
    "rwkv": {"use_cache": False},
    "blt": {"use_cache": False},
    "bit": {"num_groups": 2},
    "swin": SWIN,
    "swinv2": SWIN,
    "donut-swin": SWIN,
    "levit": {"image_size": 64, "patch_size": 16},
    "convnext": {"patch_size": 4},
    "convnextv2": {"patch_size": 4},
    "cvt": {"depth": [1, 2, 3]},
    "mobilevitv2": {"patch_size": 2, "image_size": 128},
    "efficientnet": {"width_coefficient": 0.5, "depth_coefficient": 1.0, "hidden_dim": 640},
    "audio-spectrogram-transformer": {"max_length": 64},
    "beit": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
    "data2vec-vision": {"num_hidden_layers": 4, "out_indices": [0, 1, 2, 3]},
    "dpt": {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]},
}
