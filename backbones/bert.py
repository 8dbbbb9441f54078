"""Text encoders as chains of attention and feed-forward sub-layers: BERT (MiniLM too), RoBERTa, DistilBERT.

The sub-layers are computed here, on Hugging Face's weights, in plain matrix products: the fused attention that its own
modules would run has no second derivative, which meta-learning through the blocks needs.

Sources: Devlin et al. 2019, "BERT"; Liu et al. 2019, "RoBERTa"; Sanh et al. 2019, "DistilBERT"; two sites per layer, one
after each sub-layer, as in Houlsby et al. 2019; the mean over tokens is that of Reimers & Gurevych 2019, "Sentence-BERT".
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from backbones.artefacts import ArtefactError, cache_key
from backbones.base import Backbone, Hidden

BERT_LIKE = ("bert", "roberta", "xlm-roberta", "camembert")
SUPPORTED = (*BERT_LIKE, "distilbert")
"""Values of ``model_type`` in ``config.json``. The BERT-like ones name their sub-modules alike."""

_ORIGINAL = {
    "bert": {
        "layers": "encoder.layer",
        **{name: f"attention.self.{name}" for name in ("query", "key", "value")},
        "output": "attention.output.dense",
        "inner": "intermediate.dense",
        "outer": "output.dense",
    },
    "distilbert": {
        "layers": "transformer.layer",
        **{name: f"attention.{name[0]}_lin" for name in ("query", "key", "value")},
        "output": "attention.out_lin",
        "inner": "ffn.lin1",
        "outer": "ffn.lin2",
    },
}
"""Where the layers of the blocks are in Hugging Face's models."""
PADDING = -1
REFERENCE_TOKENS = 32
PIECE = 8
"""Texts that are computed together where no more than that is known of them."""


class Attention(nn.Module):
    """Self-attention, residual and layer norm: one block.

    Args:
        heads: number of attention heads.
        query, key, value, output: the four projections, ``[W, W]``.
        norm: layer norm after the residual.
    """

    def __init__(self, heads: int, query: nn.Linear, key: nn.Linear, value: nn.Linear, output: nn.Linear, norm: nn.Module):
        super().__init__()
        self.heads, self.scale = heads, (query.out_features // heads) ** -0.5
        self.query, self.key, self.value, self.output, self.norm = query, key, value, output, norm

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """``[N, L, W]`` to ``[N, L, W]``; no token looks at one where ``mask [N, L]`` is False."""
        query, key, value = (
            project(hidden).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project in (self.query, self.key, self.value)
        )
        # The lowest finite number, not -inf: a row of padding alone would otherwise become NaN.
        bias = (~mask)[:, None, None].to(hidden.dtype) * torch.finfo(hidden.dtype).min
        shares = (query @ key.transpose(-1, -2) * self.scale + bias).softmax(-1)
        return self.norm(hidden + self.output((shares @ value).transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    """Two dense layers, residual and layer norm: one block.

    Args:
        inner: dense layer to the inner width. outer: dense layer back.
        norm: layer norm after the residual.
        activation: between the dense layers.
    """

    def __init__(self, inner: nn.Linear, outer: nn.Linear, norm: nn.Module, activation: Callable[[Tensor], Tensor]):
        super().__init__()
        self.inner, self.outer, self.norm, self.activation = inner, outer, norm, activation

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """``[N, L, W]`` to ``[N, L, W]``, each token alone: ``mask`` is not read."""
        return self.norm(hidden + self.outer(self.activation(self.inner(hidden))))


class TextBackbone(Backbone):
    """A frozen encoder on texts: per layer the blocks ``layer<i>.attention`` and ``layer<i>.ffn``.

    Args:
        model: Hugging Face's encoder, one of :data:`SUPPORTED`; its modules are taken over and frozen, not copied.
        tokenizer: Hugging Face's tokenizer of that model.
        max_length: tokens per text, special ones included; less if model or tokenizer allow less.

    Attributes:
        max_length: as above, after the model and the tokenizer had their say.
        truncated: how many texts :meth:`prepare` has cut so far.

    Raises:
        ArtefactError: if the architecture is not supported or the tokenizer belongs to another model.
        ValueError: if ``max_length`` leaves no room for text.
    """

    channel_axis = -1

    def __init__(self, model: Any, tokenizer: Any, max_length: int = 128) -> None:
        super().__init__()
        _check_config(model.config)
        self.embeddings, self.tokenizer, self.pad, self.truncated = model.embeddings, tokenizer, model.config.pad_token_id, 0
        self.vocabulary, self.feature_width = self.embeddings.word_embeddings.weight.shape
        _check_tokenizer(tokenizer, self.vocabulary)
        self.positions = _positions(model)
        self.max_length = min(max_length, self.positions, tokenizer.model_max_length)
        if self.max_length <= tokenizer.num_special_tokens_to_add():
            raise ValueError(f"max_length={self.max_length} leaves no room for text beside the special tokens: raise it.")
        self.reference_shape = (min(REFERENCE_TOKENS, self.max_length),)
        facts = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version", "dtype")}
        self.configuration = cache_key(config=json.loads(json.dumps(facts, default=str)))
        self.original = _ORIGINAL["distilbert" if model.config.model_type == "distilbert" else "bert"]
        layers = _layers(model)
        self.blocks = nn.ModuleList([block for layer in layers for block in layer])
        self.block_names = tuple(f"layer{i}.{part}" for i in range(len(layers)) for part in ("attention", "ffn"))
        self.freeze()

    def origin(self, index: int, layer: str) -> str:
        """See :meth:`Backbone.origin`: the name in Hugging Face's model."""
        return f"{self.original['layers']}.{index // 2}.{self.original[layer]}"

    def prepare(self, texts: Sequence[str]) -> Tensor:
        """Texts to token ids ``[N, L]`` int64, -1 where padded; L is that of the longest of these texts.

        Texts beyond :attr:`max_length` are cut and counted in :attr:`truncated`.

        Raises:
            ValueError: if ``texts`` is no list of strings, or a text is no valid Unicode.
        """
        _check_texts(texts)
        rows = self.tokenizer(list(texts), verbose=False)["input_ids"] if len(texts) else []
        for index, row in enumerate(rows):
            if len(row) > self.max_length:
                rows[index] = self.tokenizer(texts[index], truncation=True, max_length=self.max_length)["input_ids"]
                self.truncated += 1
        length = max(map(len, rows), default=0)
        padded = [row + [PADDING] * (length - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.int64).view(len(rows), length)

    def pieces(self, inputs: Tensor) -> list[Tensor]:
        """See :meth:`Backbone.pieces`: the shortest :data:`PIECE` texts, the next ones, and so on; all if they are alike."""
        lengths = (inputs >= 0).sum(1)
        return super().pieces(inputs) if (lengths == lengths[:1]).all() else list(lengths.argsort(stable=True).split(PIECE))

    def trimmed(self, inputs: Tensor) -> Tensor:
        """See :meth:`Backbone.trimmed`: the columns in which some text has a token, the first one in any case."""
        return inputs[:, : max(1, int((inputs >= 0).sum(1).max()))]

    def settings(self) -> str:
        """See :meth:`Backbone.settings`: where texts are cut off, what the tokenizer does, and the configuration."""
        return f"max_length={self.max_length},tokenizer={_tokenizer_hash(self.tokenizer)},config={self.configuration}"

    def reference_inputs(self) -> Tensor:
        """One text of real tokens: id 0 is in every vocabulary, and only -1 is padding."""
        return torch.zeros(1, *self.reference_shape, dtype=torch.int64)

    def stem(self, inputs: Tensor) -> Hidden:
        """Token ids ``[N, L]``, -1 after the last one, to embeddings ``[N, L, W]`` and the mask of real tokens.

        Raises:
            ValueError: if the inputs are not such ids.
        """
        if inputs.dim() != 2 or inputs.shape[1] > self.positions or (inputs >= self.vocabulary).any():
            raise ValueError(
                f"inputs of shape {tuple(inputs.shape)} are not token ids [N, L] below {self.vocabulary} "
                f"with L at most {self.positions}: make them with prepare(texts)."
            )
        mask = inputs >= 0
        return Hidden(self.embeddings(inputs.long().masked_fill(~mask, self.pad)), {"mask": mask})

    def block(self, index: int, hidden: Hidden) -> Hidden:
        """Sub-layer ``index``."""
        return hidden.with_tensor(self.blocks[index](hidden.tensor, hidden.context["mask"]))

    def without(self, index: int, hidden: Hidden) -> Hidden:
        """See :meth:`Backbone.without`: the residual branch goes, the layer norm stays."""
        norm = self.blocks[index].norm
        assert isinstance(norm, nn.Module)
        return hidden.with_tensor(norm(hidden.tensor))

    def readout(self, hidden: Hidden) -> Tensor:
        """Mean over real tokens, ``[N, W]``."""
        return self.pool(hidden)

    def pool(self, hidden: Hidden) -> Tensor:
        """Mean over real tokens, ``[N, W]``; zero where there is none."""
        real = hidden.context["mask"].unsqueeze(-1).to(hidden.tensor.dtype)
        return (hidden.tensor * real).sum(1) / real.sum(1).clamp_min(1)


def check_type(model_type: str | None, where: object) -> None:
    """Raise ``ArtefactError`` unless the blocks here can be made out of a model of that type."""
    if model_type not in SUPPORTED:
        raise ArtefactError(f"{where} is of the architecture {model_type!r}; supported are {', '.join(SUPPORTED)}.")


def _check_config(config: Any) -> None:
    """Raise ``ArtefactError`` for what the blocks here would not compute as the model was trained."""
    check_type(config.model_type, "the model")
    if getattr(config, "is_decoder", False):
        raise ArtefactError("the model is a decoder (is_decoder in config.json): use an encoder.")
    if getattr(config, "position_embedding_type", "absolute") not in (None, "absolute"):
        raise ArtefactError("the model has relative positions (position_embedding_type): use one with absolute ones.")
    if config.pad_token_id is None:
        raise ArtefactError("config.json names no pad_token_id: add the one that the model was trained with.")


def _check_tokenizer(tokenizer: Any, rows: int) -> None:
    """Raise ``ArtefactError`` unless the tokenizer knows words and all its ids have a row in the embeddings."""
    words = tokenizer.get_vocab()
    if set(words) <= set(tokenizer.all_special_tokens):  # what transformers makes up where the files are missing
        raise ArtefactError("there is no tokenizer with a vocabulary (tokenizer.json): copy that of the model beside it.")
    if max(words.values()) >= rows:
        raise ArtefactError(
            f"the tokenizer has ids up to {max(words.values())} but the model embeds {rows} tokens: it belongs to another "
            "model, take both from the same source."
        )


def _tokenizer_hash(tokenizer: Any) -> str:
    """Hexadecimal. Of how it was last asked to cut and pad, nothing: that is no part of it, and :meth:`prepare` says anew."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # Of a tokenizer in pure Python, which has no backend, the words are what can be told.
    facts = json.loads(backend.to_str()) | {"truncation": None, "padding": None} if backend else tokenizer.get_vocab()
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _check_texts(texts: Sequence[str]) -> None:
    if isinstance(texts, str):
        raise ValueError("expected a list of texts, got one string: wrap it in a list.")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"text {index} is of type {type(text).__name__}, not a string: this backbone reads texts.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text {index} is no valid Unicode ({error.reason}): read its file as UTF-8.") from error


def _positions(model: Any) -> int:
    """How long a text can be. RoBERTa and its kin start counting behind the padding's position."""
    count = model.embeddings.position_embeddings.num_embeddings
    return count if model.config.model_type in ("bert", "distilbert") else count - model.config.pad_token_id - 1


def _layers(model: Any) -> list[tuple[Attention, FeedForward]]:
    """The two blocks of every layer, around the model's own modules."""
    if model.config.model_type in BERT_LIKE:
        return [_bert_layer(layer) for layer in model.encoder.layer]
    return [_distilbert_layer(layer) for layer in model.transformer.layer]


def _bert_layer(layer: Any) -> tuple[Attention, FeedForward]:
    inside, after = layer.attention.self, layer.attention.output
    attention = Attention(inside.num_attention_heads, inside.query, inside.key, inside.value, after.dense, after.LayerNorm)
    inner = layer.intermediate
    return attention, FeedForward(inner.dense, layer.output.dense, layer.output.LayerNorm, inner.intermediate_act_fn)


def _distilbert_layer(layer: Any) -> tuple[Attention, FeedForward]:
    inside, ffn = layer.attention, layer.ffn
    attention = Attention(inside.n_heads, inside.q_lin, inside.k_lin, inside.v_lin, inside.out_lin, layer.sa_layer_norm)
    return attention, FeedForward(ffn.lin1, ffn.lin2, layer.output_layer_norm, ffn.activation)
