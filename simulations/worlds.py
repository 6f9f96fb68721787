"""The patients of many runs, read once for all runs that share them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from client.hospital import Hospital
from common.study import Study
from simulations.hospitals import World, build_world, open_world, seeded_noise

# What decides who the hospitals are, and whom they hold.
_MAKES_A_WORLD = {"seed", "dictionary", "public", "simulation"}


@dataclass
class Worlds:
    """Worlds by what makes them: the same seed and settings give the same patients."""

    data_folder: Path
    _made: dict[str, World] = field(default_factory=dict)
    _judges: dict[str, list[Hospital]] = field(default_factory=dict)

    def of(self, study: Study) -> World:
        """The world of ``study``. Raises StudyError or DataError when there can be none."""
        key = _key(study, study.evaluation.folds)
        if key not in self._made:
            self._made[key] = build_world(study, self.data_folder)
        return replace(self._made[key], study=study)

    def judges(self, study: Study) -> list[Hospital]:
        """The hospitals as keepers of test patients; they release nothing: their noise is idle."""
        key = _key(study, study.evaluation.folds, study.evaluation.fold)
        if key not in self._judges:
            world = self.of(study)
            noise = seeded_noise(0, [site.name for site in world.sites])
            self._judges[key] = open_world(world, noise)
        return self._judges[key]


def _key(study: Study, *split: int) -> str:
    tree = study.model_dump(mode="json", include=_MAKES_A_WORLD)
    return json.dumps([tree, split], sort_keys=True)
