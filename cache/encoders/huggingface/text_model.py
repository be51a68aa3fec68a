"""Text models of transformers: the states of their tokens, pooled."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from threetowers.cache.encoders.encoder import TextModel, require_offered
from threetowers.cache.encoders.huggingface.outputs import TowerHook, joint_embedding, own_pooler
from threetowers.cache.encoders.huggingface.tokenizer import CaptionTokenizer, tokenizer_digest
from threetowers.cache.encoders.tokenizers.tokenizer import Tokens
from threetowers.cache.format.manifest import TextProcessing

CAUSAL_TOLERANCE = 1e-5  # relative; experts may round a token differently beside other tokens


class TextOutputs(NamedTuple):
    """What a text model gives for a batch of captions: token states (b, L, D), and vectors (b, D) where it has them."""

    states_bLD: Tensor
    pooler_bD: Tensor | None
    projected_bD: Tensor | None


class HfTextModel(TextModel):
    """A text model of transformers, or the text side of an image-text model.

    Its features are

    - `pooled`: `processing.pooling` says what: `pooler`, the model's own vector, for the text sides of image-text
      models, which were trained by it; `last` for decoders, whose last token alone has seen the caption; `mean` for
      all others. BERT's dense pooler was trained for another task;
    - `projected`: the joint space of an image-text model;
    - `mean`: the mean of the states of all tokens, special ones included;
    - `last`: the state of the last token;
    - `cls`: the state of the first token, where it sees the others;
    - `pooler`: BERT's dense vector, where the files hold its weights.
    """

    def __init__(self, model: nn.Module, tokens: CaptionTokenizer, name: str, fixed_length: bool) -> None:
        """Find out what the model offers, by a forward pass.

        Args:
            model: In evaluation mode, on its device.
            tokens: Its tokenizer.
            name: Of the encoder, for messages.
            fixed_length: It takes captions padded to their full length, without a mask, as SigLIP does.
        """
        super().__init__()
        self.model: Any = model
        self._tokens = tokens
        self._name = name
        self._fixed_length = fixed_length
        self._call, self._tower = text_call(model)
        self._hook = TowerHook(self._tower, name)
        with torch.inference_mode():
            found = self._outputs(self.collate(self._tokens.tokenize(["a"])))
            causal = self._is_causal()
        pooling = own_pooling(self._tower, found.pooler_bD is not None, causal)
        self.features = (
            "pooled",
            *(["projected"] if found.projected_bD is not None else []),
            "mean",
            "last",
            *([] if causal else ["cls"]),
            *(["pooler"] if found.pooler_bD is not None and pooling != "pooler" else []),
        )
        self.processing = TextProcessing(
            tokenizer_digest=tokenizer_digest(tokens.tokenizer),
            prompt=tokens.prompt,
            max_length=tokens.max_length,
            pooling=pooling,
            normalize=False,
        )

    def tokenize(self, captions: Sequence[str]) -> list[Tokens]:
        """Return the tokens of each caption, with special tokens as the tokenizer adds them."""
        return self._tokens.tokenize(captions)

    def collate(self, tokens: Sequence[Tokens]) -> Mapping[str, Tensor]:
        """Return ids and mask, (b, L) int64 each, padded on the right.

        On the right, whatever the tokenizer's own side: no state of a decoder sees a later one, and positions begin
        with the caption, so that no row depends on how much padding its batch has.
        """
        length = self._tokens.max_length if self._fixed_length else max(len(caption.ids) for caption in tokens)
        ids_bL = torch.full((len(tokens), length), self._tokens.pad_id)
        mask_bL = torch.zeros_like(ids_bL)
        for row, caption in enumerate(tokens):
            ids_bL[row, : len(caption.ids)] = torch.tensor(caption.ids)
            mask_bL[row, : len(caption.ids)] = 1
        return {"input_ids": ids_bL, "attention_mask": mask_bL}

    def forward(self, inputs: Mapping[str, Tensor], features: Sequence[str]) -> tuple[Tensor, ...]:
        """Return the wanted features, (b, D) each."""
        for feature in features:
            require_offered(feature, self.features, self._name)
        outputs = self._outputs(inputs)
        mask_bL = inputs["attention_mask"]
        pooled = self.processing.pooling
        return tuple(pool_text(outputs, mask_bL, pooled if feature == "pooled" else feature) for feature in features)

    def _outputs(self, inputs: Mapping[str, Tensor]) -> TextOutputs:
        device = next(self.model.parameters()).device
        arguments = {name: x.to(device) for name, x in inputs.items()}
        if self._fixed_length:
            del arguments["attention_mask"]
        result = self._call(**arguments)
        output = self._hook.take()
        return TextOutputs(
            output.states, output.pooler, joint_embedding(result, self._call is not self.model, "text_embeds")
        )

    def _is_causal(self) -> bool:
        """Return whether no token sees a later one: found out by changing the last one."""
        first_id = self._tokens.tokenize(["a"])[0].ids[0]
        ids_2L = torch.full((2, 3), first_id)
        ids_2L[1, -1] = (first_id + 1) % self._tokens.rows
        states_2LD = self._outputs({"input_ids": ids_2L, "attention_mask": torch.ones_like(ids_2L)}).states_bLD
        first, second = states_2LD[:, :-1].float()
        return bool((first - second).abs().max() <= CAUSAL_TOLERANCE * first.abs().max())


def text_call(model: Any) -> tuple[Any, Any]:
    """Return what is called with a model's tokens, and the module below it that gives their states."""
    return getattr(model, "get_text_features", model), getattr(model, "text_model", model)


def own_pooling(tower: Any, has_pooler: bool, causal: bool) -> str:
    """Return how the states of a model become a vector, where its files do not say: see `pooled` of `HfTextModel`."""
    if has_pooler and own_pooler(tower):
        return "pooler"
    return "last" if causal else "mean"


def pool_text(outputs: TextOutputs, mask_bL: Tensor, feature: str) -> Tensor:
    """Return a feature (b, D) of captions by its name; `mask_bL`: 1 or true where there is no padding."""
    if feature == "projected":
        assert outputs.projected_bD is not None
        return outputs.projected_bD
    if feature == "pooler":
        assert outputs.pooler_bD is not None
        return outputs.pooler_bD
    states_bLD = outputs.states_bLD.float()
    if feature == "cls":
        return states_bLD[:, 0]
    if feature == "last":
        return states_bLD[torch.arange(states_bLD.shape[0], device=states_bLD.device), mask_bL.sum(1) - 1]
    weights_bL1 = mask_bL[..., None].to(states_bLD.dtype)
    return (states_bLD * weights_bL1).sum(1) / weights_bL1.sum(1)
