"""From text to token ids: public rules, the same at every hospital.

Id 0 is padding. A study's text column says which rule: ``words`` hashed into a fixed vocabulary,
which needs no file and no training, or the tokeniser of a model whose digest the study pins.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from common.dictionary import Column
from common.errors import StudyError
from common.localmodels import file_of
from common.readers import needed

PADDING = 0

# Words and numbers, and every other sign by itself: "b.i.d. 20mg" is b . i . d . 20 mg.
_PIECES = re.compile(r"[^\W\d_]+|\d+|[^\w\s]")
_CACHED_WORDS = 2**17


class Tokeniser(Protocol):
    """Turns texts into ids."""

    def encode(self, texts: Sequence[str], length: int) -> NDArray[np.int32]:
        """Ids [texts, length]: cut at ``length``, padded with 0 behind."""
        ...


class HashedWords:
    """Lower-case words as SHA-256 modulo the vocabulary, from 1 on.

    Different words may share an id: of the 4,000 different words of 1,200 clinical dialogues one
    in five does in a vocabulary of 8,192 (expected: 1 - exp(-4000 / 8191)... of them).
    """

    def __init__(self, vocabulary: int) -> None:
        self._ids = lru_cache(maxsize=_CACHED_WORDS)(lambda word: _hashed(word, vocabulary))

    def encode(self, texts: Sequence[str], length: int) -> NDArray[np.int32]:
        """See ``Tokeniser``."""
        found = np.full((len(texts), length), PADDING, dtype=np.int32)
        for row, text in zip(found, texts, strict=True):
            words = _PIECES.findall(text.lower())[:length]
            row[: len(words)] = [self._ids(word) for word in words]
        return found


class ModelTokens:
    """The tokeniser that a pre-trained model was trained with (``tokenizer.json``)."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[str], length: int) -> NDArray[np.int32]:
        """See ``Tokeniser``; the model's own marks of beginning and end are kept."""
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(length)
        found = np.full((len(texts), length), PADDING, dtype=np.int32)
        encoded = self._tokenizer.encode_batch(list(texts))
        for row, one in zip(found, encoded, strict=True):
            row[: len(one.ids)] = one.ids
        return found


def tokeniser_of(column: Column) -> Tokeniser:
    """The rule of a text column.

    Raises StudyError when the pinned file is not here, is another one, or does not fit the column.
    """
    assert column.vocabulary is not None  # noqa: S101  (the dictionary refuses it otherwise)
    if column.tokenizer is None:
        return HashedWords(column.vocabulary)
    path = file_of(column.tokenizer, "tokenizer.json", what=f"column {column.name!r}")
    return _model_tokens(str(path), column.vocabulary, column.name)


@lru_cache(maxsize=4)
def _model_tokens(path: str, vocabulary: int, name: str) -> ModelTokens:
    tokenizer = needed("tokenizers", "text", f"column {name!r}").Tokenizer.from_file(path)
    size = tokenizer.get_vocab_size()
    if size != vocabulary:
        raise StudyError(
            f"column {name!r}: expected vocabulary = {size}, as {path} has it, found {vocabulary}"
        )
    if tokenizer.id_to_token(PADDING) not in ("[PAD]", "<pad>", "<|padding|>"):
        raise StudyError(
            f"column {name!r}: expected a tokeniser whose id 0 is padding, found "
            f"{tokenizer.id_to_token(PADDING)!r}; use another model"
        )
    return ModelTokens(tokenizer)


def _hashed(word: str, vocabulary: int) -> int:
    digest = hashlib.sha256(word.encode()).digest()
    return 1 + int.from_bytes(digest[:8], "big") % (vocabulary - 1)
