"""InternLM2's sentencepiece tokenizer as a plain fast tokenizer: same ids as the published slow one, no remote code.

The published class (`tokenization_internlm2.py`) cuts the text at its added tokens, longest first, and hands each piece
between them to sentencepiece as a text of its own. `build_fast_tokenizer` writes that as a `tokenizers` pipeline, and
refuses to return one whose ids differ from sentencepiece's on probes made of the model's own vocabulary. A model with a
character map (InternLM2's has none) can still differ where a combining mark follows a mapped character: `tokenizers`
maps whole graphemes.

One difference is meant: where the published files rename a piece (InternLM2's `[UNUSED_TOKEN_145]` is `<|im_end|>`),
the old spelling inside a text is plain text here. Upstream makes it the control token, which user text must not do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram
from transformers import PreTrainedTokenizerFast

from mirage.errors import UserError
from mirage.strict_json import read_json_object

MODEL_FILE = "tokenizer.model"
# Upstream `conversation.py`, template internvl2_5.
DEFAULT_SYSTEM_PROMPT = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)
SPACE = "\u2581"
PROBE_PIECES = 48
# The trainer's and the pieces' enumerations of sentencepiece_model.proto.
UNIGRAM, BYTE_PAIR = 1, 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
# Names under which transformers' InternVLProcessor asks the tokenizer for its marks.
PROCESSOR_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
}
PROBE_TEXTS = (
    "",
    " ",
    "\n",
    "\u2581",
    " a",
    "a ",
    "a  b   c    d\t\te\r\n\n\nf",
    "\u2581\u2581 a \u2581",
    "Hello, world! 2+2=4; 1234567890",
    "na\u00efve caf\u00e9 cafe\u0301 \ufb01 \u00bd \u2460 \uff21 \u3000",
    "\u4f60\u597d\uff0c\u4e16\u754c \u0645\u0631\u062d\u0628\u0627",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \ud55c\uad6d\uc5b4 \u1e9e",
    "\U0001f600\U0001f469\u200d\U0001f469\u200d\U0001f467 \x00\x07\x7f \ufffd\ufeff",
    "def f(x):\n    return x ** 2  # a comment\n\n\n",
)


@dataclass(frozen=True)
class SpecialToken:
    """One token that the published files add to the sentencepiece vocabulary, or rename in it."""

    id: int
    content: str
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a published folder that holds `tokenizer.model`. BOS is put first, as upstream does.

    Raises `UserError` when a file is missing or damaged, or when the model uses something that a fast tokenizer cannot
    reproduce exactly.
    """
    model = read_sentencepiece(folder / MODEL_FILE)
    config = _read_object(folder / "tokenizer_config.json")
    special_map = _read_object(folder / "special_tokens_map.json")
    try:
        return _load_tokenizer(model, config, special_map, folder)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder}: tokenizer_config.json, special_tokens_map.json or added_tokens.json describes tokens in a way "
            f"that is not known ({type(error).__name__}: {error!s:.100}); fetch them again"
        ) from error


def _load_tokenizer(
    model: Any, config: Mapping[str, Any], special_map: Mapping[str, Any], folder: Path
) -> PreTrainedTokenizerFast:
    names = {
        name: _content(config.get(name) or special_map.get(name) or default)
        for name, default in (
            ("bos_token", "<s>"),
            ("eos_token", "</s>"),
            ("unk_token", "<unk>"),
            ("pad_token", "</s>"),
        )
    }
    tokens = added_tokens(folder, model, config, special_map, names)
    backend = build_fast_tokenizer(model, tokens)
    add_bos, add_eos = bool(config.get("add_bos_token", True)), bool(config.get("add_eos_token", False))
    contents = {token.content for token in tokens}
    named = {name: token for name, token in PROCESSOR_TOKENS.items() if token in contents}
    extras = [token.content for token in tokens if token.special and token.content not in names.values()]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **names,
        extra_special_tokens=[token for token in extras if token not in named.values()],
        model_specific_special_tokens=named,
        add_bos_token=add_bos,
        add_eos_token=add_eos,
        clean_up_tokenization_spaces=False,
        model_max_length=config.get("model_max_length", 10**30),
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.chat_template = chat_template()
    check_same_ids(
        lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
        reference_encoder(model, tokens),
        probe_texts(model, tokens),
        where=folder / MODEL_FILE,
    )
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` so that transformers 4 and 5 load them.

    transformers 5 names its own class and lists extra tokens, which 4 (inside vLLM releases) does not read; the older
    spelling is read by both. A tokenizer of a class of its own (Qwen2's) is saved as it is.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = _read_object(path)
    if config.get("tokenizer_class") not in ("TokenizersBackend", "PreTrainedTokenizerFast"):
        return
    named = _processor_tokens(tokenizer) | (config.pop("model_specific_special_tokens", None) or {})
    extras = config.pop("extra_special_tokens", None) or []
    for name in [*named, "is_local", "local_files_only"]:
        config.pop(name, None)
    config.update(
        tokenizer_class="PreTrainedTokenizerFast", additional_special_tokens=extras, extra_special_tokens=named
    )
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def _processor_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    """The tokens that transformers' `InternVLProcessor` asks the tokenizer for by name.

    A vocabulary without a video mark names one that no text holds before it is expanded: a token that is not there
    would get an id that the embedding does not have.
    """
    vocabulary = tokenizer.get_vocab()
    if "<IMG_CONTEXT>" not in vocabulary:
        return {}
    return {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>" if "<video>" in vocabulary else "</img>",
    }


def read_sentencepiece(path: Path) -> Any:
    """The parsed sentencepiece file (a protobuf `ModelProto`)."""
    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        model.ParseFromString(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except Exception as error:  # protobuf's DecodeError has no stable import path
        raise UserError(f"{path}: is not a sentencepiece model; fetch the file again") from error
    if not model.pieces:
        raise UserError(f"{path}: is not a sentencepiece model (it has no vocabulary); fetch the file again")
    return model


def added_tokens(
    folder: Path,
    model: Any,
    config: Mapping[str, Any],
    special_map: Mapping[str, Any],
    names: Mapping[str, str],
) -> list[SpecialToken]:
    """Every added token, by id, as transformers' slow tokenizers collect them.

    `tokenizer_config.json` lists them with ids (`added_tokens_decoder`); older folders have `added_tokens.json`. A
    special token without an id takes that of the vocabulary's piece of the same spelling, else the next free one.
    """
    found: dict[str, SpecialToken] = {}
    for key, entry in (config.get("added_tokens_decoder") or {}).items():
        flags = {flag: bool(entry.get(flag, False)) for flag in ("lstrip", "rstrip", "single_word")}
        found[entry["content"]] = SpecialToken(int(key), entry["content"], bool(entry.get("special", True)), **flags)
    extras = [*(config.get("additional_special_tokens") or []), *(special_map.get("additional_special_tokens") or [])]
    special = {*names.values(), *map(_content, extras)}
    if not found:
        for content, number in _read_object(folder / "added_tokens.json").items():
            found[content] = SpecialToken(int(number), content, content in special)
    pieces = {piece.piece: index for index, piece in enumerate(model.pieces)}
    for content in [*names.values(), *map(_content, extras)]:
        if content not in found:
            free = max([len(pieces) - 1, *(token.id for token in found.values())]) + 1
            found[content] = SpecialToken(pieces.get(content, free), content)
    tokens = sorted(found.values(), key=lambda token: token.id)
    ids = [token.id for token in tokens]
    if len(set(ids)) != len(ids):
        raise UserError(f"{folder}: two added tokens share an id; mend tokenizer_config.json or added_tokens.json")
    return tokens


def build_fast_tokenizer(model: Any, tokens: Sequence[SpecialToken]) -> Tokenizer:
    """The `tokenizers` pipeline of a parsed sentencepiece model and its added tokens, without BOS handling.

    Raises `UserError` for model types and settings that have no exact counterpart.
    """
    trainer, spec = model.trainer_spec, model.normalizer_spec
    if trainer.model_type not in (UNIGRAM, BYTE_PAIR):
        raise UserError(f"{MODEL_FILE}: model type {trainer.model_type} is neither BPE nor unigram")
    if trainer.treat_whitespace_as_suffix or any(piece.type == UNUSED for piece in model.pieces):
        raise UserError(f"{MODEL_FILE}: suffix spaces or unused pieces have no counterpart in a fast tokenizer")
    contents = {token.content for token in tokens}
    hidden = contents | renamed_pieces(model, tokens)
    symbols = [piece.piece for piece in model.pieces if piece.type == USER_DEFINED and piece.piece not in hidden]
    rewrites = spec.add_dummy_prefix or spec.remove_extra_whitespaces or bool(spec.precompiled_charsmap)
    isolate = bool(symbols) and rewrites
    tokenizer = Tokenizer(_fast_model(model, tokens, ignore_merges=isolate))
    tokenizer.normalizer = _normalizer(spec)
    if isolate:
        # Cutting at these symbols before the normaliser would give each piece a prefix space of its own.
        pattern = "|".join(re.escape(symbol) for symbol in sorted(symbols, key=len, reverse=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    elif symbols:
        tokenizer.add_tokens([AddedToken(symbol, normalized=False, special=False) for symbol in symbols])
    for token in tokens:
        flags = {"lstrip": token.lstrip, "rstrip": token.rstrip, "single_word": token.single_word}
        entry = AddedToken(token.content, normalized=False, special=token.special, **flags)
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([entry])
    tokenizer.decoder = _decoder(spec, byte_fallback=trainer.byte_fallback)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])
    return tokenizer


def renamed_pieces(model: Any, tokens: Sequence[SpecialToken]) -> set[str]:
    """Spellings in the sentencepiece model whose id an added token of another spelling has taken."""
    contents = {token.id: token.content for token in tokens}
    return {piece.piece for index, piece in enumerate(model.pieces) if contents.get(index, piece.piece) != piece.piece}


def _fast_model(model: Any, tokens: Sequence[SpecialToken], *, ignore_merges: bool) -> BPE | Unigram:
    """Vocabulary and merges. An added token at a piece's id takes the piece's place, as it does when ids are read."""
    spellings = {index: piece.piece for index, piece in enumerate(model.pieces)}
    spellings.update({token.id: token.content for token in tokens})
    unk_piece = model.pieces[model.trainer_spec.unk_id].piece
    byte_fallback = model.trainer_spec.byte_fallback
    if model.trainer_spec.model_type == UNIGRAM:
        if sorted(spellings) != list(range(len(spellings))):
            raise UserError(f"{MODEL_FILE}: added tokens leave gaps in the ids, which a unigram model cannot carry")
        scores = [piece.score for piece in model.pieces] + [0.0] * (len(spellings) - len(model.pieces))
        vocabulary = [(spellings[index], scores[index]) for index in range(len(spellings))]
        return Unigram(vocabulary, unk_id=model.trainer_spec.unk_id, byte_fallback=byte_fallback)
    return BPE(
        {content: index for index, content in sorted(spellings.items())},
        _merges(model, without=renamed_pieces(model, tokens)),
        unk_token=spellings.get(model.trainer_spec.unk_id, unk_piece),
        fuse_unk=True,
        byte_fallback=byte_fallback,
        ignore_merges=ignore_merges,
    )


def _merges(model: Any, *, without: set[str]) -> list[tuple[str, str]]:
    """Pairs in the order in which sentencepiece joins them: the joined piece's score, best first.

    sentencepiece joins any two neighbours whose union is in the vocabulary, so each way to cut a piece is a merge.
    """
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == NORMAL and piece.piece not in without}
    merges: list[tuple[float, int, str, str]] = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                merges.append((-score, len(merges), left, right))
    return [(left, right) for _, _, left, right in sorted(merges)]


def _normalizer(spec: Any) -> normalizers.Normalizer:
    """sentencepiece's `normalizer.cc`: character map, spaces, prefix, escaped spaces, in this order."""
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [
            normalizers.Replace(Regex(r"\A +"), ""),
            normalizers.Replace(Regex(f"[ {SPACE}]+\\z"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", SPACE))
    return normalizers.Sequence(steps)


def _decoder(spec: Any, *, byte_fallback: bool) -> decoders.Decoder:
    steps: list[decoders.Decoder] = [decoders.Replace(SPACE, " ")]
    if byte_fallback:
        steps.append(decoders.ByteFallback())
    steps.append(decoders.Fuse())
    if spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def reference_encoder(model: Any, tokens: Sequence[SpecialToken]) -> Callable[[str], list[int]]:
    """What the published slow tokenizer does with a text, on sentencepiece itself; without BOS."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    ids = {token.content: token.id for token in tokens}
    flags = {token.content: token for token in tokens}
    longest_first = sorted(ids, key=len, reverse=True)
    pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if ids else re.compile("(?!)()")

    def encode(text: str) -> list[int]:
        pieces = pattern.split(text)
        for index in range(1, len(pieces), 2):
            if flags[pieces[index]].lstrip:
                pieces[index - 1] = pieces[index - 1].rstrip()
            if flags[pieces[index]].rstrip:
                pieces[index + 1] = pieces[index + 1].lstrip()
        encoded: list[int] = []
        for index, piece in enumerate(pieces):
            encoded += [ids[piece]] if index % 2 else processor.encode(piece)
        return encoded

    return encode


def probe_texts(model: Any, tokens: Sequence[SpecialToken]) -> Iterator[str]:
    """Texts that touch the whole vocabulary, runs of spaces, several scripts, and added tokens inside text."""
    yield from PROBE_TEXTS
    yield from (" " * count + "x" for count in range(1, 70))
    for index, token in enumerate(tokens):
        yield f"{token.content}a {token.content} b{token.content}\n{tokens[index - 1].content}{token.content} "
    renamed = renamed_pieces(model, tokens)
    pieces = [piece for piece in model.pieces if piece.type in (NORMAL, USER_DEFINED) and piece.piece not in renamed]
    spellings = [piece.piece.replace(SPACE, " ") for piece in pieces]
    for start in range(0, len(spellings), PROBE_PIECES):
        yield "".join(spellings[start : start + PROBE_PIECES])
        # A stride that is coprime to most sizes puts pieces beside other neighbours.
        yield "".join(spellings[(start * 7919 + step * 104729) % len(spellings)] for step in range(PROBE_PIECES))


def check_same_ids(
    fast: Callable[[str], list[int]], reference: Callable[[str], list[int]], texts: Iterator[str], *, where: Path
) -> None:
    """Raise `UserError` naming the first text on which the two encoders differ."""
    for text in texts:
        if fast(text) != reference(text):
            raise UserError(
                f"{where}: the fast tokenizer gives {fast(text)[:12]} and sentencepiece {reference(text)[:12]} for "
                f"{text[:60]!r}; this sentencepiece model cannot be converted exactly"
            )


def chat_template(
    *, image_mark: str = "<IMG_CONTEXT>", system_prompt: str | None = None, number_images: bool = True
) -> str:
    """InternVL2.5's chat as a Jinja template, equal to what `InternVLAdapter.chat_segments` renders.

    `image_mark` is what a processor expands: `<IMG_CONTEXT>` for transformers' native class, `<image>` for the
    published one. Source: upstream `conversation.py` (template internvl2_5) and `preprocess_internvl2_5`.
    """
    system = DEFAULT_SYSTEM_PROMPT if system_prompt is None else system_prompt
    opening = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    numbering = "'Image-' ~ ns.image ~ ': '" if number_images else "''"
    return f"""\
{{%- set ns = namespace(image=0, total=0, bare=true) -%}}
{{%- for message in messages if message['content'] is not string -%}}
{{%- for part in message['content'] if part['type'] == 'image' or part['type'] == 'image_url' -%}}
{{%- set ns.total = ns.total + 1 -%}}
{{%- endfor -%}}
{{%- endfor -%}}
{{%- if not messages or messages[0]['role'] != 'system' -%}}
{{{{- {json.dumps(opening, ensure_ascii=False)} -}}}}
{{%- endif -%}}
{{%- for message in messages -%}}
{{{{- '<|im_start|>' ~ message['role'] ~ '\\n' -}}}}
{{%- if message['content'] is string -%}}
{{{{- message['content'] -}}}}
{{%- else -%}}
{{%- set texts = message['content'] | selectattr('type', 'equalto', 'text') | list -%}}
{{%- set ns.bare = not (texts and texts[0]['text'].startswith('\\n')) -%}}
{{%- for part in message['content'] -%}}
{{%- if part['type'] == 'text' -%}}
{{%- set ns.bare = false -%}}
{{{{- part['text'] -}}}}
{{%- else -%}}
{{%- set ns.image = ns.image + 1 -%}}
{{{{- ({numbering} if ns.bare and ns.total > 1 else '') ~ '{image_mark}' ~ ('\\n' if ns.bare else '') -}}}}
{{%- endif -%}}
{{%- endfor -%}}
{{%- endif -%}}
{{{{- '<|im_end|>\\n' -}}}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}
{{{{- '<|im_start|>assistant\\n' -}}}}
{{%- endif -%}}"""


def _content(entry: Any) -> str:
    return entry["content"] if isinstance(entry, Mapping) else str(entry)


def _read_object(path: Path) -> dict[str, Any]:
    return read_json_object(path, remedy="fetch it again", any_number=True) if path.exists() else {}
