"""One inpainting as a value: every parameter under its public name, checked, and stored beside the picture as JSON.

Names are those of diffusers where it has the parameter. Defaults are those of the authors' published notebook
(docs/algorithm.md, 14.1). Pictures are not part of a request.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from dreammix_trt.core.config_fields import MOST_TOKENS
from dreammix_trt.core.errors import InputError
from dreammix_trt.core.field_checks import (
    FLAG,
    SHARE,
    SIZE,
    TEXT,
    WORDS_OR_AUTO,
    Check,
    number,
    one_of,
    or_none,
    several,
    whole,
)

SCHEMA = 2  # 1 took prompts literally
Mode = Literal["native", "reference"]
Indexing = Literal["bpe", "words"]
Sampler = Literal["dpmpp_2m_sde", "euler", "lcm"]
TasStage = Literal["tokens_lcg", "tokens_gch", "pooled_lcg", "pooled_gch"]
Auto = Literal["auto"]
Decoder = Literal["vae", "asuka"]
Prior = Literal["negative", "concat", "alone"]
LCM_STEPS = 50
_SEEDS = 1 << 64


@dataclass(frozen=True)
class Request:
    """What to paint and how. Raises InputError naming the field, its value and what is allowed.

    prompt: text.
    negative_prompt: text; None: zero embeddings.
    subject: which subject of the engine, of a LoRA or of tokens; None: its first one, "": none.
    subject_scale: 0..2, strength of the subject's LoRA; 0 leaves its word in the prompt, and the networks the base's.
    token_subject: whose tokens stand beside the text, so that a LoRA and tokens are used at once; None: the subject's
        own, if it has some, "": none.
    token_count: 1..48, how many of its tokens (K): fewer leave more to the text, more keep more of the photograph.
    token_weight: 0..2, factor on the tokens' rows; 0 omits them and what the adapter learnt to read them with: the
        picture without tokens.
    substitute: attribute words that TAS takes out of a LoRA's subject (of tokens, token_count decides how much the text
        may change); "auto": those of its attributes that the prompt
        contradicts, which the result's request has (`engine.retrieval`).
    substitute_prefix: the text before these words; None: "a photo of a TOKEN".
    sampler: "dpmpp_2m_sde" (Karras noise levels, the authors'), or what a few-step base was distilled for: "euler" on
        trailing timesteps (Lightning, Hyper-SD) or "lcm", which has at most 50 steps. The few-step samplers take
        guidance_scale 1.
    num_inference_steps: 1..1000.
    guidance_scale: 0..100; at most 1 switches guidance off.
    seed: 0..2^64-1; None: each painting draws one, which the result's request has.
    num_images_per_prompt: 1..1024; picture k equals a request with seed + k alone.
    strength: above 0, up to 1; shortens the steps to int(steps * strength), as in the authors' code.
    mode: "native" keeps the picture's resolution; "reference" follows the authors' arithmetic on a picture stretched
        to reference_resize.
    lcg_steps: how many steps are local (LCG), the rest is global (GCH); None: round(lcg_fraction * steps), but at least
        one step for each stage where the fraction is between 0 and 1 and there are two or more steps.
    lcg_fraction: 0..1, see lcg_steps.
    lcg_field, gch_field: the least share of the picture's sides in each stage's crop; 1 is the whole picture.
    lcg_mask_dilate: pixels by which the local stage repaints more than the mask.
    gch_background: which picture is around the mask in GCH.
    patched_fraction: share of the steps on the inpainting UNet.
    sharpness: weight of blur guidance.
    size_guidance_positive, size_guidance_negative: factors on the original size given to the UNet.
    size_guidance_end: share of the steps that have these factors.
    guidance_rescale: 0..1.
    blend_noise: "fresh" for every step, or "fixed".
    blend_output: whether to blend the background also into each predicted picture (Fooocus).
    soft_blending: whether to paste radially at the hand-over.
    decoder: what turns latents into pictures, at the hand-over and at the end: the VAE's decoder, or ASUKA's, which
        sees the picture and its mask, too (an engine of a base with it: `build --asuka`).
    prior: what ASUKA's prior, which saw the known pixels alone, is to the text: the "negative" that guidance leads away
        from (docs/algorithm.md, 16), rows beside the text's in the last stage ("concat"), or in its place ("alone",
        for taking things out; without guidance).
    prior_weight: above 0, up to 2: factor on the prior's rows; the less, the nearer to the empty condition.
    tas_stages: where the decomposed tokens and pooled vector are used; the authors' code omits pooled_gch.
    tas_indexing: "bpe" tokens or the authors' "words"; None: the mode's.
    vae_sample: whether to sample the VAE's posterior instead of taking its mean; None: the mode's.
    truncate_prompt: whether to cut what does not fit in 77 tokens; else longer prompts take several chunks of them, as
        far as the engine was built for (`build --context`).
    prompt_weights: whether "(word:1.2)" and its kin are weights, not text (docs/algorithm.md, 5.6); None: the mode's,
        true in native mode.
    feather: pixels of the picture over which the result fades into it around the mask, 0 for a hard edge; None: 32 for
        a short side of 1024 (docs/algorithm.md, 9.1). A wider one ends with the last stage's frame. In reference mode
        pixels of the stretched picture.
    reference_resize: (height, width) for mode "reference"; None: the base's native square.
    """

    prompt: str
    negative_prompt: str | None = ""
    subject: str | None = None
    subject_scale: float = 1.0
    token_subject: str | None = None
    token_count: int = 24
    token_weight: float = 1.0
    substitute: tuple[str, ...] | Auto = ()
    substitute_prefix: str | None = None
    sampler: Sampler = "dpmpp_2m_sde"
    num_inference_steps: int = 30
    guidance_scale: float = 4.0
    seed: int | None = 0
    num_images_per_prompt: int = 1
    strength: float = 1.0
    mode: Mode = "native"
    lcg_steps: int | None = None
    lcg_fraction: float = 2 / 3
    lcg_field: float = 0.5
    gch_field: float = 1.0
    lcg_mask_dilate: int = 0
    gch_background: Literal["original", "intermediate"] = "original"
    patched_fraction: float = 0.8
    sharpness: float = 1.0
    size_guidance_positive: float = 1.5
    size_guidance_negative: float = 0.8
    size_guidance_end: float = 0.3
    guidance_rescale: float = 0.0
    blend_noise: Literal["fresh", "fixed"] = "fresh"
    blend_output: bool = False
    soft_blending: bool = False
    decoder: Decoder = "vae"
    prior: Prior | None = None
    prior_weight: float = 1.0
    tas_stages: tuple[TasStage, ...] = ("tokens_lcg", "tokens_gch", "pooled_lcg")
    tas_indexing: Indexing | None = None
    vae_sample: bool | None = None
    truncate_prompt: bool = False
    prompt_weights: bool | None = None
    feather: int | None = None
    reference_resize: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name, check in CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))
        if self.seed is not None and self.seed + self.num_images_per_prompt > _SEEDS:
            raise InputError(f"seed is {self.seed}: with {self.num_images_per_prompt} pictures it must stay below 2^64")
        if self.steps < 1:
            raise InputError(
                f"strength is {self.strength}: this leaves none of {self.num_inference_steps} steps; "
                f"give at least {1 / self.num_inference_steps:.4g}"
            )
        if self.sampler == "lcm" and self.steps > LCM_STEPS:
            raise InputError(
                f"num_inference_steps is {self.num_inference_steps}: sampler 'lcm' has at most {LCM_STEPS} steps; "
                f"give 4 .. 8, or another sampler"
            )
        if self.lcg_steps is not None and self.lcg_steps > self.num_inference_steps:
            raise InputError(f"lcg_steps is {self.lcg_steps}; allowed: 0 .. {self.num_inference_steps} (all steps)")
        if self.prior == "alone" and self.guided:
            raise InputError(
                f"guidance_scale is {self.guidance_scale:g}, but with prior 'alone' nothing is guided; give 1, or "
                "another prior"
            )
        if self.prior == "negative" and not self.guided:
            raise InputError(
                f"prior is 'negative', which guidance leads away from, but guidance_scale is {self.guidance_scale:g} "
                "and switches guidance off; give more than 1, or another prior"
            )
        if self.reference_resize and self.mode != "reference":
            raise InputError("reference_resize is given, but only mode 'reference' stretches the picture")

    def field_of(self, stage: Literal["lcg", "gch"]) -> float:
        """The least share of the picture's sides in a stage's crop."""
        return self.lcg_field if stage == "lcg" else self.gch_field

    def dilate_of(self, stage: Literal["lcg", "gch"]) -> int:
        """Pixels by which a stage repaints more than the mask."""
        return self.lcg_mask_dilate if stage == "lcg" else 0

    @property
    def steps(self) -> int:
        """How many steps run: int(num_inference_steps * strength)."""
        return min(int(self.num_inference_steps * self.strength), self.num_inference_steps)

    @property
    def local_steps(self) -> int:
        """How many of the steps are local."""
        if self.lcg_steps is not None:
            return min(self.lcg_steps, self.steps)
        local = round(self.lcg_fraction * self.steps)
        both = 0 < self.lcg_fraction < 1 and self.steps > 1
        return min(max(local, 1), self.steps - 1) if both else local

    @property
    def indexing(self) -> Indexing:
        """tas_indexing; by default tokens in native mode, words in reference mode."""
        return self.tas_indexing or ("words" if self.mode == "reference" else "bpe")

    @property
    def samples_vae(self) -> bool:
        """vae_sample; by default the mean in native mode, a sample in reference mode."""
        return self.mode == "reference" if self.vae_sample is None else self.vae_sample

    @property
    def weighs_prompts(self) -> bool:
        """prompt_weights; by default true in native mode."""
        return self.mode == "native" if self.prompt_weights is None else self.prompt_weights

    @property
    def substitute_words(self) -> tuple[str, ...]:
        """The words of substitute; () for "auto", in whose place they come when a request is laid out."""
        return () if isinstance(self.substitute, str) else self.substitute

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance runs; it needs a negative row per picture."""
        return self.guidance_scale > 1

    @classmethod
    def of(cls, **fields: Any) -> Request:
        """Make a request from named fields.

        Raises InputError, not TypeError, for a field that does not exist and for a missing prompt.
        """
        if "prompt" not in _check_names(fields):
            raise InputError("a request needs a prompt: say what to paint, with the subject's token")
        return cls(**fields)

    def replace(self, **fields: Any) -> Request:
        """This request with some fields changed. Raises InputError for a field that does not exist."""
        return Request(**{**self._fields(), **_check_names(fields)})

    def to_json(self, indent: int | None = None) -> str:
        """The request as JSON with its schema number. `from_json` turns it back into an equal request."""
        return json.dumps({"schema": SCHEMA, **self._fields()}, indent=indent, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Request:
        """Read what `to_json` gave. Raises InputError for other JSON, unknown fields, bad values and other schemas."""
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"the request is not valid JSON ({error})") from error
        if not isinstance(fields, dict) or not isinstance(fields.get("schema"), int):
            raise InputError("the request is not a JSON object with a schema number; write one with Request.to_json()")
        schema = fields.pop("schema")
        if not 1 <= schema <= SCHEMA:
            raise InputError(f"the request has schema {schema}, this version reads 1 to {SCHEMA}; update dreammix-trt")
        if schema == 1:
            fields.setdefault("prompt_weights", False)
        return cls.of(**fields)

    def _fields(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


class RequestFields(TypedDict, total=False):
    """Every field of a `Request` except its prompt, for `**fields: Unpack[RequestFields]`: editors complete them.

    A test compares names and types with those of `Request`. Fields with several values also accept a list.
    """

    negative_prompt: str | None
    subject: str | None
    subject_scale: float
    token_subject: str | None
    token_count: int
    token_weight: float
    substitute: list[str] | tuple[str, ...] | Auto
    substitute_prefix: str | None
    sampler: Sampler
    num_inference_steps: int
    guidance_scale: float
    seed: int | None
    num_images_per_prompt: int
    strength: float
    mode: Mode
    lcg_steps: int | None
    lcg_fraction: float
    lcg_field: float
    gch_field: float
    lcg_mask_dilate: int
    gch_background: Literal["original", "intermediate"]
    patched_fraction: float
    sharpness: float
    size_guidance_positive: float
    size_guidance_negative: float
    size_guidance_end: float
    guidance_rescale: float
    blend_noise: Literal["fresh", "fixed"]
    blend_output: bool
    soft_blending: bool
    decoder: Decoder
    prior: Prior | None
    prior_weight: float
    tas_stages: list[TasStage] | tuple[TasStage, ...]
    tas_indexing: Indexing | None
    vae_sample: bool | None
    truncate_prompt: bool
    prompt_weights: bool | None
    feather: int | None
    reference_resize: tuple[int, int] | None


def draw_seed() -> int:
    """A random seed, small enough to be written down: below 2^32."""
    return secrets.randbelow(1 << 32)


def _check_names(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    unknown = sorted(set(fields) - set(CHECKS))
    if unknown:
        near = [name for each in unknown for name in difflib.get_close_matches(each, CHECKS, 1)]
        meant = f" (is {', '.join(near)} meant?)" if near else ""
        raise InputError(f"a request has no field {', '.join(unknown)}{meant}; its fields are {', '.join(CHECKS)}")
    return fields


#: how each field is checked, in the order of the fields
CHECKS: dict[str, Check] = {
    "prompt": TEXT,
    "negative_prompt": or_none(TEXT),
    "subject": or_none(TEXT),
    "subject_scale": number(0, 2),
    "token_subject": or_none(TEXT),
    "token_count": whole(1, MOST_TOKENS),
    "token_weight": number(0, 2),
    "substitute": WORDS_OR_AUTO,
    "substitute_prefix": or_none(TEXT),
    "sampler": one_of(Sampler),
    "num_inference_steps": whole(1, 1000),
    "guidance_scale": number(0, 100),
    "seed": or_none(whole(0, _SEEDS - 1)),
    "num_images_per_prompt": whole(1, 1024),
    "strength": number(0, 1, above=True),
    "mode": one_of(Mode),
    "lcg_steps": or_none(whole(0, 1000)),
    "lcg_fraction": SHARE,
    "lcg_field": SHARE,
    "gch_field": SHARE,
    "lcg_mask_dilate": whole(0, 4096),
    "gch_background": one_of(Literal["original", "intermediate"]),
    "patched_fraction": SHARE,
    "sharpness": number(0, 100),
    "size_guidance_positive": number(0.1, 10),
    "size_guidance_negative": number(0.1, 10),
    "size_guidance_end": SHARE,
    "guidance_rescale": SHARE,
    "blend_noise": one_of(Literal["fresh", "fixed"]),
    "blend_output": FLAG,
    "soft_blending": FLAG,
    "decoder": one_of(Decoder),
    "prior": or_none(one_of(Prior)),
    "prior_weight": number(0, 2, above=True),
    "tas_stages": several(one_of(TasStage), "stages"),
    "tas_indexing": or_none(one_of(Indexing)),
    "vae_sample": or_none(FLAG),
    "truncate_prompt": FLAG,
    "prompt_weights": or_none(FLAG),
    "feather": or_none(whole(0, 4096)),
    "reference_resize": or_none(SIZE),
}
