"""The VAE on a device, whole or in tiles."""

from __future__ import annotations

from typing import Final

from dreammix_trt.core.axes import FACTOR
from dreammix_trt.core.networks import flag_of
from dreammix_trt.core.noise import DRAWS
from dreammix_trt.core.seam import Array
from dreammix_trt.engine.canvas.tiles import Tile
from dreammix_trt.engine.device.tools import CHANNELS, RoomTools

#: what a decoder's picture is called
DECODERS: Final = {"vae_decoder": "image", "asuka_decoder": "picture"}


class Vae:
    """The VAE in one room. `k` is a picture's number."""

    def __init__(self, tools: RoomTools) -> None:
        self._tools = tools

    def encode(self, k: int, latent: Array, draw: str, network: Array | None = None) -> None:
        """Encode the VAE's input to a scaled latent.

        latent: where it is written, float32 (4, h, w).
        draw: name of the noise, where the request samples the posterior.
        network: a network's input that gets it as well, in its own type.
        """
        arrays, (h, w) = self._tools.room.arrays["vae_encoder"], self._tools.room.shape.latent
        mean, std = arrays["mean"], arrays["std"]
        if self._tools.room.shape.tiling is None:
            self._tools.room.enqueue("vae_encoder", self._tools.stream)
        else:
            mean, std = self._encode_tiles()
        self._tools.launch(
            "encode_latent",
            mean=mean,
            std=std,
            job=self._tools.arena["jobs"][k],
            latent=latent,
            network=None,
            scaling=self._tools.facts.scaling_factor,
            draw=DRAWS[draw],
            channels=CHANNELS,
            height=h,
            width=w,
            half=mean.half,
            flags=self._tools.flag(k),
            bit=flag_of("vae_encoder"),
        )
        if network is not None:
            self._tools.convert(latent, network)

    def decode(
        self, k: int, latent: Array, out: Array, flag: Array | None = None, network: str = "vae_decoder"
    ) -> None:
        """Decode a scaled latent to a picture.

        out: where it is written, uint8 (h, w, 3).
        flag: reports values that are not finite; None: picture k's.
        network: the VAE's own, or "asuka_decoder", for which `RoomTools.seen` is filled.
        """
        arrays, (height, width) = self._tools.room.arrays[network], self._tools.room.shape.size
        image = arrays[DECODERS[network]]
        if self._tools.room.shape.tiling is None:
            given = arrays["latent"]
            self._tools.launch(
                "scaled",
                latent=latent,
                factor=self._tools.facts.scaling_factor,
                out=given,
                count=latent.size,
                half=given.half,
            )
            self._tools.room.enqueue(network, self._tools.stream)
        else:
            image = self._decode_tiles(latent, network)
        self._tools.launch(
            "decoded",
            image=image,
            out=out,
            height=height,
            width=width,
            half=image.half,
            flags=flag or self._tools.flag(k),
            bit=flag_of(network),
        )

    def _encode_tiles(self) -> tuple[Array, Array]:
        """Mean and std of the whole frame's image, float32, from tiles."""
        arrays, tiling, (h, w) = (
            self._tools.room.arrays["vae_encoder"],
            self._tools.room.shape.tiling,
            self._tools.room.shape.latent,
        )
        assert tiling is not None
        moments = self._tools.arena["tile moments"].reshape((2, CHANNELS, h, w))
        self._tools.device.clear(moments, self._tools.stream)
        source = self._tools.image()
        for number, tile in enumerate(tiling.tiles()):
            self._take_tile(source, arrays["image"], FACTOR, tile)
            self._tools.room.enqueue("vae_encoder", self._tools.stream)
            for part, name in enumerate(("mean", "std")):
                self._add_tile(arrays[name], number, 1, moments[part], (h, w), (tile.row, tile.col), CHANNELS)
        return moments[0], moments[1]

    def _decode_tiles(self, latent: Array, network: str) -> Array:
        """The whole frame's image, float32 (3, H, W), from tiles of a scaled latent, and of what the network sees."""
        arrays, tiling = self._tools.room.arrays[network], self._tools.room.shape.tiling
        assert tiling is not None
        height, width = self._tools.room.shape.size
        image, unscaled = self._tools.arena["tile image"].reshape((3, height, width)), self._tools.latents("x in")[0]
        self._tools.device.clear(image, self._tools.stream)
        self._tools.launch(
            "scaled",
            latent=latent,
            factor=self._tools.facts.scaling_factor,
            out=unscaled,
            count=latent.size,
            half=False,
        )
        seen = dict(zip(("image", "mask"), self._tools.seen(), strict=True)) if network == "asuka_decoder" else {}
        for number, tile in enumerate(tiling.tiles()):
            self._take_tile(unscaled, arrays["latent"], 1, tile)
            for name, whole in seen.items():
                self._take_tile(whole, arrays[name], FACTOR, tile)
            self._tools.room.enqueue(network, self._tools.stream)
            place = FACTOR * tile.row, FACTOR * tile.col
            self._add_tile(arrays[DECODERS[network]], number, FACTOR, image, (height, width), place, 3)
        return image

    def _take_tile(self, source: Array, out: Array, factor: int, tile: Tile) -> None:
        """Cut a tile of the whole frame.

        source: ([1,] C, H, W).
        factor: 1: of latent cells; `FACTOR`: of pixels.
        tile: in latent cells.
        """
        channels, height, width = source.shape[-3:]
        tile_height, tile_width = out.shape[-2:]
        self._tools.launch(
            "take_tile",
            source=source,
            out=out,
            channels=channels,
            height=height,
            width=width,
            row=factor * tile.row,
            col=factor * tile.col,
            tile_height=tile_height,
            tile_width=tile_width,
            source_half=source.half,
            out_half=out.half,
        )

    def _add_tile(
        self,
        tile: Array,
        number: int,
        factor: int,
        out: Array,
        size: tuple[int, int],
        place: tuple[int, int],
        channels: int,
    ) -> None:
        rows, cols = self._tools.room.ramps(factor)[number]
        tiling = self._tools.room.shape.tiling
        assert tiling is not None
        self._tools.launch(
            "add_tile",
            tile=tile,
            ramp_rows=rows,
            ramp_cols=cols,
            out=out,
            channels=channels,
            height=size[0],
            width=size[1],
            row=place[0],
            col=place[1],
            tile_height=factor * tiling.height,
            tile_width=factor * tiling.width,
            half=tile.half,
        )
