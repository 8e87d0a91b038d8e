"""Real architectures with few random weights, as Hugging Face folders: what the trainer loads in tests.

Text is read byte by byte, so that every character is a token and spans are easy to read. The processors are those of
the real model families, made for images of 16 × 16 pixels.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAVA_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\\n' }}{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# as SmolVLM has it
IDEFICS_CHAT = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
QWEN_CHAT = LLAVA_CHATML.replace("<image>\\n", "<|vision_start|><|image_pad|><|vision_end|>")
IMAGE_TOKENS = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
TILES = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))


def byte_tokenizer(*more: str, template: str | None = None) -> Any:
    """A fast tokenizer of 256 bytes, `<|im_start|>`, `<|im_end|>`, `</s>` (end and padding) and more special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[]))
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    base.decoder = decoders.ByteLevel()
    special = ("<|im_start|>", "<|im_end|>", "</s>", *more)
    base.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=base, eos_token="</s>", pad_token="</s>", extra_special_tokens=["<|im_end|>", *more]
    )
    tokenizer.chat_template = template
    return tokenizer


def _text_config(tokenizer: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None, initializer_range=0.2,
        max_position_embeddings=512, attn_implementation="sdpa",
    )  # fmt: skip


def llama(folder: Path, template: str | None = None) -> Path:
    """A causal language model; without a chat template unless one is given."""
    import torch
    from transformers import LlamaForCausalLM

    tokenizer = byte_tokenizer(template=template)
    torch.manual_seed(0)
    LlamaForCausalLM(_text_config(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def vit(folder: Path) -> Path:
    """A vision transformer of 16 × 16 pixels in patches of 4, not yet a classifier."""
    import torch
    from transformers import ViTConfig, ViTModel
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4,
        initializer_range=0.1,
    )  # fmt: skip
    ViTModel(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def llava(folder: Path) -> Path:
    """LLaVA: a CLIP tower of 16 patches and a Llama; each image becomes 16 tokens."""
    import torch
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = byte_tokenizer("<image>")
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=16, patch_size=4,
        projection_dim=32,
    )  # fmt: skip
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=vision, text_config=_text_config(tokenizer), image_token_index=image_token, image_seq_length=16
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    LlavaProcessor(
        images, tokenizer, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=LLAVA_CHATML,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def idefics3(folder: Path) -> Path:
    """Idefics3, which the first SmolVLM is: larger images are cut into tiles of 4 tokens each, and a small one of all."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    tokenizer = byte_tokenizer(*IMAGE_TOKENS, *TILES)
    _tiled(folder, tokenizer, Idefics3Config, Idefics3ForConditionalGeneration)
    images = Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=IDEFICS_CHAT).save_pretrained(folder)
    return folder


def smolvlm(folder: Path) -> Path:
    """SmolVLM2: the same as `idefics3`, with a part for videos in its processor."""
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    tokenizer = byte_tokenizer(*IMAGE_TOKENS, *TILES, template=IDEFICS_CHAT)
    _tiled(folder, tokenizer, SmolVLMConfig, SmolVLMForConditionalGeneration)
    tokenizer.save_pretrained(folder)
    # as the real folders have it
    images = SmolVLMImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16}).to_dict()
    images |= {"image_processor_type": "SmolVLMImageProcessor", "processor_class": "SmolVLMProcessor"}
    images["video_sampling"] = {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": 16}}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    processor = {"image_seq_len": 4, "processor_class": "SmolVLMProcessor"}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    return folder


def _tiled(folder: Path, tokenizer: Any, config_class: Any, model_class: Any) -> None:
    """Save an Idefics3-like model: 4 tokens for a tile of 16 × 16 pixels."""
    import torch

    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 4,
    }  # fmt: skip
    torch.manual_seed(0)
    config = config_class(
        vision_config=vision, text_config=_text_config(tokenizer), scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model_class(config).save_pretrained(folder)


def qwen2_5_vl(folder: Path) -> Path:
    """Qwen2.5-VL, with a part for videos in its processor: 64 pixels of an image become a token, at most 16 of them."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = byte_tokenizer(
        "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", template=QWEN_CHAT
    )
    marks = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(token)
        for name, token in (
            ("image", "<|image_pad|>"), ("video", "<|video_pad|>"), ("vision_start", "<|vision_start|>"), ("vision_end", "<|vision_end|>"),
        )
    }  # fmt: skip
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2, "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "patch_size": 4, "window_size": 16, "out_hidden_size": 32,
        "fullatt_block_indexes": [1], "initializer_range": 0.1,
    }  # fmt: skip
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **marks)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # as the real folders have it: one file for images and videos, which names the processor
    images = Qwen2VLImageProcessorPil(patch_size=4, size={"shortest_edge": 64, "longest_edge": 1024}).to_dict()
    images |= {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    return folder
