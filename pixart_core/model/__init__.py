from .transformer import PixArtTransformer, PreparedCaption

__all__ = ["PixArtTransformer", "PreparedCaption"]
