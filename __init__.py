"""ComfyUI-PixArt-Delta: what ComfyUI imports."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """ComfyUI's door to the nodes; imported here so that the package costs nothing until then."""
    from .nodes import PixArtExtension

    return PixArtExtension()
