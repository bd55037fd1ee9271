"""A model in the published InternVL layout answers with the same tokens in plain transformers and in the evaluator."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoTokenizer, InternVLForConditionalGeneration

from mirage.data.row import ImagePart, Message, TextPart
from mirage.evals.generate import Decoding, generate_batch, make_prompts
from mirage.evals.task import Sample
from mirage.models import load_model
from mirage.models.internvl_checkpoint import convert
from tests.support.published import FIXTURES, small_config, write_published

NEW_TOKENS = 12


def published_with_tokenizer(folder: Path) -> Path:
    """A small random model whose vocabulary is the reference tokenizer's."""
    write_published(folder, small_config(llm={"vocab_size": 1510}))
    for file in (FIXTURES / "tokenizer").iterdir():
        if file.name != "expected_ids.json":
            shutil.copyfile(file, folder / file.name)
    return folder


def samples(names: list[str]) -> list[Sample]:
    paths = tuple(FIXTURES / "preprocess" / name for name in names)
    marks = tuple(ImagePart(index=number) for number in range(len(paths)))
    texts = ["How can I use these two objects together?", "Compare them."]
    return [
        Sample(
            id=str(number),
            messages=(Message(role="user", content=(*marks, TextPart(text=text))),),
            image_paths=paths,
            category="",
            sub_category="",
            cluster="",
        )
        for number, text in enumerate(texts)
    ]


def test_same_tokens_in_plain_transformers_and_in_the_evaluator(tmp_path):
    published = published_with_tokenizer(tmp_path / "published")
    convert(published, tmp_path / "native", layout="native")
    model, adapter = load_model(tmp_path / "native", attention="sdpa")
    chosen = samples(["wide.png", "tall.png"])
    decoding = Decoding(max_new_tokens=NEW_TOKENS, batch_size=2, dtype="float32", attention="sdpa")
    prompts = make_prompts(adapter, chosen, fingerprint="any", decoding=decoding)
    answers = generate_batch(model, adapter, prompts, decoding=decoding, device=torch.device("cpu"))

    plain = InternVLForConditionalGeneration.from_pretrained(tmp_path / "native", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "native")
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for sample, answer in zip(chosen, answers):
        pictures = [adapter.preprocess(Image.open(path).convert("RGB"), num_images=2) for path in sample.image_paths]
        text = adapter.render(sample.messages, [picture.num_tokens for picture in pictures], generation=True).text
        inputs = tokenizer(text, return_tensors="pt")
        output = plain.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            pixel_values=torch.cat([picture.tensors["pixel_values"] for picture in pictures]),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=stop,
            pad_token_id=stop,
        )[0, inputs["input_ids"].shape[1] :].tolist()
        kept = output[: output.index(stop)] if stop in output else output
        assert len(kept) == answer.num_tokens
        assert tokenizer.decode(kept, skip_special_tokens=True).strip() == answer.text
        assert answer.text
