"""Read the prompt and settings that programs write into the images that they make."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from .comfyui import read_graph

_SETTINGS_LINE = re.compile(r"^Steps: \d+,", re.MULTILINE)
_SETTING = re.compile(r'\s*([^:,]+):\s*("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)')
_NEGATIVE = re.compile(r"^Negative prompt:", re.MULTILINE)
_DREAM_SEED = re.compile(r"\s(?:-S|--seed)\s*(\d+)")
_USER_COMMENT, _EXIF_BLOCK, _DESCRIPTION, _MAKE, _MODEL = 0x9286, 0x8769, 0x010E, 0x010F, 0x0110
_NO_PROMPT = "unknown"
"""What a node of ComfyUI writes in the place of a prompt that it was not given."""
_KEPT = 2_000
"""Characters of one setting that are kept."""


@dataclasses.dataclass(frozen=True)
class Generation:
    """
    How an image was made.

    Args:
        program (`str`): Where it was read, such as `"A1111 parameters"`.
        prompt (`str`, *optional*): The prompt; `None` where there is none or several, see `unread`.
        negative_prompt (`str`, *optional*): The negative prompt.
        seed (`int`, *optional*): The seed.
        settings (`dict`): Other settings, under the names of the program.
        unread (`str`, *optional*): Why there is no prompt.
    """

    program: str
    prompt: str | None = None
    negative_prompt: str | None = None
    seed: int | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    unread: str | None = None


def read_texts(texts: Mapping[str, str]) -> Generation | None:
    """
    Read the named texts of an image file.

    Args:
        texts (`Mapping[str, str]`): Chunks of a PNG file, or what [`exif_texts`] returns.

    Returns:
        [`Generation`], *optional*: `None` where no program that is known wrote any of them.
    """
    texts = {name: _as_utf8(text) for name, text in texts.items()}
    for key, read in _READERS.items():
        if key in texts:
            found = read(texts)
            if found is not None:
                return found
    return None


def _as_utf8(text: str) -> str:
    """Return a text that was written as UTF-8 where the format says Latin-1, as programs do in `tEXt` and EXIF."""
    try:
        return text.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return text


def exif_texts(exif: Any) -> dict[str, str]:
    """
    Return the texts that programs write into EXIF, under the names that they have in PNG files.

    Args:
        exif (`PIL.Image.Exif`): EXIF of an image.

    Returns:
        `dict[str, str]`: what a user comment holds; `prompt` and `workflow`, which nodes of ComfyUI write as
        description, make and model.
    """
    found = {}
    for tag in (_MODEL, _MAKE, _DESCRIPTION):
        text = str(exif.get(tag, ""))
        name, colon, rest = text.partition(":")
        if colon and name.lower() in ("prompt", "workflow"):
            found[name.lower()] = rest
        elif "sui_image_params" in text:  # as SwarmUI once wrote it
            found["parameters"] = text
    comment = exif.get_ifd(_EXIF_BLOCK).get(_USER_COMMENT) or exif.get(_USER_COMMENT)
    text = (_comment(comment) if isinstance(comment, bytes) else str(comment or "")).strip("\0 \n")
    return found | (_comment_texts(text) if text else {})


def _comment_texts(text: str) -> dict[str, str]:
    content = _json(text)
    if not isinstance(content, dict):
        return {"parameters": text} if is_parameters(text) else {}  # phones and cameras write remarks of their own
    if isinstance(content.get("Comment"), str):  # the chunks of a PNG file of NovelAI
        return {"Software": "NovelAI", "Comment": content["Comment"]}
    if isinstance(content.get("prompt"), dict):
        graphs = (name for name in ("prompt", "workflow") if isinstance(content.get(name), dict))
        return {name: json.dumps(content[name]) for name in graphs}
    if isinstance(content.get("extraMetadata"), str):
        return {"extraMetadata": content["extraMetadata"], "prompt": text}
    if any(isinstance(node, dict) and "class_type" in node for node in content.values()):
        return {"prompt": text}
    return {"parameters": text}


def _comment(value: bytes) -> str:
    code, content = value[:8], value[8:]
    if code.startswith(b"UNICODE"):
        # The standard leaves the byte order open. Most prompts are Latin letters, whose high byte is zero.
        big = content[::2].count(0) >= content[1::2].count(0)
        return content.decode("utf-16-be" if big else "utf-16-le", errors="replace")
    known = code.startswith((b"ASCII", b"\0\0\0\0"))
    return (content if known else value).decode("utf-8", errors="replace").strip("\0")


def is_parameters(text: str) -> bool:
    """Return whether a text is a prompt with settings as A1111 writes them, also into text files."""
    return bool(_SETTINGS_LINE.search(text))


def read_parameters(text: str) -> Generation:
    """Read a text that A1111 or Forge wrote: prompt, negative prompt and a line of settings."""
    text = text.replace("\r\n", "\n").strip()
    settings: dict[str, Any] = {}
    lines = [line.start() for line in _SETTINGS_LINE.finditer(text)]
    if lines:
        found = _SETTING.findall(text[lines[-1] :])
        settings = {name.strip(): value.strip().strip('"')[:_KEPT] for name, value in found}
        text = text[: lines[-1]].strip()
    negative = _NEGATIVE.search(text)
    prompt, unwanted = (text[: negative.start()], text[negative.end() :]) if negative else (text, "")
    return Generation("A1111 parameters", _text(prompt), _text(unwanted), _seed(settings.pop("Seed", None)), settings)


def _parameters(texts: Mapping[str, str]) -> Generation | None:
    content = _json(texts["parameters"])
    if not isinstance(content, dict):
        found = read_parameters(texts["parameters"])
        return None if found.prompt == _NO_PROMPT else found
    if isinstance(content.get("sui_image_params"), dict):
        return _plain("SwarmUI parameters", content["sui_image_params"], "prompt", "negativeprompt")
    if "Prompt" in content:
        return _plain("Fooocus parameters", content, "Prompt", "Negative")
    return _plain("Fooocus parameters", content, "prompt", "negative_prompt")


def _civitai(texts: Mapping[str, str]) -> Generation | None:
    content = _json(texts["extraMetadata"])
    if not isinstance(content, dict) or not _text(content.get("prompt")):
        return None
    return _plain("Civitai metadata", content, "prompt", "negativePrompt")


def _graph(texts: Mapping[str, str]) -> Generation | None:
    for key in ("prompt", "workflow"):
        content = _json(texts.get(key, ""))
        found = read_graph(content)
        if found is None:
            continue
        prompt = _text(found.prompts[0]) if len(found.prompts) == 1 else None
        cause = "several prompts" if found.prompts else "no text that can be read"
        unread = f"its ComfyUI graph has {cause}" if prompt is None else None
        return Generation(
            "ComfyUI graph", prompt, _text(found.negative_prompt), _seed(found.seed), found.settings, unread
        )
    if isinstance(_json(texts.get("prompt", "")), dict):
        return Generation("ComfyUI graph", unread="its ComfyUI graph has no sampler that is known")
    if "prompt" in texts:  # plain text, as some programs write
        names = {"negative_prompt": texts.get("negative_prompt"), "seed": texts.get("seed"), "prompt": texts["prompt"]}
        return _plain("text chunk `prompt`", names, "prompt", "negative_prompt")
    return None


def _invokeai(texts: Mapping[str, str]) -> Generation | None:
    content = _json(texts["invokeai_metadata"])
    if not isinstance(content, dict) or "positive_prompt" not in content:
        return None
    return _plain("InvokeAI metadata", content, "positive_prompt", "negative_prompt")


def _sd_metadata(texts: Mapping[str, str]) -> Generation | None:
    content = _json(texts["sd-metadata"])
    image = content.get("image") if isinstance(content, dict) else None
    if not isinstance(image, dict):
        return None
    parts = image.get("prompt")
    if isinstance(parts, list):
        parts = ", ".join(str(part.get("prompt", "")) for part in parts if isinstance(part, dict))
    return _bracketed(_plain("InvokeAI metadata", {**image, "prompt": parts}, "prompt", "negative_prompt"))


def _dream(texts: Mapping[str, str]) -> Generation | None:
    quoted = re.match(r'\s*"(.*)"', texts["Dream"], re.DOTALL)
    if quoted is None:
        return None
    seed = _DREAM_SEED.search(texts["Dream"], quoted.end())
    values = {"prompt": quoted[1], "seed": seed[1] if seed else None}
    return _bracketed(_plain("InvokeAI metadata", values, "prompt", "negative_prompt"))


def _bracketed(found: Generation) -> Generation:
    """Take the negative prompt out of a prompt of early InvokeAI, where it stands in square brackets."""
    parts = re.findall(r"\[([^\[\]]*)\]", found.prompt or "")
    prompt = _text(re.sub(r"\s*\[[^\[\]]*\]", "", found.prompt or ""))
    return dataclasses.replace(found, prompt=prompt, negative_prompt=_text(", ".join(parts)) or found.negative_prompt)


def _novelai(texts: Mapping[str, str]) -> Generation | None:
    if not texts.get("Software", "").startswith("NovelAI"):
        return None
    content = _json(texts.get("Comment", ""))
    content = content if isinstance(content, dict) else {}
    found = _plain(
        "NovelAI comment", {**content, "prompt": texts.get("Description") or content.get("prompt")}, "prompt", "uc"
    )
    caption = (content.get("v4_prompt") or {}) if isinstance(content.get("v4_prompt"), dict) else {}
    people = (caption.get("caption") or {}) if isinstance(caption.get("caption"), dict) else {}
    if isinstance(people.get("base_caption"), str) and isinstance(people.get("char_captions"), list):
        parts = [people["base_caption"]]
        parts += [str(one.get("char_caption", "")) for one in people["char_captions"] if isinstance(one, dict)]
        found = dataclasses.replace(found, prompt=_text(", ".join(part.strip() for part in parts if part.strip())))
    return found


_READERS = {
    "parameters": _parameters,
    "invokeai_metadata": _invokeai,
    "sd-metadata": _sd_metadata,
    "Dream": _dream,
    "Software": _novelai,
    "extraMetadata": _civitai,
    "prompt": _graph,
    "workflow": _graph,
}
"""By the name of the chunk. A1111's text goes first: programs write it beside their own for others to read."""


def _plain(program: str, values: dict[str, Any], prompt: str = "prompt", negative: str = "") -> Generation:
    """Return what a flat table of settings says."""
    settings = {
        name: value[:_KEPT] if isinstance(value, str) else value
        for name, value in values.items()
        if name not in (prompt, negative, "seed") and isinstance(value, str | int | float) and value != ""
    }
    return Generation(
        program, _text(values.get(prompt)), _text(values.get(negative)), _seed(values.get("seed")), settings
    )


def _text(value: Any) -> str | None:
    """Return a prompt as one line; `None` for none."""
    text = " ".join(value.split()) if isinstance(value, str) else ""
    return text.encode("utf-8", errors="replace").decode("utf-8") or None


def _seed(value: Any) -> int | None:
    try:
        seed = int(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return seed if 0 <= seed < 2**64 else None


def _json(text: str) -> Any:
    """Return decoded JSON; `None` for other text, and for JSON that is nested too deep."""
    if not text.lstrip().startswith("{"):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
