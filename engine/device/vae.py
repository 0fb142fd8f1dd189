"""The VAE on a device, whole or in tiles."""

from __future__ import annotations

from dreammix_trt.core.axes import FACTOR
from dreammix_trt.core.networks import flag_of
from dreammix_trt.core.noise import DRAWS
from dreammix_trt.core.seam import Array
from dreammix_trt.engine.device.tools import CHANNELS, RoomTools


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
            self.convert(latent, network)

    def decode(self, k: int, latent: Array, out: Array, flag: Array | None = None) -> None:
        """Decode a scaled latent to a picture.

        out: where it is written, uint8 (h, w, 3).
        flag: reports values that are not finite; None: picture k's.
        """
        arrays, (height, width) = self._tools.room.arrays["vae_decoder"], self._tools.room.shape.size
        image = arrays["image"]
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
            self._tools.room.enqueue("vae_decoder", self._tools.stream)
        else:
            image = self._decode_tiles(latent)
        self._tools.launch(
            "decoded",
            image=image,
            out=out,
            height=height,
            width=width,
            half=image.half,
            flags=flag or self._tools.flag(k),
            bit=flag_of("vae_decoder"),
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
        source, height, width = self._tools.image(), *self._tools.room.shape.size
        for number, tile in enumerate(tiling.tiles()):
            image = arrays["image"]
            self._tools.launch(
                "take_tile",
                source=source,
                out=image,
                channels=3,
                height=height,
                width=width,
                row=FACTOR * tile.row,
                col=FACTOR * tile.col,
                tile_height=FACTOR * tiling.height,
                tile_width=FACTOR * tiling.width,
                source_half=source.half,
                out_half=image.half,
            )
            self._tools.room.enqueue("vae_encoder", self._tools.stream)
            for part, name in enumerate(("mean", "std")):
                self._add_tile(arrays[name], number, 1, moments[part], (h, w), (tile.row, tile.col), CHANNELS)
        return moments[0], moments[1]

    def _decode_tiles(self, latent: Array) -> Array:
        """The whole frame's image, float32 (3, H, W), from tiles of a scaled latent."""
        arrays, tiling, (h, w) = (
            self._tools.room.arrays["vae_decoder"],
            self._tools.room.shape.tiling,
            self._tools.room.shape.latent,
        )
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
        for number, tile in enumerate(tiling.tiles()):
            given = arrays["latent"]
            self._tools.launch(
                "take_tile",
                source=unscaled,
                out=given,
                channels=CHANNELS,
                height=h,
                width=w,
                row=tile.row,
                col=tile.col,
                tile_height=tiling.height,
                tile_width=tiling.width,
                source_half=False,
                out_half=given.half,
            )
            self._tools.room.enqueue("vae_decoder", self._tools.stream)
            place = FACTOR * tile.row, FACTOR * tile.col
            self._add_tile(arrays["image"], number, FACTOR, image, (height, width), place, 3)
        return image

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

    def convert(self, source: Array, out: Array) -> None:
        self._tools.launch(
            "convert", source=source, source_half=source.half, out=out, out_half=out.half, count=source.size
        )
