"""A pre-trained text encoder from a local folder, pinned by digest and never part of a message.

Every party has the model's files itself; what travels and is kept is what a study adds: the public
centre of its codes, low-rank corrections, and the head.
"""

from __future__ import annotations

import copy
import hashlib
import os
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from common.dictionary import PADDING
from common.errors import StudyError
from common.features import FeatureMap
from common.localmodels import file_of
from common.models.checks import CHECKPOINTED
from common.models.lora import LoraLinear, add_lora
from common.models.transformer import activations, longest, mean_of_tokens
from common.modelspec import LoraSpec, PretrainedSpec
from common.readers import needed

_ROWS_AT_ONCE = 32  # of 256 tokens in a model of 384 numbers: about 100 MB of activations
_REMEMBERED = 2**16  # records whose codes are kept: 100 MB for codes of 384 numbers
_LEAST_SPREAD = 1e-4


class PinnedEncoder(nn.Module):
    """Token ids [rows, T] → code [rows, width] of length 1.

    Each of the chosen layers' outputs is averaged over the tokens, freed of its mean and brought to
    length 1; they are put side by side, scaled by mean and standard deviation over public records,
    and brought to length 1 again. Unscaled, the codes of all texts point nearly the same way, and
    so do clipped gradients.
    """

    centre: Tensor
    spread: Tensor

    def __init__(self, spec: PretrainedSpec, features: FeatureMap) -> None:
        """Raises StudyError when the files are not here or are others than the study pins."""
        super().__init__()
        weights = file_of(spec, "model.safetensors", what="teacher")
        model = _pinned(str(weights.parent), spec.sha256)
        self._codes = _known_codes(spec.sha256, spec.layers)
        # Held in a tuple: torch then takes the model itself for no part of this module's state.
        self._model = (model,)
        self._layers = spec.layers
        self.width = len(spec.layers) * int(model.config.hidden_size)
        self._length = _check_fits(model.config, spec, features)
        self.register_buffer("centre", torch.zeros(self.width))
        self.register_buffer("spread", torch.ones(self.width))
        self.corrections = nn.ModuleList()

    def forward(self, tokens: Tensor) -> Tensor:
        """Codes [rows, width]."""
        return self._scaled(self._pooled(tokens))

    def recall(self, tokens: Tensor) -> Tensor:
        """The same, without gradients; a process passes each record through the model only once.

        With corrections, which learn, it is passed every time.
        """
        if len(self.corrections):
            return self(tokens)  # type: ignore[no-any-return]
        return self._scaled(self._recalled(tokens))

    @property
    def word_vectors(self) -> Tensor:
        """The model's own embeddings of single tokens [vocabulary, hidden]."""
        found: Tensor = self._model[0].get_input_embeddings().weight.detach()
        return found

    @property
    def pinned(self) -> nn.Module:
        """The model itself, which is no part of this module's state."""
        found: nn.Module = self._model[0]
        return found

    def centre_on(self, corpus: Tensor) -> None:
        """Take mean and standard deviation of the codes from public records [rows, T]."""
        codes = self._recalled(corpus)
        self.centre.copy_(codes.mean(dim=0))
        if len(codes) > 1:
            self.spread.copy_(codes.std(dim=0).clamp(min=_LEAST_SPREAD))

    def adapt(self, spec: LoraSpec, *, seed: int) -> None:
        """Let low-rank corrections of the model learn; see ``add_lora``."""
        (model,) = self._model
        shared = {id(one): one for one in model.parameters()}
        adapted = copy.deepcopy(model, shared)  # with the very weights of the other
        add_lora(adapted, spec, seed=seed)
        self._model = (adapted,)
        self.record_numbers = activations(
            length=self._length,
            width=int(model.config.hidden_size),
            layers=int(model.config.num_hidden_layers),
            heads=int(model.config.num_attention_heads),
        )
        found = [one for one in adapted.modules() if isinstance(one, LoraLinear)]
        self.corrections.extend(part for one in found for part in (one.down, one.up))

    def _recalled(self, tokens: Tensor) -> Tensor:
        keys = [hashlib.sha256(row.numpy().tobytes()).digest() for row in tokens.cpu()]
        if len(self._codes) > _REMEMBERED:
            self._codes.clear()
        unknown = {key: row for row, key in enumerate(keys) if key not in self._codes}
        # Records of like length together: little is padded.
        rows = sorted(unknown.values(), key=lambda row: int((tokens[row] != PADDING).sum()))
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            some = rows[start : start + _ROWS_AT_ONCE]
            with torch.no_grad():
                pooled = self._pooled(tokens[some])
            self._codes.update(zip([keys[row] for row in some], pooled.cpu(), strict=True))
        found = [self._codes[key] for key in keys]
        known = torch.stack(found) if found else torch.zeros(0, self.width)
        return known.to(tokens.device)

    def _pooled(self, tokens: Tensor) -> Tensor:
        tokens = tokens[:, : longest(tokens)]
        (model,) = self._model
        model.to(tokens.device)  # no part of this module, it does not follow by itself
        seen = model(
            input_ids=tokens,
            attention_mask=(tokens != PADDING).long(),
            output_hidden_states=True,
        ).hidden_states
        means = [mean_of_tokens(seen[layer], tokens) for layer in self._layers]
        return torch.cat([_unit(one - one.mean(dim=1, keepdim=True)) for one in means], dim=1)

    def _scaled(self, codes: Tensor) -> Tensor:
        return _unit((codes - self.centre) / self.spread)


def _unit(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / norms.clamp(min=1e-6)


@lru_cache(maxsize=4)
def _known_codes(sha256: str, layers: tuple[int, ...]) -> dict[bytes, Tensor]:  # noqa: ARG001
    """The codes of these layers of this model that the process knows so far; to be added to."""
    return {}


@lru_cache(maxsize=2)
def _pinned(folder: str, sha256: str) -> Any:  # noqa: ARG001  (another file is another model)
    """The frozen model of ``folder``, whose file was found to have this digest."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers = needed("transformers", "text", "kind = 'pretrained'")
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        said = " ".join(str(error).split())
        raise StudyError(f"teacher: {folder}: expected a model of transformers: {said}") from None
    if any(getattr(part, "gradient_checkpointing", False) is True for part in model.modules()):
        raise StudyError(f"teacher: {folder}: {CHECKPOINTED}")
    return model.eval().requires_grad_(False)


def _check_fits(config: Any, spec: PretrainedSpec, features: FeatureMap) -> int:
    """The length of a text in tokens; raises StudyError where the dictionary is another's."""
    assert features.text_shape is not None  # noqa: S101  (the study refuses it otherwise)
    length, vocabulary = features.text_shape
    longest_text = int(getattr(config, "max_position_embeddings", length))
    blocks = int(config.num_hidden_layers)
    for key, sound, expected, found in (
        ("dictionary vocabulary", vocabulary == config.vocab_size, config.vocab_size, vocabulary),
        ("dictionary length", length <= longest_text, f"at most {longest_text}", length),
        (
            "teacher.layers",
            all(-blocks - 1 <= one <= blocks for one in spec.layers),
            f"layers from 0 to {blocks}",
            list(spec.layers),
        ),
    ):
        if not sound:
            raise StudyError(
                f"{key}: expected {expected}, as the model {spec.folder!r} has it, found {found}"
            )
    return length
