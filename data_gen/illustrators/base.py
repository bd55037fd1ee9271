"""What all illustrators share: a picture for each object, the content policy, the critic and its one redraw round."""

from __future__ import annotations

import asyncio
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, Literal

from PIL import __version__ as pillow_version
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from data_gen.illustrators.content_policy import policy_problem, policy_sha256
from data_gen.model_stages.critic import Critic, CriticOptions, question_about_pictures, risk_category
from data_gen.pictures import Picture
from data_gen.sample import Sample
from data_gen.seeds import derive_seed
from data_gen.stage import Done, Dropped, EndpointFailure, Result, Stage, Usage
from data_gen.stages.draft import Style
from data_gen.tools import Tools
from mirage.data.row import ImageRef, ImageSource, canonical_json
from mirage.errors import UserError
from mirage.files import write_atomic
from mirage.strict_json import read_json

OBJECT = "{object}"
NO_LICENCE = re.compile(r"(?i)^\W*+(unknown|none|n/?a|tbd|todo|unlicen[sc]ed|all rights reserved)?\W*$")


class NoPicture(Exception):
    """The source has no picture of this object; the text says so and becomes the reason for dropping the sample."""


class OutOfScope(NoPicture):
    """The content policy forbids the picture."""


class IllustrateOptions(BaseModel):
    """Options of every illustrator."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pixels: int = Field(default=512, ge=16, le=4096, description="edge of a picture; the longer one of a photograph")
    critic: CriticOptions | None = Field(default=None, description="a vision endpoint that looks at the pictures")


class PromptedOptions(IllustrateOptions):
    """Options of illustrators that have a model make a picture from a prompt."""

    prompt_template: str = Field(default="a photo of {object}", description="picture prompt of the first round")
    licence: str = Field(description="licence that the model's terms put its pictures under")
    attribution: str = Field(min_length=1, description="how its pictures are to be attributed")

    @field_validator("prompt_template")
    @classmethod
    def _names_the_object(cls, value: str) -> str:
        if value.count(OBJECT) != 1 or "{" in value.replace(OBJECT, "") or "}" in value.replace(OBJECT, ""):
            raise ValueError(f"must hold {OBJECT} once and no other braces, found {value!r}")
        return value

    @field_validator("licence")
    @classmethod
    def _is_a_licence(cls, value: str) -> str:
        if NO_LICENCE.match(value):
            raise ValueError(f"must name a licence, found {value!r}")
        return value


@dataclass(frozen=True)
class PictureRequest:
    """One picture to obtain. The seed is the same for siblings, so that twins share the pictures they share by plan."""

    object: str
    """As the sample words it."""
    prompt: str
    """What the picture shall show: from the object in round 1, the critic's own in round 2."""
    seed: int
    round: Literal[1, 2] = 1
    avoid: frozenset[str] = frozenset()
    """Origins (`Found.origin`) that must not be given: the sample's other pictures and what the critic refused."""
    planned: tuple[str, str, int] | None = None
    """(slug, side, variant) of a planned draft's picture."""
    style: Style = "colour"
    """How a planned draft's picture is drawn."""


@dataclass(frozen=True)
class Found:
    """A picture with its provenance."""

    picture: Picture
    source: ImageSource
    licence: str
    attribution: str
    origin: str = ""
    """Which of the source's pictures it is, for sources that choose; empty where a picture is made anew."""
    visible_harm: bool | None = None
    """Whether it shows something overtly harmful, where the source says so."""
    score: float | None = None
    """How well it fits, where the source ranks."""
    usage: Usage = field(default_factory=Usage)


@dataclass(frozen=True)
class _Round:
    """The pictures of one round, in the objects' order."""

    prompts: tuple[str, ...]
    found: tuple[Found, ...]
    images: tuple[ImageRef, ...]


class Illustrate(Stage):
    """Fill in `images` and `picture_prompts`: one picture an object, judged by the critic where there is one.

    The critic's no asks each picture again once, with the critic's prompts (paper section 3.2, steps 3a to 3c); a
    second no drops the sample with the critic's reason, or keeps it with the reason in its checks (`keep_anyway`).
    """

    name: ClassVar[str] = "illustrate"
    version: ClassVar[str] = "1"
    options_type: ClassVar[type[IllustrateOptions]]
    styles: ClassVar[tuple[Style, ...]] = ("colour",)
    """Styles of planned drafts that the source has."""
    remembered: ClassVar[bool] = False
    """Pictures that cost time or money are noted in the blob store: siblings and later runs do not order them again."""

    def __init__(self, tools: Tools, options: IllustrateOptions) -> None:
        """Raises UserError if the critic's endpoint is not configured."""
        self.tools = tools
        self.options = options
        self.critic = Critic(tools, options.critic) if options.critic else None
        self._locks: dict[str, asyncio.Lock] = {}

    @abstractmethod
    async def find(self, request: PictureRequest) -> Found:
        """The picture. Raises NoPicture if the source has none, EndpointFailure if none was obtained."""

    def source_identity(self) -> Mapping[str, Any]:
        """What decides a picture besides the request: models, parameters, versions, hash of a folder."""
        return {}

    def prompt_for(self, name: str) -> str:
        """The picture prompt of the first round."""
        return name

    def identity(self) -> Mapping[str, Any]:
        """Source, size, package versions, deny list and critic."""
        return {
            "pixels": self.options.pixels,
            "pillow": pillow_version,
            "policy": policy_sha256(),
            "source": dict(self.source_identity()),
            "critic": self.critic.identity() if self.critic else None,
        }

    def view(self, sample: Sample) -> Any:
        """Objects, whose pictures they share, and what policy and critic read."""
        view: dict[str, Any] = {"objects": self.objects(sample), "harm_is_visible": sample.harm_is_visible}
        if self.critic is not None:
            view["critic_reads"] = [risk_category(sample, self.tools), question_about_pictures(sample)]
        if sample.draft is not None:
            style = {} if sample.draft.style == "colour" else {"style": sample.draft.style}
            return view | {"planned": [sample.draft.things, sample.draft.variants, sample.draft.side]} | style
        return view | {"pictures_of": _family(sample), "about": _about(sample)}

    def objects(self, sample: Sample) -> tuple[str, ...]:
        """What the sample's pictures show, in order; nothing for a planned sample without pictures.

        Raises UserError if no stage has said so.
        """
        if sample.draft is not None:
            return tuple(self.tools.taxonomy.things[slug].name for slug in sample.draft.things)
        if sample.elements is None:
            raise UserError(f"illustrate: sample {list(sample.position)} names no objects; put `extract` before it")
        return sample.elements.objects

    async def run(self, sample: Sample, *, seed: int) -> Result:
        """The sample with its pictures, or why there are none."""
        objects = self.objects(sample)
        if not objects:
            return Done((sample,))
        if sample.draft is not None and sample.draft.style not in self.styles:
            return Dropped(f"illustrate: {self.implementation} has no {sample.draft.style} art, only draw has")
        usage = Usage()
        try:
            first, cost = await self._round(sample, tuple(self.prompt_for(name) for name in objects))
            usage += cost
            if self.critic is None:
                return Done((_filled(sample, first),), usage)
            verdict, cost = await self.critic.judge(sample, objects=objects, images=first.images, seed=seed)
            usage += cost
            if verdict.keep:
                return Done((_filled(sample, first, critic="ok"),), usage)
            try:
                second, cost = await self._round(sample, tuple(verdict.picture_prompts), refused=first)
            except OutOfScope:
                raise
            except NoPicture:
                return self._refused(sample, first, verdict.reason, usage)  # the source has nothing else to offer
            usage += cost
            again = derive_seed(seed, "second look")
            verdict, cost = await self.critic.judge(sample, objects=objects, images=second.images, seed=again)
            usage += cost
        except NoPicture as error:
            return Dropped(str(error), usage)
        except EndpointFailure as failure:
            raise EndpointFailure(failure.kind, failure.message, usage=usage + failure.usage) from failure
        if verdict.keep:
            return Done((_filled(sample, second, critic="ok"),), usage)
        return self._refused(sample, second, verdict.reason, usage)

    def _refused(self, sample: Sample, last: _Round, reason: str, usage: Usage) -> Result:
        assert self.critic is not None
        if self.critic.options.keep_anyway:
            return Done((_filled(sample, last, critic=f"refused, kept anyway: {reason}"),), usage)
        return Dropped(f"critic: {reason}", usage)

    async def _round(
        self, sample: Sample, prompts: tuple[str, ...], *, refused: _Round | None = None
    ) -> tuple[_Round, Usage]:
        """A picture for each prompt. Raises NoPicture for the first that cannot be had, or may not."""
        objects = self.objects(sample)
        problem = policy_problem([*prompts, *objects, *_about(sample)])
        if problem:
            raise OutOfScope(problem)
        usage, found = Usage(), []
        avoid = {one.origin for one in refused.found if one.origin} if refused else set()
        for number, prompt in enumerate(prompts):
            request = PictureRequest(
                object=objects[number],
                prompt=prompt,
                seed=self._picture_seed(sample, number, refused=refused is not None),
                round=1 if refused is None else 2,
                avoid=frozenset(avoid),
                planned=_planned(sample, number),
                style=sample.draft.style if sample.draft is not None else "colour",
            )
            try:
                one = await self._obtain(request)
            except EndpointFailure as failure:
                raise EndpointFailure(failure.kind, failure.message, usage=usage + failure.usage) from failure
            usage += one.usage
            found.append(one)
            avoid |= {one.origin} - {""}
        images = tuple(self._image_ref(name, one) for name, one in zip(objects, found))
        return _Round(prompts, tuple(found), images), usage

    def _picture_seed(self, sample: Sample, number: int, *, refused: bool) -> int:
        root, again = self.tools.root_seed, ("again",) if refused else ()
        planned = _planned(sample, number)
        if planned is not None:
            return derive_seed(root, "picture", *planned, *again)
        return derive_seed(root, "picture", *_family(sample), self.objects(sample)[number], *again)

    def _image_ref(self, concept: str, found: Found) -> ImageRef:
        path = self.tools.blobs.put(found.picture.png)
        return ImageRef(
            path=path,
            sha256=sha256(found.picture.png).hexdigest(),
            width=found.picture.width,
            height=found.picture.height,
            concept=concept,
            source=found.source,
            licence=found.licence,
            attribution=found.attribution,
        )

    async def _obtain(self, request: PictureRequest) -> Found:
        """`find`, or what it found before for the same request, where such pictures are remembered."""
        if not self.remembered:
            return await self.find(request)
        decides = [self.implementation, self.version, self.source_identity(), self.options.pixels]
        key = sha256(canonical_json([*decides, request.prompt, request.seed]).encode()).hexdigest()
        async with self._locks.setdefault(key, asyncio.Lock()):
            note = self.tools.blobs.root / "made" / key[:2] / f"{key}.json"
            known = _remembered(self.tools, note)
            if known is None:
                known = await self.find(request)
                entry = {
                    "path": self.tools.blobs.put(known.picture.png),
                    "size": [known.picture.width, known.picture.height],
                    "source": known.source.model_dump(mode="json"),
                    "licence": known.licence,
                    "attribution": known.attribution,
                }
                note.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(note, canonical_json(entry))
        return known


def _remembered(tools: Tools, note: Path) -> Found | None:
    """The picture that a note names; None if there is no note, or its picture is gone or damaged."""
    try:
        entry = read_json(note)
        picture = Picture(tools.blobs.get(entry["path"]), *entry["size"])
        source = ImageSource.model_validate(entry["source"])
        return Found(picture, source, licence=entry["licence"], attribution=entry["attribution"])
    except (OSError, ValueError, KeyError, TypeError, ValidationError, UserError):
        return None


def _planned(sample: Sample, number: int) -> tuple[str, str, int] | None:
    if sample.draft is None:
        return None
    return sample.draft.things[number], sample.draft.side, sample.draft.variants[number]


def _family(sample: Sample) -> tuple[str | int, ...]:
    """What a risky sample and its twins have in common: the seed and the risky sample's place among its offspring."""
    return (sample.seed.id, *(sample.twin_of or sample.position)[1:])


def _about(sample: Sample) -> tuple[str, ...]:
    elements = sample.elements
    if sample.draft is not None or elements is None:
        return ()
    return elements.category, elements.sub_category or "", elements.request


def _filled(sample: Sample, made: _Round, *, critic: str | None = None) -> Sample:
    """The sample with its pictures, and what source and critic say about them."""
    fields: dict[str, Any] = {"images": made.images, "picture_prompts": made.prompts}
    scores = {
        f"picture_score_{number}": f"{one.score:.4f}"
        for number, one in enumerate(made.found, start=1)
        if one.score is not None
    }
    if scores:
        fields["tags"] = sample.tags | scores
    harm: Sequence[bool | None] = [one.visible_harm for one in made.found]
    if sample.draft is None and sample.harm_is_visible is None and None not in harm:
        fields["harm_is_visible"] = any(harm)
    if critic is not None:
        fields["checks"] = sample.checks | {"critic": critic}
    return sample.filled(**fields)
