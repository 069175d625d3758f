"""Captions and pictures to what a cache stores."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor, nn

from ...text.caption import clean_caption
from ...text.encoder import T5TextEncoder
from ...vae import VAE

TOKENS_PER_PASS = 8192
_KEPT_BYTES = 1 << 30
_TILE_ABOVE, _TILE = 2048, 1024  # HED sees larger pictures in tiles

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class CaptionEncoder:
    """T5 states of captions; those used last are kept, so that a common caption is encoded once.

    `encoded` counts the captions that T5 has read, `cut` those longer than `max_tokens`.
    """

    def __init__(self, encoder: T5TextEncoder, max_tokens: int, clean: bool,
                 dtype: torch.dtype) -> None:
        self.encoder = encoder
        self.max_tokens = max_tokens
        self.clean = clean
        self.dtype = dtype
        self.encoded = 0
        self.cut = 0
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._kept_bytes = 0

    def bytes(self, text: str) -> int:
        """What the states of a caption take in a shard."""
        tokens = len(self._ids(self._cleaned(text)))
        return tokens * self.encoder.caption_channels * self.dtype.itemsize

    def __call__(self, texts: Iterable[str], progress: Callable[[int, int], None] | None = None
                 ) -> dict[str, Tensor]:
        """States (L, D) without padding of every caption, on the CPU, in the dtype of the cache.

        Raises ValueError where T5 gives numbers that the dtype cannot hold.
        """
        cleaned = {text: self._cleaned(text) for text in dict.fromkeys(texts)}
        found = {key: self._kept[key] for key in cleaned.values() if key in self._kept}
        for key in found:
            self._kept.move_to_end(key)
        missing = {key: self._ids(key, count_cut=True)
                   for key in dict.fromkeys(cleaned.values()) if key not in found}
        done = 0
        for keys in _passes(missing):
            ids = [missing[key] for key in keys]
            states, _ = self.encoder.encode_ids(ids, max(map(len, ids)))
            states = stored(states, self.dtype, "T5")
            for key, own, rows in zip(keys, ids, states, strict=True):
                found[key] = rows[: len(own)].clone()
                self._keep(key, found[key])
            self.encoded += len(keys)
            done += len(keys)
            if progress is not None:
                progress(done, len(missing))
        return {text: found[key] for text, key in cleaned.items()}

    def _cleaned(self, text: str) -> str:
        return clean_caption(text) if self.clean else text

    def _ids(self, text: str, count_cut: bool = False) -> list[int]:
        caption = self.encoder.tokenizer.encode(text, self.max_tokens)
        self.cut += count_cut and caption.is_cut
        return caption.ids

    def _keep(self, key: str, states: Tensor) -> None:
        self._kept[key] = states
        self._kept_bytes += states.nbytes
        while self._kept_bytes > _KEPT_BYTES:
            self._kept_bytes -= self._kept.popitem(last=False)[1].nbytes


def _passes(ids: dict[str, list[int]]) -> Iterator[list[str]]:
    """Captions of about equal length together, the longest first."""
    batch: list[str] = []
    for key in sorted(ids, key=lambda key: len(ids[key]), reverse=True):
        if batch and (len(batch) + 1) * len(ids[batch[0]]) > TOKENS_PER_PASS:
            yield batch
            batch = []
        batch.append(key)
    if batch:
        yield batch


def encode_pictures(vae: VAE, pictures: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Latents (B, 4, h, w) on the CPU of pictures (3, H, W), uint8 or float in 0..1."""
    return stored(vae.encode(_unit(pictures, vae.device)), dtype, "the VAE")


def find_edges(detector: nn.Module, pictures: Sequence[Tensor]) -> list[Tensor]:
    """HED's edges of pictures, white on black, as pictures (3, H, W) in 0..1."""
    pixels = _unit(pictures, next(detector.parameters()).device)
    tile = _TILE if max(pixels.shape[-2:]) > _TILE_ABOVE else None
    with torch.no_grad():
        return list(detector(pixels, tile).expand(-1, 3, -1, -1))


def stored(values: Tensor, dtype: torch.dtype, source: str) -> Tensor:
    """`values` on the CPU in the dtype of the cache; ValueError where they are no longer finite."""
    if not values.isfinite().all():
        raise ValueError(f"{source} gives NaN or infinite values in the dtype that it computes in; "
                         "use a wider one (float32)")
    narrow = values.to(dtype)
    if not narrow.isfinite().all():
        raise ValueError(f"{source} gives values of up to {values.abs().max().item():.3g}, too "
                         f"large for {str(dtype).removeprefix('torch.')}; store bfloat16 or "
                         "float32 instead")
    return narrow.cpu()


def _unit(pictures: Sequence[Tensor], device: torch.device) -> Tensor:
    pixels = torch.stack(list(pictures)).to(device)
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels


def in_order(pool: ThreadPoolExecutor, function: Callable[[_Item], _Result],
             items: Iterable[_Item], ahead: int) -> Iterator[_Result]:
    """function(item) of every item, in order, at most `ahead` of them made before they are used."""
    waiting: deque[Future[_Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
