"""Captions for labelled images: templates, and a byte-level BPE tokenizer trained on them."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

TEMPLATES = (
    "a handwritten {}",
    "a handwritten digit: {}",
    "the number {}, written by hand",
    "a small scan of the digit {}",
    "the digit {}",
    "a {} in someone's handwriting",
    "somebody wrote the number {}",
    "a {} drawn with a pen",
)
PAD, BEGIN, END = "[PAD]", "[BOS]", "[EOS]"
PAD_ID = 0
VOCABULARY = 400  # the 256 bytes, three special tokens, and the merges that the captions offer


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE, as CLIP's: any text can be encoded, and decodes to itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BEGIN, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (BEGIN, END)],
    )
    return tokenizer


class Captions:
    """Every template filled with every class name, as tokens of one length.

    The tokenizer travels in the checkpoint (`state`), so that a resumed run reads the same tokens.
    """

    def __init__(self, class_names: tuple[str, ...], state: str | None = None) -> None:
        self.texts = [[template.format(name) for template in TEMPLATES] for name in class_names]
        every = [text for texts in self.texts for text in texts]
        self.tokenizer = train_tokenizer(every) if state is None else Tokenizer.from_str(state)
        self.context = max(len(self.tokenizer.encode(text).ids) for text in every)

    @property
    def vocabulary(self) -> int:
        """The number of distinct tokens."""
        return self.tokenizer.get_vocab_size()

    def state(self) -> str:
        """The tokenizer as JSON."""
        return self.tokenizer.to_str()

    def encode(self, text: str) -> list[int]:
        """The tokens of a text between its begin and end marks, padded to `context`."""
        ids = self.tokenizer.encode(text).ids
        if len(ids) > self.context:
            raise ValueError(f"{text!r} has {len(ids)} tokens, more than the {self.context} known")
        return ids + [PAD_ID] * (self.context - len(ids))

    def decode(self, ids: list[int]) -> str:
        """The text of some tokens, without marks and padding."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def table(self) -> Tensor:
        """All captions as int64 [classes, templates, context]."""
        return torch.tensor([[self.encode(text) for text in texts] for texts in self.texts])
