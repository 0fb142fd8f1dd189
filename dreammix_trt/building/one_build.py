"""One build: an order carried out, from the files that it names to the engine directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from dreammix_trt.building.calibrated import find_calibration
from dreammix_trt.building.defaults import Defaults, fill_in
from dreammix_trt.building.engine_options import EngineOptions
from dreammix_trt.building.ingredients import Ingredients
from dreammix_trt.building.made import describe_made, find_same, list_remarks
from dreammix_trt.building.order import BaseSources, BuildOrder, LoraOption
from dreammix_trt.building.part_store import PartStore
from dreammix_trt.building.parts import Parts
from dreammix_trt.building.subjects import MadeSubject, check_slots, make_subjects
from dreammix_trt.core.errors import DreamMixError
from dreammix_trt.core.files import folder_bytes, sha256_of
from dreammix_trt.core.lora import read_lora
from dreammix_trt.core.network_weights import BaseLora
from dreammix_trt.core.passport import FILE_NAME as PASSPORT
from dreammix_trt.core.passport import Passport
from dreammix_trt.core.store import Store
from dreammix_trt.engine.backends.tensorrt.builder import Estimate, check_room
from dreammix_trt.engine.directory import write_engine

Update = Callable[[str, float, str], None]


def build(
    lora: LoraOption | Sequence[LoraOption] | None = None,
    *,
    out: str | Path,
    base: str | Path | None = None,
    patch: str | Path | None = None,
    head: str | Path | None = None,
    vae: str | Path | None = None,
    tokenizer: str | Path | None = None,
    asuka: str | Path | None = None,
    tokens: str | Path | None = None,
    subjects: Mapping[str, LoraOption] | None = None,
    name: str | None = None,
    token: str | Mapping[str, str] | None = None,
    class_name: str | Mapping[str, str] | None = None,
    attributes: str | Path | Mapping[str, str | Path] | None = None,
    merge: bool = False,
    slots: bool = True,
    patch_biases: bool = False,
    base_loras: Sequence[LoraOption] = (),
    defaults: Defaults | None = None,
    engine: EngineOptions | None = None,
    verify: bool | None = None,
    store: str | Path | None = None,
    self_contained: bool = False,
    keep: bool = False,
    progress: Update | None = None,
    notice: Callable[[str], None] | None = None,
) -> Passport:
    """Make the engine directory `out` and return its passport.

    lora: file or folder of the subject, or several, each as "FILE[:scale[:target]]" (target: "patched", "raw" or "both"
        UNets), which then work together; None: a base alone.
    subjects: several subjects by name, each a subject file or a LoRA as `lora` is.
    base: diffusers folder or single file; None: the embedded model.
    patch, head: None: those beside the base.
    vae, tokenizer: instead of the base's.
    asuka: folder of ASUKA's prior and decoder; None: that in the base's folder, if any.
    tokens: token adapter of the base (`core/token_adapter.py`); None: that in the base's folder, if any.
    name: of the subject of `lora`; None: its class, where that is known, else from `out`.
    token, class_name: the subject's word in prompts, and what it is; of several, by name. None: as the LoRA's metadata
        says (`core/lora_words.py`), else "sks" and nothing.
    attributes: file of the subject's attributes (`core/attributes.py`); of several, by name. None: as the LoRA's
        metadata says.
    merge: bake the subject into weights of its own.
    slots: whether subjects can be swapped in; without, the engine draws the base alone, or the subject that is merged.
    patch_biases: apply the patch's biases, too.
    base_loras: merged into the base (few-step, style), given as `lora` is, target "both" by default.
    defaults: of requests to this base; filled in for LCM, Lightning and Hyper-SD LoRAs.
    engine: back end, precision, GPUs, shapes.
    verify: compare every network with torch, or none; None: those that are small enough.
    store: where parts are kept; None: in DREAMMIX_HOME.
    self_contained: copy the base's parts into `out`.
    keep: leave the engine in `out` where the same order made it of the same files, and nothing of it is missing.
    progress: called with (part, fraction, message).
    notice: called with what a person should know.

    Raises FileFormatError, InputError, BuildError; `out` is then as it was.
    """
    order = BuildOrder(
        out,
        BaseSources(base, patch, head, vae, tokenizer, patch_biases, asuka, tokens),
        lora,
        base_loras,
        subjects=subjects or {},
        name=name,
        token=token,
        class_name=class_name,
        attributes=attributes,
        merge=merge,
        slots=slots,
        defaults=defaults or Defaults(),
        engine=engine or EngineOptions(),
        verify=verify,
        store=store,
        self_contained=self_contained,
        keep=keep,
    )
    return carry_out(order, progress or (lambda *_: None), notice or (lambda _: None))


def carry_out(order: BuildOrder, update: Update, tell: Callable[[str], None]) -> Passport:
    """Build what is ordered; see `build`."""
    order.check()
    shelf = Store(Path(order.store) if order.store else None)
    files = order.base.open().find_own_extras()
    order.check_outside(files)
    for remark in list_remarks(files):
        tell(remark)
    config = files.configs["unet"]
    made = make_subjects(order, config, tell)
    merged = [(read_lora(spec.file, config), spec) for spec in order.base_specs]
    defaults = fill_in(order.defaults, order.base_specs, tell)
    baked = [*merged, *made[0].loras] if order.merge else merged
    loras = [(BaseLora(lora, spec.scale, spec.target), sha256_of(lora.source_path)) for lora, spec in baked]
    calibration = find_calibration(order, files)
    ingredients = Ingredients(files, order.slots, order.engine, loras, defaults.to_dict(), calibration)
    found = find_same(order, ingredients, made) if order.keep else None
    if found:
        tell(f"{order.out}: built before, by the same command of the same files")
        return found
    store = PartStore(shelf, order.place, update)
    parts = Parts(ingredients, store, order.verify, tell)
    if files.tokens and not order.slots:
        tell("--no-slots leaves no place for the token adapter's LoRA, so no subject of one picture can be drawn")
    for each in () if order.merge else made:
        check_slots(each, ingredients.networks, order, files.tokens)
    folders = parts.make()
    ingredients = _settle_precision(order, ingredients, folders, tell)
    if order.self_contained:
        check_room(Estimate(0, sum(folder_bytes(folder) for folder in folders.values())), order.place.parent)
    _tell_replaced(order, order.command(defaults.to_dict()), tell)
    passport = _write(order, ingredients, store, folders, made)
    shelf.register(order.place, () if order.self_contained else set(store.keys.values()))
    return passport


def _settle_precision(
    order: BuildOrder, ingredients: Ingredients, folders: Mapping[str, Path], tell: Callable[[str], None]
) -> Ingredients:
    """The same ingredients; with float32 instead of bfloat16 where that changes the pictures too much."""
    engine, base = ingredients.engine, ingredients.base
    if engine.precision != "bfloat16":
        return ingredients
    from dreammix_trt.building.bfloat16 import LEAST_PSNR, choose_count, look_at_pictures

    count = choose_count(engine.look, base.native_side)
    if not count:
        tell("no picture was painted to see what bfloat16 changes; `--look 2` paints two of this base's, in minutes")
        return ingredients
    found = look_at_pictures(base, folders, count)
    tell(str(found))
    if found.good:
        return ingredients
    tell(f"that is less than {LEAST_PSNR:g} dB, so this engine computes in float32")
    return replace(ingredients, engine=replace(engine, precision="float32"))


def _tell_replaced(order: BuildOrder, command: str, tell: Callable[[str], None]) -> None:
    """Say that an engine makes room for this one, and how it is made again; nothing where it is the same command's."""
    if not (order.place / PASSPORT).is_file():
        return
    with suppress(DreamMixError):  # a damaged one
        former = Passport.read(order.place).command
        if former != command:
            tell(f"{order.out}: replaces the engine that was there; this makes that one again: {former}")


def _write(
    order: BuildOrder,
    ingredients: Ingredients,
    store: PartStore,
    folders: Mapping[str, Path],
    made: Sequence[MadeSubject],
) -> Passport:
    """Write the engine directory from the parts' folders."""
    files, engine = ingredients.base, ingredients.engine
    kept = [(replace(each.subject, base_key=ingredients.base_key), each.sources) for each in made]
    if order.merge:  # the factors are in the weights; the words stay a subject
        kept = [(replace(subject, factors={}), sources) for subject, sources in kept]
    return write_engine(
        Path(order.out),
        parts=folders,
        keys=store.keys,
        files=store.files(),
        subjects=kept,
        adapter=files.tokens.file if files.tokens else None,
        self_contained=order.self_contained,
        precision=engine.precision,
        **describe_made(order, ingredients, made),
    )
