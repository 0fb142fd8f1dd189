"""The subjects of a build: made of the files that the order names, and checked against the base's slots."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dreammix_trt.building.order import BuildOrder, SubjectOrder
from dreammix_trt.core.attributes import AttributeDictionary
from dreammix_trt.core.errors import FileFormatError, InputError
from dreammix_trt.core.lora import Lora, LoraSpec, read_lora
from dreammix_trt.core.lora_names import join_first
from dreammix_trt.core.lora_words import find_words
from dreammix_trt.core.merging import check_fit, find_misfits
from dreammix_trt.core.networks import Network, networks_of_factors
from dreammix_trt.core.remarks import keep_remarks
from dreammix_trt.core.subject import Subject, find_subject_file, make_subject, open_subject
from dreammix_trt.core.token_adapter import TokenAdapter
from dreammix_trt.core.token_factors import check_tokens

Tell = Callable[[str], None]


@dataclass(frozen=True)
class MadeSubject:
    """A subject, what it was asked for as, and the LoRAs that it was made of; none for a subject file."""

    subject: Subject
    order: SubjectOrder
    loras: Sequence[tuple[Lora, LoraSpec]] = ()

    @property
    def sources(self) -> str:
        """Its files."""
        return ", ".join(str(spec.file) for spec in self.order.files)


def make_subjects(order: BuildOrder, unet_config: Mapping[str, Any], tell: Tell) -> list[MadeSubject]:
    """Make the subjects of an order.

    tell: called with what the files say of their subjects, and with how to have two where LoRAs are one.

    Raises FileFormatError for files that cannot be used, InputError for two subjects of one name, and for a subject
    file among LoRAs that work together or to be merged.
    """
    with keep_remarks(tell=False) as remarks:
        made = [_make(each, order, unet_config, tell) for each in order.subject_orders]
    for remark in remarks:
        tell(remark)
    names = [each.subject.name for each in made]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"two subjects are called {twice!r}; name them: --subject one=FILE --subject other=FILE")
    return made


def check_slots(
    made: MadeSubject, networks: Sequence[Network], order: BuildOrder, adapter: TokenAdapter | None = None
) -> None:
    """Raise FileFormatError for a subject that does not fit the slots; it begins with the command that helps.

    adapter: the base's, which must be that of a subject's tokens.
    """
    subject, slots = made.subject, {network.name: network.slots for network in networks}
    if subject.tokens is not None:
        try:
            check_tokens(subject.tokens, adapter)
        except FileFormatError as error:
            raise FileFormatError(f"subject {subject.name}: {error}") from error
        if not order.slots:
            raise FileFormatError(
                f"subject {subject.name}: is of tokens, which are read with the adapter's LoRA, and --no-slots leaves "
                "no room for one: leave that option"
            )
    taken = {
        name: [slot for each in networks_of_factors(name) for slot in slots.get(each, ())] for name in subject.factors
    }
    for name in subject.factors:
        if name not in slots:
            raise FileFormatError(
                f"subject {subject.name}: has factors for {name}, which this base does not have; "
                "give its LoRA the target 'patched'"
            )
    found = {name: find_misfits(factors, taken[name]) for name, factors in subject.factors.items()}
    homeless = sum(len(misfits.homeless) for misfits in found.values())
    if homeless and made.loras and not any(misfits.foreign for misfits in found.values()):
        command = replace(_order_alone(made, order), merge=True).command()
        kinds = sorted({kind for misfits in found.values() for kind in misfits.homeless_kinds})
        why = "which attention alone has" if order.slots else "as --no-slots asks"
        raise FileFormatError(
            f"subject {subject.name}: merge it into the weights of an engine of its own: `{command}`; "
            f"{homeless} of its {sum(map(len, subject.factors.values()))} layers have no slots, {why}: "
            f"{join_first(kinds, 8)}"
        )
    for name, factors in subject.factors.items():
        try:
            check_fit(factors, taken[name])
        except FileFormatError as error:
            raise FileFormatError(f"subject {subject.name}: {error}") from error


def _make(asked: SubjectOrder, order: BuildOrder, unet_config: Mapping[str, Any], tell: Tell) -> MadeSubject:
    attributes = AttributeDictionary.read(asked.attributes) if asked.attributes else None
    words: dict[str, Any] = {"token": asked.token, "class_name": asked.class_name, "attributes": attributes}
    files = [spec for spec in asked.files if find_subject_file(spec.file)]
    if files and (len(asked.files) > 1 or order.merge):
        what = "bake in" if order.merge else "put together with others"
        raise InputError(f"{files[0].file} is a subject file, not a LoRA to {what}; give the LoRA it was made of")
    if files:
        made = MadeSubject(open_subject(files[0], unet_config, name=asked.name, **words), asked)
        _tell_class(made, attributes, tell)
        return made
    loras = [(read_lora(spec.file, unet_config), spec) for spec in asked.files]
    made = MadeSubject(make_subject(loras, order.out, asked.name, **words), asked, loras)
    _tell_words(made, len(order.subject_orders) > 1, tell)
    _tell_class(made, attributes, tell)
    if len(loras) > 1:
        apart = " ".join(f"--subject NAME{n}={spec.file}" for n, (_, spec) in enumerate(loras, 1))
        tell(
            f"{len(loras)} LoRAs work together as one subject, {made.subject.name!r}; for subjects that requests "
            f"choose between, give each a name: {apart}"
        )
    return made


def _tell_words(made: MadeSubject, several: bool, tell: Tell) -> None:
    """Say where the trigger word comes from, unless our own trainer wrote it; and where the file names another one."""
    words = [find_words(lora.source_path, lora.metadata) for lora, _ in made.loras]
    found = next((each for each in words if each.token), None)
    if made.order.token:
        if found is not None and found.token != made.order.token:
            tell(
                f"{made.sources}: its {found.source} says that its trigger word is {found.token!r}; "
                f"{made.order.token!r} is taken, as asked"
            )
        return
    place = f"{made.subject.name}=WORD" if several else "WORD"
    if found is None:
        tell(
            f"{made.sources}: does not say its trigger word, so {made.subject.token!r} is taken; give it with "
            f"--token {place} (and --class-name)"
        )
    elif found.source != "token":
        told = f"trigger word {found.token!r}" + (f", class {found.class_name!r}" if found.class_name else "")
        tell(f"{made.sources}: {told} (says its {found.source}); --token {place} and --class-name change that")


def _tell_class(made: MadeSubject, attributes: AttributeDictionary | None, tell: Tell) -> None:
    """Say where a subject is of another class than its attributes' file says."""
    subject = made.subject
    if attributes is not None and attributes.class_name.lower() != subject.class_name.lower():
        tell(
            f"{made.order.attributes}: the attributes are of a {attributes.class_name!r}, and are taken for subject "
            f"{subject.name!r}, a {subject.class_name!r}"
        )


def _order_alone(made: MadeSubject, order: BuildOrder) -> BuildOrder:
    """The order of an engine with this subject alone; beside the one that was asked for where that has several."""
    if len(order.subject_orders) == 1:
        return order
    subject = made.subject
    return replace(
        order,
        out=f"{order.out}-{subject.name}",
        lora=list(made.order.files),
        subjects={},
        name=subject.name,
        token=subject.token,
        class_name=subject.class_name,
        attributes=made.order.attributes,
    )
