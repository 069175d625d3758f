from .controlnet import Control, PixArtControlNet
from .transformer import PixArtTransformer, PreparedCaption

__all__ = ["Control", "PixArtControlNet", "PixArtTransformer", "PreparedCaption"]
