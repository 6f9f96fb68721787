"""From text to token ids: public rules, the same at every hospital.

Id 0 is padding. A study's text column says which rule: words hashed into a fixed vocabulary or a
text's own bytes, which need no file and no training, or the tokeniser of a model whose digest the
study pins.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from common.dictionary import BYTES, PADDING, Column
from common.errors import StudyError
from common.localmodels import file_of
from common.readers import needed

_FIRST_BYTE = BYTES - 256

# Words and numbers, and every other sign by itself: "b.i.d. 20mg" is b . i . d . 20 mg.
_PIECES = re.compile(r"[^\W\d_]+|\d+|[^\w\s]")
_CACHED_WORDS = 2**17
_ENDS = ("[SEP]", "</s>", "<|endoftext|>")  # how models write a text's end


class Tokeniser(Protocol):
    """Turns texts into ids."""

    @property
    def end(self) -> int | None:
        """The id that stands behind a text; None where none does."""
        ...

    def encode(self, texts: Sequence[str], length: int) -> NDArray[np.int32]:
        """Ids [texts, length]: cut at ``length``, padded with 0 behind."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without padding and end.

        Raises StudyError where ids cannot be turned back.
        """
        ...


class HashedWords:
    """Lower-case words as SHA-256 modulo the vocabulary, from 1 on.

    Different words may share an id: of the 4,000 different words of 1,200 clinical dialogues one
    in five does in a vocabulary of 8,192 (expected: 1 - exp(-4000 / 8191)... of them).
    """

    end = None

    def __init__(self, vocabulary: int) -> None:
        self._ids = lru_cache(maxsize=_CACHED_WORDS)(lambda word: _hashed(word, vocabulary))

    def encode(self, texts: Sequence[str], length: int) -> NDArray[np.int32]:
        """See ``Tokeniser``."""
        found = np.full((len(texts), length), PADDING, dtype=np.int32)
        for row, text in zip(found, texts, strict=True):
            words = _PIECES.findall(text.lower())[:length]
            row[: len(words)] = [self._ids(word) for word in words]
        return found

    def decode(self, ids: Sequence[int]) -> str:  # noqa: ARG002
        """See ``Tokeniser``: never."""
        raise StudyError(
            "tokenizer: expected one whose ids can be read again, found hashed words, several of "
            "which share an id; set tokenizer = 'bytes', or a model's, on the text column"
        )


class Bytes:
    """A text's UTF-8 bytes, from id 2 on, and id 1 behind its end, unless it is cut before."""

    end = 1

    def encode(self, texts: Sequence[str], length: int) -> NDArray[np.int32]:
        """See ``Tokeniser``; an empty text has no ids at all."""
        found = np.full((len(texts), length), PADDING, dtype=np.int32)
        for row, text in zip(found, texts, strict=True):
            if text:
                ids = [*(_FIRST_BYTE + one for one in text.encode()[:length]), self.end][:length]
                row[: len(ids)] = ids
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """See ``Tokeniser``; bytes that are no text become U+FFFD.

        >>> Bytes().decode([2 + 104, 2 + 105, 1])
        'hi'
        """
        found = bytes(one - _FIRST_BYTE for one in ids if one >= _FIRST_BYTE)
        return found.decode(errors="replace")


class ModelTokens:
    """The tokeniser that a pre-trained model was trained with (``tokenizer.json``)."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        known = (tokenizer.token_to_id(name) for name in _ENDS)
        self.end: int | None = next((one for one in known if one is not None), None)

    def encode(self, texts: Sequence[str], length: int) -> NDArray[np.int32]:
        """See ``Tokeniser``; the model's own marks of beginning and end are kept."""
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(length)
        found = np.full((len(texts), length), PADDING, dtype=np.int32)
        encoded = self._tokenizer.encode_batch(list(texts))
        for row, one in zip(found, encoded, strict=True):
            row[: len(one.ids)] = one.ids
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """See ``Tokeniser``."""
        return str(self._tokenizer.decode(list(ids)))


def tokeniser_of(column: Column) -> Tokeniser:
    """The rule of a text column.

    Raises StudyError when the pinned file is not here, is another one, or does not fit the column.
    """
    assert column.vocabulary is not None  # noqa: S101  (the dictionary refuses it otherwise)
    if column.tokenizer is None:
        return HashedWords(column.vocabulary)
    if column.tokenizer == "bytes":
        return Bytes()
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
