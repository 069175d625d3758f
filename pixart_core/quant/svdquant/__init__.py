"""SVDQuant (arXiv 2411.05007): linear layers in 4-bit weights and activations, outliers in 16."""

from .baselines import round_to_nearest, smooth_only
from .int4 import GELU_SHIFT, GROUP
from .layer import SVDQuantLayer, layer_output, output_error
from .solve import SVDQuantSettings, solve_layer, solve_shared

__all__ = ["GELU_SHIFT", "GROUP", "SVDQuantLayer", "SVDQuantSettings", "layer_output",
           "output_error", "round_to_nearest", "smooth_only", "solve_layer", "solve_shared"]
