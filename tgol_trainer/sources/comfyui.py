"""Find the prompts and the settings in a graph of ComfyUI, as it stands inside an image file."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator
from typing import Any

_TEXTS = ("t5xxl", "text_g", "clip_g", "text", "clip_l", "text_l", "llama")
"""Inputs of nodes that encode text; where several are filled, the first, which is the longest prompt, counts."""
_STRINGS = (
    *_TEXTS,
    "string",
    "value",
    "prompt",
    "populated_text",
    "text_positive",
    "positive",
    "Text",
    "text1",
    "any",
    "source",
)
"""Inputs of nodes that make a text which another node encodes."""
_LANGUAGE_MODELS = ("TextGenerate",)
"""Nodes whose text is a question to a language model. Its answer, the prompt, is not in the graph."""
_SETTINGS = ("steps", "cfg", "sampler_name", "scheduler", "denoise", "guidance")
_MODELS = ("ckpt_name", "unet_name", "model_name")
_SEEDS = ("seed", "noise_seed", "value")
_MOST_NODES = 10_000

Graph = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class GraphPrompts:
    """
    What a graph says of the image that it made.

    Args:
        prompts (`list[str]`): Different texts of the positive conditioning; several where the graph makes several
            images and does not tell which one this is.
        negative_prompt (`str`, *optional*): Text of the negative conditioning.
        seed (`int`, *optional*): Seed of the sampler.
        settings (`dict`): Plain settings of the sampler, and `model`, the file of the network.
    """

    prompts: list[str]
    negative_prompt: str | None
    seed: int | None
    settings: dict[str, Any]


def read_graph(graph: Any) -> GraphPrompts | None:
    """
    Read a graph from the samplers that are nearest to its outputs.

    Args:
        graph (`Any`): Decoded JSON of the chunk `prompt` (nodes by their number) or `workflow` (a list of nodes).

    Returns:
        [`GraphPrompts`], *optional*: `None` for what is no graph, or a graph without a sampler.
    """
    nodes = _nodes(graph)
    if nodes is None:
        return None
    samplers = _samplers(nodes)
    if not samplers:
        return None
    reader = _Reader(nodes)
    prompts = list(dict.fromkeys(filter(None, (reader.conditioning(name, "positive") for name in samplers))))
    inputs = nodes[samplers[0]]
    negative = reader.conditioning(samplers[0], "negative")
    return GraphPrompts(prompts, negative or None, reader.seed(inputs), reader.settings(inputs))


def _nodes(graph: Any) -> Graph | None:
    """Return the inputs of each node by its number, with its class as `""`."""
    if not isinstance(graph, dict) or len(graph) > _MOST_NODES:
        return None
    if isinstance(graph.get("nodes"), list):
        return _from_workflow(graph)
    found = {
        str(name): {**node["inputs"], "": str(node.get("class_type", ""))}
        for name, node in graph.items()
        if isinstance(node, dict) and isinstance(node.get("inputs"), dict)
    }
    return found or None


def _from_workflow(graph: dict[str, Any]) -> Graph | None:
    links = {}
    for link in graph.get("links") or []:
        if isinstance(link, list) and len(link) >= 4:
            links[link[0]] = [str(link[1]), link[2]]
        elif isinstance(link, dict):
            links[link.get("id")] = [str(link.get("origin_id")), link.get("origin_slot")]
    found: Graph = {}
    for node in graph["nodes"][:_MOST_NODES]:
        if not isinstance(node, dict) or node.get("mode") == 2:  # muted
            continue
        entries = [entry for entry in node.get("inputs") or [] if isinstance(entry, dict)]
        inputs = _widgets(str(node.get("type", "")), node.get("widgets_values"), entries)
        inputs |= {
            str(entry.get("name")): links[entry["link"]]
            for entry in entries
            if isinstance(entry.get("link"), int) and entry["link"] in links
        }
        found[str(node.get("id"))] = {**inputs, "": str(node.get("type", ""))}
    return found or None


def _widgets(kind: str, values: Any, entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Name the values of a node's widgets, which a workflow stores without names but in newer files."""
    if isinstance(values, dict):
        return dict(values)
    if not isinstance(values, list):
        return {}
    if kind.startswith("KSampler"):
        return {"seed": next((value for value in values if type(value) is int), None)}
    if kind == "RandomNoise":
        return {"noise_seed": values[0]} if values else {}
    names = [entry["widget"].get("name") for entry in entries if isinstance(entry.get("widget"), dict)]
    if len(names) == len(values):
        return {str(name): value for name, value in zip(names, values, strict=True)}
    texts = [value for value in values if isinstance(value, str)]
    return {"text": texts[0]} if texts else {}


def _link(value: Any) -> tuple[str, int] | None:
    if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str | int) and type(value[1]) is int:
        return str(value[0]), value[1]
    return None


def _links(inputs: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in inputs.items():
        link = _link(value)
        if link is not None:
            yield name, link[0]


def _is_sampler(inputs: dict[str, Any]) -> bool:
    if _link(inputs.get("guider")) or _link(inputs.get("text_embeds")):
        return True
    runs = any(name in inputs for name in ("latent_image", "seed", "noise_seed", "steps", "samples"))
    return _link(inputs.get("positive")) is not None and (runs or "Sampler" in inputs[""])


def _samplers(nodes: Graph) -> list[str]:
    """Return the samplers that an output reaches first; without outputs, those that feed no other sampler."""
    for start in ("save", "preview"):  # a preview is no file that people keep
        ends = [name for name, inputs in nodes.items() if inputs[""].lower().startswith(start)]
        found = [name for name in _before(nodes, ends, through_samplers=False) if _is_sampler(nodes[name])]
        if found:
            break
    else:
        found = [name for name, inputs in nodes.items() if _is_sampler(inputs)]
    # A graph may save its image before and after a second pass: the last pass counts.
    earlier = {
        each
        for name in found
        for each in _before(nodes, [source for _, source in _links(nodes[name])], through_samplers=True)
    }
    return [name for name in found if name not in earlier] or found


def _before(nodes: Graph, starts: list[str], *, through_samplers: bool) -> list[str]:
    """Return the nodes that some nodes take their values from, directly or not, and these nodes."""
    waiting, seen = deque(starts), dict.fromkeys(starts)
    while waiting:
        inputs = nodes.get(waiting.popleft(), {"": ""})
        if _is_sampler(inputs) and not through_samplers:
            continue
        for _, source in _links(inputs):
            if source not in seen:
                seen[source] = None
                waiting.append(source)
    return [name for name in seen if name in nodes]


class _Reader:
    """Follow the links of a graph; each is followed once, so that a circle ends."""

    def __init__(self, nodes: Graph) -> None:
        self.nodes = nodes

    def conditioning(self, sampler: str, side: str) -> str:
        """Return the texts of a sampler's conditioning, joined by commas."""
        inputs = self.nodes[sampler]
        between = _link(inputs.get("guider")) or _link(inputs.get("text_embeds"))
        if between is not None:
            inputs = self.nodes.get(between[0], {"": ""})
            side = "conditioning" if side == "positive" and "conditioning" in inputs else side
            if isinstance(inputs.get(f"{side}_prompt"), str):
                return str(inputs[f"{side}_prompt"]).strip()
        found = self._texts(inputs.get(side), "negative" if side == "negative" else "positive", set())
        return ", ".join(dict.fromkeys(text for text in map(str.strip, found) if text))

    def _texts(self, value: Any, side: str, seen: set[tuple[str, int]]) -> list[str]:
        link = _link(value)
        if link is None or link in seen or len(seen) > _MOST_NODES:
            return []
        seen.add(link)
        inputs, slot = self.nodes.get(link[0], {"": ""}), link[1]
        if "ZeroOut" in inputs[""]:
            return []
        if isinstance(inputs.get(side), str):  # a loader that encodes both texts
            return [inputs[side]]
        if "positive" in inputs and "negative" in inputs:
            side = ("positive", "negative")[slot] if slot < 2 else side
            return self._texts(inputs[side], side, seen)
        if any(name in inputs for name in _TEXTS):
            return [self._text(inputs, seen)]
        onward = [name for name, _ in _links(inputs) if "cond" in name.lower() or name in ("", "positive", "value")]
        return [text for name in onward for text in self._texts(inputs[name], side, seen)] or (
            [self._text(inputs, seen)] if not onward else []
        )

    def _text(self, inputs: dict[str, Any], seen: set[tuple[str, int]]) -> str:
        """Return the text that a node holds, or that the nodes before it make."""
        if "on_true" in inputs and "on_false" in inputs:
            chosen = self._value(inputs.get("switch"))
            return self._string(inputs["on_true" if chosen else "on_false"], seen)
        if inputs[""].startswith(_LANGUAGE_MODELS):
            return ""
        parts = [name for name in ("string_a", "string_b") if name in inputs]
        if parts:
            delimiter = inputs.get("delimiter")
            texts = (self._string(inputs[name], seen) for name in parts)
            return (delimiter if isinstance(delimiter, str) else "").join(texts)
        return next(filter(None, (self._string(inputs[name], seen) for name in _STRINGS if name in inputs)), "")

    def _value(self, value: Any) -> Any:
        """Return a plain value, or the one of the node before."""
        link = _link(value)
        return value if link is None else self.nodes.get(link[0], {}).get("value")

    def _string(self, value: Any, seen: set[tuple[str, int]]) -> str:
        if isinstance(value, str):
            return value.strip()
        link = _link(value)
        if link is None or link in seen or len(seen) > _MOST_NODES:
            return ""
        return self._text(self.nodes.get(link[0], {"": ""}), seen | {link})

    def seed(self, inputs: dict[str, Any]) -> int | None:
        """Return the seed of a sampler, which may come from a node before it."""
        noise = _link(inputs.get("noise"))
        for found in (inputs, self.nodes.get(noise[0], {}) if noise else {}):
            for name in _SEEDS:
                value = found.get(name)
                link = _link(value)
                if link is not None:
                    before = self.nodes.get(link[0], {})
                    value = next((before[each] for each in _SEEDS if type(before.get(each)) is int), None)
                if type(value) is int:
                    return value
        return None

    def settings(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the plain settings of a sampler, and the file of its network."""
        found = {name: inputs[name] for name in _SETTINGS if isinstance(inputs.get(name), str | int | float)}
        link, seen = _link(inputs.get("model")), set()
        guider = _link(inputs.get("guider"))
        if guider is not None:
            link = _link(self.nodes.get(guider[0], {}).get("model"))
        while link is not None and link not in seen:
            seen.add(link)
            before = self.nodes.get(link[0], {})
            name = next((before[each] for each in _MODELS if isinstance(before.get(each), str)), None)
            if name is not None:
                return found | {"model": name}
            link = _link(before.get("model"))
        return found
