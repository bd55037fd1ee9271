"""The InternLM2 tokenizer without remote code gives the published slow one's ids, and text as InternVL trains it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoTokenizer

from mirage.data.row import ImagePart, Message, TextPart
from mirage.errors import UserError
from mirage.models.adapter import IGNORE_INDEX, PreprocessingSpec
from mirage.models.internvl import InternVLAdapter, cut_tiles, normalize_tiles, num_tiles
from mirage.models.internvl_config import native_config
from mirage.models.internvl_tokenizer import chat_template, load_tokenizer, save_tokenizer
from tests.support.published import FIXTURES, small_config

TOKENIZER = FIXTURES / "tokenizer"
PREPROCESS = FIXTURES / "preprocess"
CASES = json.loads((TOKENIZER / "expected_ids.json").read_text())
ADDED = ["<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<box>", "</box>"]
NUM_PIECES = 700
# Every way of handling spaces that a sentencepiece model may ask for; InternLM2's own is the reference fixture's.
SETTINGS: dict[str, dict[str, Any]] = {
    "dummy_prefix": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "dummy_prefix_symbols": {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "user_defined_symbols": ["<|im_start|>", "<|im_end|>", "[UNUSED_TOKEN_1]", "==="],
    },
    "no_prefix_symbols": {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "user_defined_symbols": ["<|im_start|>", "[UNUSED_TOKEN_1]", "==="],
    },
    "space_runs": {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_by_whitespace": False,
    },
    "spaces_removed": {"normalization_rule_name": "identity", "remove_extra_whitespaces": True},
    "no_byte_fallback": {"normalization_rule_name": "identity", "byte_fallback": False},
    "unigram": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "model_type": "unigram"},
}


def train_folder(folder: Path, options: dict[str, Any]) -> Path:
    """A published-style tokenizer folder around a sentencepiece model trained on this repository's own sources."""
    folder.mkdir()
    corpus = folder / "corpus.txt"
    lines = [line for path in sorted(Path(__file__).parent.glob("*.py")) for line in path.read_text().splitlines()]
    lines += ["你好，世界。这是一个测试。", "naïve café", "    four spaces", "a  b   c    d"] * 10
    corpus.write_text("\n".join(line for line in lines if line.strip()), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=NUM_PIECES,
        minloglevel=2,
        num_threads=1,
        **{"model_type": "bpe", "byte_fallback": True, **options},
    )
    (folder / "added_tokens.json").write_text(json.dumps(dict(zip(ADDED[2:], range(NUM_PIECES, NUM_PIECES + 5)))))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    (folder / "special_tokens_map.json").write_text(json.dumps({**names, "additional_special_tokens": ADDED}))
    return folder


def slow_encoder(folder: Path) -> Callable[[str], list[int]]:
    """The published slow tokenizer, on sentencepiece alone: pieces between added tokens are texts of their own."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ids = json.loads((folder / "added_tokens.json").read_text())
    for token in json.loads((folder / "special_tokens_map.json").read_text())["additional_special_tokens"]:
        if token not in ids:
            known = processor.piece_to_id(token)
            ids[token] = known if known != processor.unk_id() else max(ids.values()) + 1
    ids |= {"<unk>": processor.unk_id(), "<s>": processor.bos_id(), "</s>": processor.eos_id()}
    pattern = re.compile("|".join(re.escape(token) for token in sorted(ids, key=len, reverse=True)))

    def encode(text: str) -> list[int]:
        result: list[int] = []
        start = 0
        for match in pattern.finditer(text):
            result += processor.encode(text[start : match.start()])
            result.append(ids[match.group()])
            start = match.end()
        return result + processor.encode(text[start:])

    return encode


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference tokenizer as a converted folder holds it."""
    folder = tmp_path_factory.mktemp("tokenizer") / "saved"
    folder.mkdir()
    save_tokenizer(load_tokenizer(TOKENIZER), folder)
    return folder


@pytest.mark.parametrize("source", ["built", "saved", "saved_twice"])
def test_reference_ids(source: str, saved: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(TOKENIZER) if source == "built" else AutoTokenizer.from_pretrained(saved)
    if source == "saved_twice":
        save_tokenizer(tokenizer, tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        assert (tmp_path / "tokenizer.json").read_bytes() == (saved / "tokenizer.json").read_bytes()
        assert (tmp_path / "tokenizer_config.json").read_bytes() == (saved / "tokenizer_config.json").read_bytes()
    for case in CASES:
        assert tokenizer(case["text"], add_special_tokens=False)["input_ids"] == case["ids"]
        assert tokenizer(case["text"])["input_ids"] == case["ids_with_bos"]
        assert tokenizer.decode(case["ids"]) == case["text"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.context_image_token == "<IMG_CONTEXT>"
    assert tokenizer.chat_template == chat_template()


TEXTS = st.lists(
    st.one_of(
        st.text(max_size=12),
        st.sampled_from(
            [*ADDED, "<s>", "</s>", "<unk>", "[UNUSED_TOKEN_1]", "===", "<0x0A>", "\u2581", "你好", "def "]
        ),
        st.integers(1, 40).map(lambda count: " " * count),
        st.integers(1, 3).map(lambda count: "\n" * count),
    ),
    max_size=8,
).map("".join)


@pytest.mark.parametrize("name", SETTINGS)
def test_equal_to_sentencepiece_on_any_text(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = train_folder(tmp_path_factory.mktemp("sp") / name, SETTINGS[name])
    tokenizer, slow = load_tokenizer(folder), slow_encoder(folder)
    prefixed = SETTINGS[name].get("add_dummy_prefix", True)
    kept = not SETTINGS[name].get("remove_extra_whitespaces", True) and SETTINGS[name].get("byte_fallback", True)

    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(text=TEXTS)
    def check(text: str) -> None:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == slow(text)
        assert tokenizer(text)["input_ids"] == [1, *ids]
        if kept and not any(token in text for token in [*ADDED, "<s>", "</s>", "<unk>", "\u2581"]):
            assert tokenizer.decode(ids) == text

    check()
    assert tokenizer("a", add_special_tokens=False)["input_ids"] == slow("a")
    starts_with_space = tokenizer.convert_ids_to_tokens(slow("<img>test</img>"))[1].startswith("\u2581")
    assert starts_with_space == prefixed


def test_reference_model_equal_to_sentencepiece_on_any_text() -> None:
    tokenizer, slow = load_tokenizer(TOKENIZER), slow_encoder(TOKENIZER)

    @settings(max_examples=300, deadline=None, derandomize=True, database=None)
    @given(text=TEXTS)
    def check(text: str) -> None:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == slow(text)
        if not any(token in text for token in ("<s>", "</s>", "<unk>", "\u2581")):
            assert tokenizer.decode(ids) == text

    check()


def test_renamed_pieces_keep_their_ids(tmp_path: Path) -> None:
    """The real files put `<|im_end|>` where the sentencepiece model has another spelling."""
    shutil.copyfile(TOKENIZER / "tokenizer.model", tmp_path / "tokenizer.model")
    config = json.loads((TOKENIZER / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["6"]["content"] = "<|renamed|>"
    config["additional_special_tokens"] = [
        "<|renamed|>" if token == "<|action_start|>" else token for token in config["additional_special_tokens"]
    ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer("a<|renamed|>b", add_special_tokens=False)["input_ids"][1:-1] == [6]
    assert tokenizer.convert_ids_to_tokens(6) == "<|renamed|>"
    # The old spelling is text, not a way into the control token.
    assert 6 not in tokenizer("<|action_start|>", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(tokenizer("<|action_start|>", add_special_tokens=False)["input_ids"]) == "<|action_start|>"


def test_damaged_files_are_user_errors(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"tokenizer\.model: is not a sentencepiece model"):
        load_tokenizer(tmp_path)
    shutil.copyfile(TOKENIZER / "tokenizer.model", tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json:1: not valid JSON"):
        load_tokenizer(tmp_path)
    decoder = {str(number): {"content": f"<{number}>"} for number in (1600, 1601)} | {"01600": {"content": "<again>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    with pytest.raises(UserError, match="share an id"):
        load_tokenizer(tmp_path)


# Text and pictures as InternVL trains them


def make_adapter(tokenizer: Any, **spec: Any) -> InternVLAdapter:
    config = native_config(small_config(), image_token_id=0, tied=False, where=Path("config.json"))
    config.image_token_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    fields = {"image_size": 56, "max_tiles": 6, "thumbnail": True, "min_pixels": 1, "max_pixels": 1}
    fields |= {"system_prompt": None, "number_images": True}
    return InternVLAdapter(tokenizer, config, PreprocessingSpec(family="internvl", **(fields | spec)))


def messages_of(conversations: list[dict[str, str]]) -> list[Message]:
    """ShareGPT turns as messages, image marks in place."""
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    messages, count = [], 0
    for turn in conversations:
        parts: list[Any] = []
        for position, piece in enumerate(turn["value"].split("<image>")):
            if position:
                parts.append(ImagePart(index=count))
                count += 1
            if piece:
                parts.append(TextPart(text=piece))
        messages.append(Message(role=roles[turn["from"]], content=tuple(parts)))
    return messages


PROMPTS = json.loads((PREPROCESS / "prompts.json").read_text())


@pytest.mark.parametrize("tokenizer_kind", ["reference", "dummy_prefix"])
@pytest.mark.parametrize("case", PROMPTS, ids=range(len(PROMPTS)))
def test_rendered_text_ids_and_supervised_spans(
    case: dict[str, Any], tokenizer_kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = TOKENIZER
    if tokenizer_kind == "dummy_prefix":
        folder = train_folder(tmp_path_factory.mktemp("sp") / "model", SETTINGS["dummy_prefix_symbols"])
    adapter, slow = make_adapter(load_tokenizer(folder)), slow_encoder(folder)
    tokens = [tiles * case["tokens_per_tile"] for tiles in case["tiles_per_image"]]
    rendered = adapter.render(messages_of(case["conversations"]), tokens)
    assert rendered.text == case["text"]
    assert rendered.input_ids == [1, *slow(case["text"])]
    spans: list[list[int]] = []
    for previous, label in zip([IGNORE_INDEX, *rendered.labels], rendered.labels, strict=False):
        if label != IGNORE_INDEX:
            spans = [*spans, []] if previous == IGNORE_INDEX else spans
            spans[-1].append(label)
    decoded = [adapter.tokenizer.decode(span).strip(" ") for span in spans]
    assert decoded == case["supervised_spans"]


def test_tile_counts_of_all_reference_cases() -> None:
    cases = json.loads((PREPROCESS / "tiling.json").read_text())
    assert len(cases) == 224
    for case in cases:
        found = num_tiles(case["width"], case["height"], max_tiles=case["max_tiles"], tile_size=448, thumbnail=True)
        assert found == case["num_tiles"], case


@pytest.mark.parametrize("name", ["wide", "tall", "square"])
def test_pixel_values(name: str) -> None:
    with np.load(PREPROCESS / "pixel_values.npz") as arrays:
        wanted = arrays[name]
    image = Image.open(PREPROCESS / f"{name}.png").convert("RGB")
    found = normalize_tiles(cut_tiles(image, max_tiles=6, tile_size=56, thumbnail=True)).numpy()
    # One grey level of 255, on the normalised scale.
    assert np.abs(found - wanted).max() <= 1 / 255
    picture = make_adapter(load_tokenizer(TOKENIZER)).preprocess(image, num_images=1)
    assert picture.num_tokens == len(wanted) * 4


CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": 'A "quote"'}]}],
    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}],
    [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Compare."}]}],
    [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nBy hand."}, {"type": "image"}]},
        {"role": "assistant", "content": "Yes."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "And "}, {"type": "image"}, {"type": "text", "text": "?"}],
        },
    ],
]


@pytest.mark.parametrize("spec", [{}, {"system_prompt": "", "number_images": False}, {"system_prompt": 'Say "hi".\n'}])
@pytest.mark.parametrize("chat", CHATS, ids=range(len(CHATS)))
def test_chat_template_renders_what_the_adapter_renders(chat: list[dict[str, Any]], spec: dict[str, Any]) -> None:
    tokenizer = load_tokenizer(TOKENIZER)
    adapter = make_adapter(tokenizer, **spec)
    messages, count = [], 0
    for turn in chat:
        parts: list[Any] = []
        for part in (
            [{"type": "text", "text": turn["content"]}] if isinstance(turn["content"], str) else turn["content"]
        ):
            parts.append(TextPart(text=part["text"]) if part["type"] == "text" else ImagePart(index=count))
            count += part["type"] == "image"
        messages.append(Message(role=turn["role"], content=tuple(parts)))
    rendered = adapter.render(messages, [1] * count, generation=True)
    template = chat_template(system_prompt=adapter.spec.system_prompt, number_images=adapter.spec.number_images)
    tokenizer.chat_template = template
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.replace("<IMG_CONTEXT>", "<img><IMG_CONTEXT></img>") == rendered.text
    # vLLM and llama.cpp run templates in a plain sandbox.
    plain = jinja2.Environment().from_string(template).render(messages=chat, add_generation_prompt=True)
    assert plain == text
