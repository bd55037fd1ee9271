"""Models without a family of MIRage's own: evaluated through their own processors, never trained, refused clearly."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from mirage.config.schema import EvalConfig
from mirage.data.pictures import open_picture
from mirage.data.row import ImagePart, Message, TextPart
from mirage.data.sources import read_rows
from mirage.errors import UserError
from mirage.evals.evaluate import evaluate_checkpoint
from mirage.evals.generate import Decoding, generate_batch, make_prompts
from mirage.evals.task import Sample
from mirage.evals.tasks.rows import sample_of_row
from mirage.models import load_model
from mirage.models.registry import load_adapter
from tests.support.native_models import TEMPLATE, TEXT, write_native

FAMILIES = (
    "idefics3", "idefics2", "llava", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "gemma3", "aya_vision",
)  # fmt: skip
DECODING = Decoding(max_new_tokens=6, batch_size=4, dtype="float32", attention="sdpa")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("native")
    return {name: write_native(root / name, name) for name in FAMILIES}


@pytest.fixture(scope="module")
def sample(shapes: Path) -> Sample:
    """Two different pictures, a short question."""
    return sample_of_row(next(read_rows(shapes, splits=["hard"])), shapes)


def by_hand(folder: Path, sample: Sample) -> tuple[Any, list[int]]:
    """What plain transformers answers to the sample alone: ids with the placeholders expanded, and the new tokens."""
    images = [open_picture(path) for path in sample.image_paths]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="sdpa").eval()
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": sample.question}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        chat_template=(folder / "chat_template.jinja").read_text(),
        tokenize=False,
        add_generation_prompt=True,
    )
    if model.config.model_type in ("qwen2_5_vl", "qwen3_vl", "llava_onevision"):
        inputs = _without_processor(folder, model, tokenizer, images, text)
    else:
        inputs = dict(AutoProcessor.from_pretrained(folder)(text=[text], images=[images], return_tensors="pt"))
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=DECODING.max_new_tokens, do_sample=False)
    return inputs, output[0, inputs["input_ids"].shape[1] :].tolist()


def _without_processor(folder: Path, model: Any, tokenizer: Any, images: list[Any], text: str) -> dict[str, Any]:
    """The combined processors of these families do not load here: each placeholder is repeated by its features."""
    # Nested, so that LLaVA-OneVision sees one sample of two pictures, which it then does not cut.
    inputs = dict(AutoImageProcessor.from_pretrained(folder)(images=[images], return_tensors="pt"))
    with torch.no_grad():
        features = model.model.get_image_features(**inputs, return_dict=True).pooler_output
    token = tokenizer.convert_ids_to_tokens(model.config.image_token_id)
    first, second, rest = text.split(token)
    text = f"{first}{token * len(features[0])}{second}{token * len(features[1])}{rest}"
    inputs |= dict(tokenizer(text, return_tensors="pt"))
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).long()
    return inputs


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_as_plain_transformers_does(family: str, folders: dict[str, Path], sample: Sample) -> None:
    expected_inputs, expected = by_hand(folders[family], sample)
    model, adapter = load_model(folders[family], evaluation=True)
    assert adapter.spec.family == "generic" and adapter.spec.model_type == family  # type: ignore[union-attr]
    prompt = make_prompts(adapter, [sample], fingerprint="w", decoding=DECODING)[0]
    seen: dict[str, Any] = {}
    generate = model.generate
    model.generate = lambda **inputs: seen.update(inputs) or generate(**inputs)  # type: ignore[func-returns-value]
    answer = generate_batch(model, adapter, [prompt], decoding=DECODING, device=CPU)[0]
    for name, value in expected_inputs.items():
        if isinstance(value, torch.Tensor) and name != "token_type_ids":
            torch.testing.assert_close(seen[name], value, msg=lambda text, name=name: f"{name}: {text}")
    kept = expected[: expected.index(adapter.stop_ids[0])] if adapter.stop_ids[0] in expected else expected
    assert answer.text == adapter.tokenizer.decode(kept, skip_special_tokens=True).strip()
    assert answer.num_tokens == len(kept)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_answers_as_each_prompt_alone(family: str, folders: dict[str, Path], sample: Sample) -> None:
    model, adapter = load_model(folders[family], evaluation=True)
    first, second = sample.messages[0].content[:2]
    longer = Message(role="user", content=(first, second, TextPart(text="What would you do with them together?")))
    asked = [sample, replace(sample, id="longer", messages=(longer,))]
    prompts = make_prompts(adapter, asked, fingerprint="w", decoding=DECODING)
    assert len({len(prompt.input_ids) for prompt in prompts}) == 2
    together = generate_batch(model, adapter, prompts, decoding=DECODING, device=CPU)
    alone = [generate_batch(model, adapter, [prompt], decoding=DECODING, device=CPU)[0] for prompt in prompts]
    assert together == alone


@pytest.mark.parametrize("language", ["qwen2", "qwen3"])
def test_internvl3_runs_through_its_familys_adapter(
    language: str, tiny_folders: dict[str, Path], sample: Sample, tmp_path: Path
) -> None:
    _, tiny = load_model(tiny_folders["internvl"])
    sizes = {key: value for key, value in tiny.config.text_config.to_dict().items() if key in (*TEXT, "vocab_size")}
    tiny.config.text_config = AutoConfig.for_model(language, **sizes)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(tiny.config, attn_implementation="sdpa")
    model.save_pretrained(tmp_path)
    tiny.save_files(tmp_path)
    evaluated, adapter = load_model(tmp_path, evaluation=True)
    evaluated.set_attn_implementation("sdpa")
    assert adapter.family == "internvl" and evaluated.config.text_config.model_type == language
    prompt = make_prompts(adapter, [sample], fingerprint="w", decoding=DECODING)[0]
    answer = generate_batch(evaluated, adapter, [prompt], decoding=DECODING, device=CPU)[0]
    images = [open_picture(path) for path in sample.image_paths]
    pixels = torch.cat([tiny.preprocess(image, num_images=2).tensors["pixel_values"] for image in images])
    ids = torch.tensor([prompt.input_ids])
    output = model.eval().generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=pixels,
        do_sample=False,
        max_new_tokens=DECODING.max_new_tokens,
        eos_token_id=adapter.stop_ids,
    )[0, ids.shape[1] :]
    assert adapter.tokenizer.decode(output, skip_special_tokens=True).strip() == answer.text


@pytest.mark.parametrize("family", ["llava_next", "qwen3_vl"])
def test_pictures_follow_their_marks(family: str, folders: dict[str, Path], sample: Sample) -> None:
    model, adapter = load_model(folders[family], evaluation=True)
    backward = (ImagePart(index=1), ImagePart(index=0), *sample.messages[0].content[2:])
    swapped = replace(
        sample,
        messages=(Message(role="user", content=backward),),
        image_paths=sample.image_paths[::-1],
        image_sha256=sample.image_sha256[::-1],
    )
    prompts = make_prompts(adapter, [sample, swapped], fingerprint="w", decoding=DECODING)
    assert prompts[0].text == prompts[1].text and prompts[0].key != prompts[1].key
    first, second = generate_batch(model, adapter, prompts, decoding=DECODING, device=CPU)
    assert first.text == second.text


def test_a_whole_evaluation_runs_and_names_the_processor(
    folders: dict[str, Path], shapes: Path, tmp_path: Path
) -> None:
    config = EvalConfig(tasks=("mis_hard", "general"), max_new_tokens=4, max_samples=2)
    results = evaluate_checkpoint(folders["idefics3"], config=config, data_dir=shapes, out_dir=tmp_path / "out")
    assert results is not None and set(results.tasks) == {"mis_hard", "general"}
    stored = json.loads((tmp_path / "out" / "results.json").read_text())["preprocessing"]
    assert stored["family"] == "generic" and stored["model_type"] == "idefics3"
    before = stored["processor_sha256"]
    template = folders["idefics3"] / "chat_template.jinja"
    text = template.read_text()
    template.write_text(text + "\n")
    try:
        _, adapter = load_model(folders["idefics3"], evaluation=True)
    finally:
        template.write_text(text)
    assert adapter.spec.processor_sha256 != before  # type: ignore[union-attr]


def test_a_tile_budget_without_tiles_is_refused(folders: dict[str, Path], shapes: Path, tmp_path: Path) -> None:
    config = EvalConfig(tasks=("mis_hard",), max_new_tokens=4, max_tiles=3)
    with pytest.raises(UserError, match=r"eval\.max_tiles=3 has no effect on a llava model"):
        evaluate_checkpoint(folders["llava"], config=config, data_dir=shapes, out_dir=tmp_path / "out")


def test_training_such_a_model_is_refused(folders: dict[str, Path]) -> None:
    for load in (load_model, load_adapter):
        with pytest.raises(UserError, match=r"'qwen3_vl' model can be evaluated .* and not trained; MIRage trains"):
            load(folders["qwen3_vl"])


@pytest.mark.parametrize("model_type", ["phi4_multimodal", "bert"])
def test_a_model_that_is_no_image_text_model_is_refused(model_type: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match=f"model_type '{model_type}' is not one of internvl, internvl_chat, qwen2_vl"):
        load_model(tmp_path, evaluation=True)


def test_a_folder_without_chat_template_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = write_native(tmp_path / "m", "llava")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="holds no chat template"):
        load_model(folder, evaluation=True)
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("MARK", "<image>"))
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="its LlavaProcessor cannot be built"):
        load_model(folder, evaluation=True)
