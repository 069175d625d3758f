"""Held-out scenes like those that the starter models were trained on, for `held_out_prompts`."""

from __future__ import annotations

import dataclasses

from pixart_core.starter import Starter
from pixart_core.training.scenes import SceneSettings

# as in the step "scenes" of pixart_core/training/configs/starter.yaml
SQUARE = SceneSettings(Starter.image_size, spread=0.0, grid=True)
SCENES = dataclasses.replace(SQUARE, ratios=("1:1", "5:3", "3:5"), corners=0.1)
