"""Small open_clip models with random weights."""

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file

from threetowers.cache.encoders.encoder import state_digest

Tree = dict[str, Any]

TEXT: Tree = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
TINY: Tree = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
    "text_cfg": TEXT,
}
COCA: Tree = {
    "embed_dim": 24,
    "custom_text": True,
    "vision_cfg": TINY["vision_cfg"] | {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
    "text_cfg": TEXT | {"embed_cls": True, "output_tokens": True},
    "multimodal_cfg": TEXT | {"attn_pooler_heads": 2},
}
TIMM: Tree = {  # as MobileCLIP: timm's classifier is the projection
    "embed_dim": 24,
    "custom_text": True,
    "vision_cfg": {"timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": None, "image_size": 32},
    "text_cfg": TEXT,
}
RESNET: Tree = TINY | {"vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}}
NORM_AFTER: Tree = TINY | {"vision_cfg": TINY["vision_cfg"] | {"final_ln_after_pool": True, "pool_type": "avg"}}
TIMM_VIT: Tree = TIMM | {  # as SigLIP: timm's trunk ends in its pooled vector
    "vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "none", "image_size": 160},
    "embed_dim": 64,
}
PREPROCESS = {"size": [32, 32], "mean": [0.1, 0.2, 0.3], "interpolation": "bilinear"}


def save_open_clip(folder: Path, config: Tree = TINY, preprocess: Tree | None = None) -> str:
    """Save a model as open_clip does, and return the digest of its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"model_cfg": config, "preprocess_cfg": PREPROCESS | (preprocess or {})}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    torch.manual_seed(0)
    state = open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_text=False).state_dict()
    save_file({name: value.clone() for name, value in state.items()}, folder / "open_clip_model.safetensors")
    return state_digest(state)


def save_words(folder: Path, **arguments: Any) -> None:
    """Save a tokenizer of transformers, of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[BOS]",
        "[EOS]",
        *["a", "red", "disc", "photo", "of", "dog", "cat", "x", "y", "z"],
    ]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"unk": "UNK", "pad": "PAD", "cls": "CLS", "sep": "SEP", "bos": "BOS", "eos": "EOS"}
    tokens = {f"{name}_token": f"[{token}]" for name, token in names.items()}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens, **arguments).save_pretrained(folder)


def hf_config(folder: Path, kind: str, pooler: str) -> Tree:
    """A config with a text tower of transformers, whose own config lies in a folder."""
    from transformers import BertConfig, RobertaConfig

    sizes: Tree = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    make = {"bert": BertConfig, "roberta": RobertaConfig}[kind]
    make(vocab_size=20, max_position_embeddings=32, pad_token_id=0, **sizes).save_pretrained(folder / "tower")
    text = {"hf_model_name": str(folder / "tower"), "hf_pooler_type": pooler, "hf_proj_type": "mlp"}
    return TINY | {"text_cfg": text | {"hf_tokenizer_name": "words", "context_length": 16}}
