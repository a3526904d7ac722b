"""The tokenizer and the table of captions."""

from __future__ import annotations

import pytest
import torch

from fastcl.train.captions import PAD_ID, TEMPLATES, Captions


def test_every_caption_comes_back_from_its_tokens(captions: Captions) -> None:
    table = captions.table()
    assert table.shape == (10, len(TEMPLATES), captions.context)
    assert table.dtype == torch.int64
    for texts, rows in zip(captions.texts, table, strict=True):
        for text, row in zip(texts, rows, strict=True):
            assert captions.decode(row.tolist()) == text


def test_text_never_seen_comes_back_too(captions: Captions) -> None:
    for text in ("Zwölf!", "seventy", "a ☂"):
        assert captions.decode(captions.tokenizer.encode(text).ids) == text


def test_captions_differ_and_are_padded_only_at_the_end(captions: Captions) -> None:
    rows = captions.table().flatten(0, 1)
    assert len(rows.unique(dim=0)) == len(rows)
    padding = rows == PAD_ID
    assert (padding[:, :-1] <= padding[:, 1:]).all()
    assert (~padding).sum(1).max() == captions.context
    assert int(rows.max()) < captions.vocabulary


def test_words_are_learned_as_tokens(captions: Captions) -> None:
    tokens = captions.tokenizer.encode("a handwritten seven").tokens
    assert tokens == ["[BOS]", "a", "Ġhandwritten", "Ġseven", "[EOS]"]


def test_a_text_too_long_is_refused(captions: Captions) -> None:
    with pytest.raises(ValueError, match="more than the"):
        captions.encode("a handwritten seven " * 20)


def test_the_tokenizer_survives_the_checkpoint(captions: Captions) -> None:
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    again = Captions(names, captions.state())
    assert torch.equal(again.table(), captions.table())
    # trained on other words, the same texts have other tokens: the state is what was used above
    other = Captions(("cat", "dog"))
    assert Captions(names, other.state()).context > captions.context
