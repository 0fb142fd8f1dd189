"""Builds with ASUKA's networks: parts of their own, run by ONNX Runtime, bound on a device, refused for other bases."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from dreammix_trt.building import BaseSources, build  # noqa: E402
from dreammix_trt.building import parts as parts_module  # noqa: E402
from dreammix_trt.core.asuka_folder import PARTS, write_asuka  # noqa: E402
from dreammix_trt.core.checkpoint import BaseFiles  # noqa: E402
from dreammix_trt.core.errors import FileFormatError  # noqa: E402
from dreammix_trt.core.passport import Passport  # noqa: E402
from dreammix_trt.engine import DreamMix  # noqa: E402
from dreammix_trt.engine.device.memory_plan import Options  # noqa: E402
from dreammix_trt.engine.device.room import RoomShape  # noqa: E402
from dreammix_trt.engine.drivers.simulated import SimulatedDevice, SimulatedNetworks  # noqa: E402
from dreammix_trt.export.torch_backend.engine_set import TorchEngineSet  # noqa: E402
from tests.engine.conftest import make_scene  # noqa: E402
from tests.support.asuka import make_states, small_config, write_small_asuka  # noqa: E402

NAMES = ("asuka_prior", "asuka_decoder")


@dataclass(frozen=True)
class Look:
    """A phase of a device that runs a network."""

    name: str


@pytest.fixture(scope="module")
def folder(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("asuka") / "asuka"
    write_small_asuka(place, BaseFiles.open(small_base))
    return place


@pytest.fixture(scope="module")
def engine(test_home: Path, small_base: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("engines") / "with"
    build(out=out, base=small_base, asuka=folder)
    return out


def draw(side: int, seed: int = 0) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    """Inputs of the decoder at a frame of `side` pixels; the prior takes its image and mask at its own side."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((1, 1, side, side), np.float32)
    mask[..., side // 4 : side // 2, side // 3 : side // 2] = 1
    image = rng.uniform(-1, 1, (1, 3, side, side)).astype(np.float32)
    return {
        "latent": rng.standard_normal((1, 4, side // 8, side // 8)).astype(np.float32),
        "image": image,
        "mask": mask,
    }


def test_they_are_parts_with_keys_of_their_own(engine: Path, small_base: Path, folder: Path, tmp_path: Path) -> None:
    passport = Passport.read(engine)
    parts = passport.parts
    assert {*NAMES} <= parts.keys()
    assert passport.base["asuka"].keys() == {
        f"asuka/{name}" for name in ("config.json", *map("{}.safetensors".format, PARTS))
    }
    assert f"--asuka {folder}" in passport.command
    assert all(entry.parity["max_rel"] < 1e-4 for entry in passport.networks if entry.name in NAMES)
    plain = build(out=tmp_path / "without", base=small_base)
    assert plain.parts.keys() == parts.keys() - {*NAMES}
    assert (plain.base_key, plain.base["files"]) == (passport.base_key, passport.base["files"]), "the base is the same"
    assert all(plain.parts[name] == parts[name] for name in plain.parts if name != "base")
    config = small_config(BaseFiles.open(small_base))
    write_asuka(
        tmp_path / "asuka", config, {**make_states(config), "decoder": make_states(config, 1)["decoder"]}, "float32"
    )
    other = build(out=tmp_path / "other", base=small_base, asuka=tmp_path / "asuka").parts
    assert [name for name in parts if other[name] != parts[name]] == ["asuka_decoder"]


def test_the_embedded_base_brings_its_own(test_home: Path, tmp_path: Path) -> None:
    """So `remove` works with nothing but what pip installed, and nothing has to be traced."""
    told: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts_module, "write_graph", lambda *_: pytest.fail("a graph was traced"))
        passport = build(out=tmp_path / "engine", verify=False, notice=told.append)
    assert {*NAMES} <= passport.parts.keys() and told == []
    assert "--asuka" not in passport.command
    image, mask = make_scene()
    with DreamMix.load(tmp_path / "engine", threads=1) as dm:
        result = dm.remove(image, mask, num_inference_steps=2)
    assert result.warnings == ()
    assert (np.asarray(result.images[0])[:16] == image[:16]).all()


def test_those_of_the_base_s_folder_are_found_and_looked_at_by_build_alone(small_base: Path, tmp_path: Path) -> None:
    """A folder that is broken stops no training of a base, which does not use it."""
    base = tmp_path / "base"
    shutil.copytree(small_base, base)
    write_small_asuka(base / "asuka", BaseFiles.open(small_base))
    assert BaseFiles.open(base).asuka is None
    found = BaseSources(base).open().find_own_extras().asuka
    assert found is not None and found.folder == base / "asuka"
    (base / "asuka" / "prior.safetensors").unlink()
    (base / "asuka" / "decoder.safetensors").unlink()
    assert BaseFiles.open(base).hash_contents() == BaseFiles.open(small_base).hash_contents()
    with pytest.raises(FileFormatError, match="has neither"):
        build(out=tmp_path / "engine", base=base)
    assert BaseSources(base).open().asuka is None, "what every training opens"


def test_a_base_without_them_keeps_its_key(small_base: Path) -> None:
    from dreammix_trt.building.engine_options import EngineOptions
    from dreammix_trt.building.ingredients import Ingredients
    from dreammix_trt.core.store import Store

    base = BaseFiles.open(small_base)
    made = Ingredients(base, True, EngineOptions(), (), {})
    components = ("text_encoder", "text_encoder_2", "vae", "inpaint_head", "unet", "unet_raw")
    biases = {"unet": {"patch_biases": base.patch_biases}}
    sources = {name: {"files": base.hash_contents(name), "loras": [], **biases.get(name, {})} for name in components}
    assert made.base_key == Store.key({"sources": sources, "slots": True})


def test_onnx_runtime_gives_what_torch_gives(engine: Path, small_base: Path, folder: Path) -> None:
    truth = TorchEngineSet(BaseFiles.open(small_base, asuka=folder))
    with DreamMix.load(engine, threads=1) as dm:
        assert dm.facts.prior_side == 16
        given = draw(64)
        small = draw(dm.facts.prior_side)
        for name, arrays in (("asuka_decoder", given), ("asuka_prior", {k: small[k] for k in ("image", "mask")})):
            found, wanted = dm.networks.run(name, **arrays), truth.run(name, **arrays)
            for key, value in wanted.items():
                np.testing.assert_allclose(found[key], value, atol=1e-4 * np.abs(value).max(), rtol=0)


def test_a_device_plans_loads_and_binds_them(engine: Path) -> None:
    device = SimulatedDevice()
    with DreamMix.load(engine, threads=1) as host:
        networks = SimulatedNetworks(device, host.networks)
        options = Options(largest_picture=128 * 128)
        with DreamMix.on_device(device, networks, host.tokenizers, (), options, owned=(device,)) as dm:
            image, mask = make_scene()
            dm.inpaint(image, mask, "a mug", num_inference_steps=2, seed=1)
            studio, side = dm.studio, host.facts.native_side
            assert studio is not None and all(name in str(studio.plan) for name in NAMES)
            room, _ = studio.rooms.enter(RoomShape((side, side), 1, 2))
            studio.residency.need(*NAMES)
            given, small = draw(side), draw(16)
            for name, arrays in (("asuka_decoder", given), ("asuka_prior", {k: small[k] for k in ("image", "mask")})):
                for key, value in arrays.items():
                    studio.put(room.arrays[name][key], value)
                for _ in range(2):  # run plainly and captured, then replayed
                    room.play(
                        Look(name), lambda look: room.enqueue(look.name, studio.stream), studio.stream, capture=True
                    )
                wanted = host.networks.run(name, **arrays)
                for key, value in wanted.items():
                    found = studio.bring(room.arrays[name][key])
                    np.testing.assert_allclose(found, value, atol=1e-5 * np.abs(value).max(), rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prior": {"context_width": 768}}, "prior: context_width is 768, but this base's UNet's condition has 160"),
        ({"prior": {"pooled_width": 1280}}, "prior: pooled_width is 1280, but this base's pooled text has 96"),
        ({"decoder": {"latent_channels": 16}}, "decoder: latent_channels is 16, but this base's latent has 4"),
    ],
    ids=["sd15", "sdxl", "flux"],
)
def test_those_of_another_base_are_refused(
    small_base: Path, tmp_path: Path, change: dict[str, dict[str, int]], message: str
) -> None:
    config = small_config(BaseFiles.open(small_base))
    config = replace(
        config,
        prior=replace(config.prior, **change.get("prior", {})),
        decoder=replace(config.decoder, **change.get("decoder", {})),
    )
    write_asuka(tmp_path / "asuka", config, make_states(config))
    with pytest.raises(FileFormatError, match=message):
        build(out=tmp_path / "engine", base=small_base, asuka=tmp_path / "asuka")
    assert not (tmp_path / "engine").exists()


def test_weights_that_the_configuration_does_not_describe_are_named(small_base: Path, tmp_path: Path) -> None:
    config = small_config(BaseFiles.open(small_base))
    states = make_states(config)
    del states["prior"]["mae.alpha"]
    write_asuka(tmp_path / "asuka", config, states)
    with pytest.raises(FileFormatError, match=r"asuka_prior: .*mae\.alpha is missing"):
        build(out=tmp_path / "engine", base=small_base, asuka=tmp_path / "asuka")


def test_a_prior_that_is_not_aligned_is_refused_before_the_build(small_base: Path, tmp_path: Path) -> None:
    config = small_config(BaseFiles.open(small_base))
    states = {name: value for name, value in make_states(config)["prior"].items() if name.startswith("mae.")}
    write_asuka(tmp_path / "asuka", config, {"prior": states})
    with pytest.raises(FileFormatError, match="the prior is not aligned; align it: dreammix-trt train-asuka align"):
        build(out=tmp_path / "engine", base=small_base, asuka=tmp_path / "asuka")
