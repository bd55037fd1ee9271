"""From a folder or hub id to (model, adapter): the one place that knows which families there are."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal, overload

import torch
from transformers import AutoConfig, AutoTokenizer, InternVLForConditionalGeneration, Qwen2VLForConditionalGeneration

from mirage.config.schema import PreprocessingConfig
from mirage.errors import UserError
from mirage.files import cache_dir
from mirage.models.adapter import GenerationAdapter, ModelAdapter, PreprocessingSpec
from mirage.models.attention import choose_attention
from mirage.models.dynamic_rope import forget_longer_sequences
from mirage.models.internvl import InternVLAdapter, check_internvl_config
from mirage.models.qwen2_vl import Qwen2VLAdapter
from mirage.models.shipped import PREFIX, find_shipped
from mirage.models.strict_loading import load_peft, load_whole
from mirage.strict_json import read_json_object

# transformers' model_type -> (adapter, model class). A new family is one line here and one file beside this one.
LOGGER = logging.getLogger(__name__)
FAMILIES: dict[str, tuple[type[ModelAdapter], Any]] = {
    "internvl": (InternVLAdapter, InternVLForConditionalGeneration),
    "qwen2_vl": (Qwen2VLAdapter, Qwen2VLForConditionalGeneration),
}
PUBLISHED_INTERNVL = "internvl_chat"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def find_weights(path: str | Path, *, revision: str | None = None) -> Path:
    """The local folder of `path`: a folder with weights, a MIRage checkpoint (its `model/`), `shipped:NAME` for a model
    that comes with the package, or a hub id to download.

    A published InternVL folder is converted once into the cache. Raises `UserError` when there is nothing there.
    """
    if str(path).startswith(PREFIX):
        return find_shipped(str(path))
    folder = Path(path).expanduser()
    if not folder.exists():
        if folder.is_absolute() or str(path).startswith(".") or str(path).count("/") != 1:
            raise UserError(f"no model at {str(path)!r}: neither a local folder nor a hub id of the form owner/name")
        folder = _download(str(path), revision)
    if (folder / "model" / "config.json").exists() or (folder / "model" / "adapter_config.json").exists():
        folder = folder / "model"
    if (folder / "adapter_config.json").exists():
        return folder
    config_file = folder / "config.json"
    if not config_file.exists():
        raise UserError(f"{folder} holds no config.json; model.path must be a folder with a model in it")
    model_type = _read_json(config_file).get("model_type")
    if model_type == PUBLISHED_INTERNVL:
        from mirage.models.internvl_checkpoint import native_folder

        return native_folder(folder, cache_dir() / "converted")
    if not list(folder.glob("*.safetensors")):
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        found = f" but pickles ({pickles[0]})" if pickles else ""
        raise UserError(f"{folder} holds no .safetensors weights{found}; MIRage reads no other format")
    return folder


def load_adapter(
    folder: Path, *, preprocessing: PreprocessingConfig | None = None, trust_remote_code: bool = False
) -> ModelAdapter:
    """The adapter of a weights folder. Its spec is the folder's own; `preprocessing` sets it where there is none.

    Raises `UserError` for an unknown family.
    """
    weights, folder = folder, base_folder(folder)
    raw = _read_json(folder / "config.json")
    if _model_type(raw) not in FAMILIES:
        raise _unknown(folder, raw)
    config = _read_config(folder)
    adapter_class, _ = FAMILIES[config.model_type]
    # Weights alone load too: the model runs, only text cannot be rendered.
    has_tokenizer = any((folder / name).exists() for name in TOKENIZER_FILES)
    tokenizer = _read_tokenizer(folder, trust_remote_code=trust_remote_code) if has_tokenizer else None
    # An adapter folder carries the spec it was trained with; its base may have another, or none.
    spec = _spec(adapter_class.family, weights if PreprocessingSpec.load(weights) else folder, config, preprocessing)
    return adapter_class(tokenizer, config, spec)


def _read_tokenizer(folder: Path, *, trust_remote_code: bool) -> Any:
    """The folder's tokenizer: transformers' own class, or with `trust_remote_code` the one that its files bring."""
    file = folder / "tokenizer_config.json"
    code = _read_json(file).get("auto_map") if trust_remote_code and file.is_file() else None
    if code:
        LOGGER.warning("%s: model.trust_remote_code=true runs code that came with the weights (%s)", folder, code)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=bool(code))


def known_family(folder: Path) -> str | None:
    """The family of a weights folder, None where MIRage has no adapter of its own for it."""
    model_type = _model_type(_read_json(base_folder(folder) / "config.json"))
    return FAMILIES[model_type][0].family if model_type in FAMILIES else None


def _read_config(folder: Path) -> Any:
    """The config of a folder whose model_type transformers knows; no code that comes with it is run."""
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for a config that does not fit
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder / 'config.json'}: is not a usable config ({reason})") from error


def _unknown(folder: Path, raw: dict[str, Any]) -> UserError:
    from mirage.models.generic import is_known

    model_type = raw.get("model_type")
    known = ", ".join(sorted([*FAMILIES, PUBLISHED_INTERNVL]))
    if isinstance(model_type, str) and is_known(model_type):
        return UserError(
            f"{folder / 'config.json'}: a {model_type!r} model can be evaluated (mirage evaluate) and not trained; "
            f"MIRage trains {known}"
        )
    code = ", and it asks for remote code (auto_map), which MIRage does not run" if raw.get("auto_map") else ""
    return UserError(f"{folder / 'config.json'}: model_type {model_type!r:.80} is not one of {known}{code}")


@overload
def load_model(
    path: str | Path,
    *,
    preprocessing: PreprocessingConfig | None = None,
    attention: str = "auto",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    runs_on: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    evaluation: Literal[False] = False,
) -> tuple[Any, ModelAdapter]: ...


@overload
def load_model(
    path: str | Path,
    *,
    preprocessing: PreprocessingConfig | None = None,
    attention: str = "auto",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    runs_on: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    evaluation: Literal[True],
) -> tuple[Any, GenerationAdapter]: ...


def load_model(
    path: str | Path,
    *,
    preprocessing: PreprocessingConfig | None = None,
    attention: str = "auto",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    runs_on: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    evaluation: bool = False,
) -> tuple[Any, GenerationAdapter]:
    """(model, adapter) of a weights folder, a MIRage checkpoint, a peft adapter folder or a hub id.

    The model is the plain transformers class (or peft's wrapper of it) in evaluation mode and takes transformers'
    usual arguments. `dtype` is the type of its weights. `runs_on` is the device type it will compute on, where that is
    not `device`: attention is chosen for it. With `evaluation`, a model of no family of MIRage's own is
    loaded too where transformers knows it, and asked through its own processor.
    """
    folder = find_weights(path, revision=revision)
    if evaluation:
        from mirage.models.generic import is_known, load_generic

        model_type = _model_type(_read_json(base_folder(folder) / "config.json"))
        if model_type not in FAMILIES and is_known(str(model_type)):
            config = _read_config(base_folder(folder))
            return load_generic(folder, config=config, dtype=dtype, device=device)
    adapter = load_adapter(folder, preprocessing=preprocessing, trust_remote_code=trust_remote_code)
    place = runs_on or torch.device(device).type
    implementation, _ = choose_attention(attention, device_type=place, dtype=dtype)
    if adapter.family == "internvl":
        check_internvl_config(adapter.config)
    _, model_class = FAMILIES[adapter.config.model_type]
    model = load_whole(model_class, base_folder(folder), dtype=dtype, attention=implementation)
    if (folder / "adapter_config.json").exists():
        model = load_peft(model, folder)
    forget_longer_sequences(model)
    if adapter.tokenizer is not None:
        model.generation_config.eos_token_id = adapter.stop_ids
        model.generation_config.pad_token_id = adapter.pad_id
    return model.to(device).eval(), adapter


def base_folder(folder: Path) -> Path:
    """The folder of the full weights: `folder` itself, or the base model that its peft adapter names."""
    adapter_file = folder / "adapter_config.json"
    if not adapter_file.exists():
        return folder
    name = _read_json(adapter_file).get("base_model_name_or_path")
    if not isinstance(name, str):
        raise UserError(f"{adapter_file}: names no base_model_name_or_path; write the base model's folder there")
    base = Path(name)
    if not base.exists():
        raise UserError(f"{adapter_file}: the base model {base} is not there; edit base_model_name_or_path")
    return base


def _spec(family: Any, folder: Path, config: Any, preprocessing: PreprocessingConfig | None) -> PreprocessingSpec:
    saved = PreprocessingSpec.load(folder)
    if preprocessing is None and saved is not None:
        return saved
    settings = (preprocessing or PreprocessingConfig()).model_dump()
    if preprocessing is None and family == "internvl":
        settings["image_size"] = _edge(config.vision_config.image_size)
    spec = PreprocessingSpec(family=family, **settings)
    if family == "internvl" and spec.image_size != _edge(config.vision_config.image_size):
        raise UserError(
            f"preprocessing.image_size is {spec.image_size} and the vision tower of {folder} takes "
            f"{_edge(config.vision_config.image_size)} pixels; set preprocessing.image_size to that"
        )
    return spec


def _edge(size: Any) -> int:
    return size[0] if isinstance(size, (list, tuple)) else size


def _model_type(config: dict[str, Any]) -> str:
    """The family's name in a config; empty for one that names none."""
    found = config.get("model_type")
    return found if isinstance(found, str) else ""


def _read_json(path: Path) -> dict[str, Any]:
    return read_json_object(path, remedy="fetch it again", any_number=True)


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"could not get {name!r} from the hub ({reason}); give model.path a local folder instead"
        ) from error
