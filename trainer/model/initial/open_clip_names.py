"""The names that open_clip has for the tensors of our own towers: a timm model, a text transformer, and their heads."""

from collections.abc import Mapping

from torch import Tensor

BLOCK_NAMES = {  # ours (timm's) -> open_clip's, within a transformer block
    "norm1.weight": "ln_1.weight",
    "norm1.bias": "ln_1.bias",
    "attn.qkv.weight": "attn.in_proj_weight",
    "attn.qkv.bias": "attn.in_proj_bias",
    "attn.proj.weight": "attn.out_proj.weight",
    "attn.proj.bias": "attn.out_proj.bias",
    "norm2.weight": "ln_2.weight",
    "norm2.bias": "ln_2.bias",
    "mlp.fc1.weight": "mlp.c_fc.weight",
    "mlp.fc1.bias": "mlp.c_fc.bias",
    "mlp.fc2.weight": "mlp.c_proj.weight",
    "mlp.fc2.bias": "mlp.c_proj.bias",
}
TEXT_NAMES = {
    "embed.weight": "token_embedding.weight",
    "position": "positional_embedding",
    "norm.weight": "ln_final.weight",
    "norm.bias": "ln_final.bias",
}
BLOCKS, RESBLOCKS = "blocks.", "transformer.resblocks."
# The linear layers of an image head, in order: of one layer, and of timm's MLP.
IMAGE_HEADS = {1: ("head.proj",), 2: ("head.mlp.fc1", "head.mlp.fc2")}


def their_text(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a `TextTransformer` as open_clip names them in `text`."""
    theirs = {}
    for name, tensor in ours.items():
        if name.startswith(BLOCKS):
            number, _, inner = name.removeprefix(BLOCKS).partition(".")
            theirs[f"{RESBLOCKS}{number}.{BLOCK_NAMES[inner]}"] = tensor
        else:
            theirs[TEXT_NAMES[name]] = tensor[0] if name == "position" else tensor
    return theirs


def our_text(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of open_clip's `text` but for its projection under our names.

    What our text transformer has not keeps its name.
    """
    of_block = {theirs: ours for ours, theirs in BLOCK_NAMES.items()}
    of_tower = {theirs: ours for ours, theirs in TEXT_NAMES.items()}
    ours = {}
    for name, tensor in theirs.items():
        if name.partition(".")[0] == "text_projection":
            continue
        number, _, inner = name.removeprefix(RESBLOCKS).partition(".")
        if name.startswith(RESBLOCKS) and inner in of_block:
            ours[f"{BLOCKS}{number}.{of_block[inner]}"] = tensor
        else:
            ours[of_tower.get(name, name)] = tensor[None] if name == "positional_embedding" else tensor
    return ours


def their_projection(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a linear head on the text tower as open_clip names it in `text`: a matrix, or with a bias a module."""
    if "bias" in ours:
        return {f"text_projection.{name}": tensor for name, tensor in ours.items()}
    return {"text_projection": ours["weight"].T}


def our_projection(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the projection of open_clip's `text` under the names of a linear head; nothing where there is none."""
    if "text_projection" in theirs:
        return {"weight": theirs["text_projection"].T}
    prefix = "text_projection."
    return {name.removeprefix(prefix): tensor for name, tensor in theirs.items() if name.startswith(prefix)}
