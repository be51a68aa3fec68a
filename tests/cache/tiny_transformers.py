"""Tiny models of transformers with random weights, saved to folders with their tokenizers or image processors."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

WORDS = ("a", "red", "green", "blue", "disc", "bar", "photo", "of", "dog", "on", "bench")
SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
VISION: dict[str, Any] = SMALL | {"image_size": 32, "patch_size": 8}
VOCABULARY = 4 + len(WORDS)


def word_tokenizer(**changes: Any) -> Any:
    """A tokenizer of whole lower-cased words, which adds special tokens as BERT's does."""
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(("<pad>", "<unk>", "<s>", "</s>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("<s>", vocabulary["<s>"]), ("</s>", vocabulary["</s>"])]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, **({"model_max_length": 12} | changes))


def byte_tokenizer() -> Any:
    """A byte-level tokenizer without special tokens around a caption, padding on the left, as those of decoders."""
    from transformers import Qwen2Tokenizer

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    return Qwen2Tokenizer(vocab=tokenizer.get_vocab(), merges=merges, padding_side="left")


def save_text_model(kind: str, folder: Path, seed: int = 0) -> Path:
    """Save a tiny text model with its tokenizer; return its folder."""
    import transformers as t

    torch.manual_seed(seed)
    words: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    tokenizer = word_tokenizer()
    match kind:
        case "bert":
            model = t.BertModel(t.BertConfig(**SMALL, **words, max_position_embeddings=12))
        case "bert without pooler":
            model = t.BertForMaskedLM(t.BertConfig(**SMALL, **words, max_position_embeddings=12))
        case "roberta":  # whose positions begin behind the padding's
            model = t.RobertaModel(t.RobertaConfig(**SMALL, **words, max_position_embeddings=13))
        case "t5":
            sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
            model = t.T5ForConditionalGeneration(t.T5Config(**sizes, **words, decoder_start_token_id=0))
        case "bart":
            sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2}
            sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
            model = t.BartModel(t.BartConfig(**sizes, **words, max_position_embeddings=12))
        case "qwen":
            tokenizer = byte_tokenizer()
            sizes = SMALL | {"num_key_value_heads": 1, "vocab_size": len(tokenizer), "max_position_embeddings": 64}
            model = t.Qwen2ForCausalLM(t.Qwen2Config(**sizes, bos_token_id=None, eos_token_id=None))
        case "clip projection":
            config = t.CLIPTextConfig(**SMALL, **words, max_position_embeddings=12, projection_dim=8)
            model = t.CLIPTextModelWithProjection(config)
        case _:
            raise ValueError(kind)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_pair_model(kind: str, folder: Path, seed: int = 0) -> Path:
    """Save a tiny model of images and text, with tokenizer and image processor; return its folder."""
    import transformers as t

    torch.manual_seed(seed)
    text = SMALL | {"vocab_size": VOCABULARY, "max_position_embeddings": 12}
    text |= {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    if kind == "clip":
        model = t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8))
        processor: Any = t.CLIPImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})
    else:
        model = t.SiglipModel(t.SiglipConfig(text_config=text, vision_config=VISION))
        processor = t.SiglipImageProcessor(size={"height": 32, "width": 32})
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_image_model(kind: str, folder: Path, seed: int = 0) -> Path:
    """Save a tiny image model with its processor; return its folder."""
    import transformers as t

    torch.manual_seed(seed)
    squashed = {"size": {"height": 32, "width": 32}}
    match kind:
        case "vit":
            model, processor = t.ViTModel(t.ViTConfig(**VISION)), t.ViTImageProcessor(**squashed)
        case "vit classifier":
            model, processor = t.ViTForImageClassification(t.ViTConfig(**VISION)), t.ViTImageProcessor(**squashed)
        case "dinov2 with registers":
            config = t.Dinov2WithRegistersConfig(**VISION, num_register_tokens=3)
            model = t.Dinov2WithRegistersModel(config)
            processor = t.BitImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32})
        case "resnet":
            config = t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
            model = t.ResNetModel(config)
            processor = t.ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.875)
        case "swin":
            sizes = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
            model = t.SwinModel(t.SwinConfig(image_size=32, patch_size=4, **sizes))
            processor = t.ViTImageProcessor(**squashed)
        case _:
            raise ValueError(kind)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
