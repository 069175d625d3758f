"""Captioned scenes of coloured shapes: the data set that the package draws itself.

A scene is a function of (seed, number); its picture, captions and outline are functions of it.
"""

from .captions import ATTRIBUTES, Caption, caption_naming, captions, full_caption
from .draw import SceneSettings, draw_scene, draw_scenes, picture_size
from .export import ExportSettings, export_scenes
from .render import color_shifts, outline, render
from .scene import COLORS, PLACES, RELATIONS, SHAPES, SIZES, Scene, SceneObject, held_out

__all__ = [
    "ATTRIBUTES",
    "COLORS",
    "PLACES",
    "RELATIONS",
    "SHAPES",
    "SIZES",
    "Caption",
    "ExportSettings",
    "Scene",
    "SceneObject",
    "SceneSettings",
    "caption_naming",
    "captions",
    "color_shifts",
    "draw_scene",
    "draw_scenes",
    "export_scenes",
    "full_caption",
    "held_out",
    "outline",
    "picture_size",
    "render",
]
