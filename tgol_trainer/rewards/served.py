"""Score images by a server: a model that answers in words, or a scorer of one's own, behind an HTTP address."""

from __future__ import annotations

import base64
import email.message
import email.utils
import hashlib
import io
import json
import logging
import math
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from abc import abstractmethod
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from tgol_trainer._files import write_json

from .base import RewardFacts, check_prompts
from .pixels import rgb

logger = logging.getLogger(__name__)

_RETRIED = (408, 425, 429, 500, 502, 503, 504)
_LONGEST_WAIT = 60.0
_SHOWN = 3
_SHOWN_CHARACTERS = 300


class ServedReward:
    """
    Base of the rewards that ask a server once for each image.

    Requests run in parallel, are repeated where the server is busy or away, and their answers are kept: a pair of
    image and prompt is asked once, also by a later run.

    Args:
        url (`str`): Address, `http://` or `https://`.
        facts ([`RewardFacts`]): What the scores are.
        key (`Any`): What else decides an answer, as JSON holds it; part of what answers are kept under.
        num_parallel (`int`, *optional*, defaults to 8): Requests at a time.
        retries (`int`, *optional*, defaults to 5):
            How often a request is repeated, after 1, 2, 4, ... seconds or as long as the server says.
        timeout (`float`, *optional*, defaults to 120): Seconds to wait for an answer.
        api_key_env (`str`, *optional*): Name of the environment variable that holds the key, sent as a bearer token.
        cache (`str` or `Path`, *optional*): Folder of the answers; by default in the cache of `huggingface_hub`.

    Raises:
        ValueError: for another kind of address, a number below its minimum, or a key that is not in the environment.
    """

    def __init__(
        self,
        url: str,
        facts: RewardFacts,
        key: Any,
        *,
        num_parallel: int = 8,
        retries: int = 5,
        timeout: float = 120.0,
        api_key_env: str | None = None,
        cache: str | Path | None = None,
    ) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"`url` is {url!r}; it must be an address such as 'http://localhost:8000/v1'.")
        if num_parallel < 1 or retries < 0 or timeout <= 0:
            raise ValueError("`num_parallel` must be at least 1, `retries` at least 0, and `timeout` above 0.")
        if api_key_env is not None and not os.environ.get(api_key_env):
            raise ValueError(f"`api_key_env`: the environment has no variable {api_key_env!r}. Set it to the key.")
        self.url, self.facts = url, facts
        self._num_parallel, self._retries, self._timeout, self._api_key_env = (
            num_parallel,
            retries,
            timeout,
            api_key_env,
        )
        local = parts.hostname in ("localhost", "::1") or parts.hostname.startswith("127.")
        proxies = [urllib.request.ProxyHandler({})] if local else []  # a proxy does not reach this machine
        self._opener = urllib.request.build_opener(_NoRedirects, *proxies)
        self._key = json.dumps(key, sort_keys=True)
        self._cache = _cache_folder() if cache is None else Path(cache)

    def starting(self, num_images: int) -> None:
        """Say what scoring so many images costs."""
        shown = urllib.parse.urlsplit(self.url)
        logger.info(
            "%s: %d images, so at most %d requests to %s://%s%s, %d at a time. Answers in %s are not asked again.",
            *(self.facts.name, num_images, num_images, shown.scheme, shown.hostname),
            *("" if shown.port is None else f":{shown.port}", self._num_parallel, self._cache),
        )

    def __call__(self, images: list[Any], prompts: list[str], /) -> list[float | None]:
        """Return one score per image, as [`RewardFunction`] says."""
        check_prompts(images, prompts)
        if not images:
            return []
        with ThreadPoolExecutor(self._num_parallel) as pool:
            waiting = [pool.submit(self._answer, *pair) for pair in zip(rgb(images), prompts, strict=True)]
            try:
                answers = [each.result() for each in waiting]
            finally:
                pool.shutdown(cancel_futures=True)
        scores = [self._score(answer) for answer in answers]
        lacking = [index for index, score in enumerate(scores) if score is None]
        for index in lacking[:_SHOWN]:
            logger.warning(
                "%s: no score in the answer to the prompt %r: %s",
                *(self.facts.name, prompts[index][:60], json.dumps(answers[index])[:_SHOWN_CHARACTERS]),
            )
        return scores

    @abstractmethod
    def _request(self, image: str, prompt: str) -> tuple[str, dict[str, Any]]:
        """Return the address and the body of a request for a PNG file in base64."""

    @abstractmethod
    def _read(self, answer: Any) -> Any:
        """Return what is kept of an answer; raise `ValueError` or `LookupError` for one of another form."""

    @abstractmethod
    def _score(self, kept: Any) -> float | None:
        """Return the score in what was kept of an answer."""

    def _answer(self, image: Image.Image, prompt: str) -> Any:
        digest = hashlib.blake2b(f"{self._key}\0{image.size}\0{prompt}\0".encode(), digest_size=20)
        digest.update(image.tobytes())
        name = digest.hexdigest()
        file = self._cache / name[:2] / f"{name}.json"
        try:
            return json.loads(file.read_text(encoding="utf-8"))["answer"]
        except (OSError, ValueError, LookupError):  # none, or half of one
            pass
        stored = io.BytesIO()
        image.save(stored, format="PNG", compress_level=1)
        url, body = self._request(base64.b64encode(stored.getvalue()).decode("ascii"), prompt)
        answer = self._ask(url, body)
        try:
            kept = self._read(answer)
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"{self.facts.name}: {url} answered in a form that is not known ({type(error).__name__}: {error}): "
                f"{json.dumps(answer)[:_SHOWN_CHARACTERS]}"
            ) from error
        write_json(file, {"answer": kept})
        return kept

    def _ask(self, url: str, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._api_key_env is not None:
            headers["Authorization"] = f"Bearer {os.environ[self._api_key_env]}"
        data = json.dumps(body).encode()
        for attempt in range(self._retries + 1):
            try:
                request = urllib.request.Request(url, data, headers)  # noqa: S310  # the address is http or https
                with self._opener.open(request, timeout=self._timeout) as response:
                    return json.load(response)
            except urllib.error.HTTPError as error:
                said = error.read(10_000).decode("utf-8", errors="replace").strip()[:_SHOWN_CHARACTERS]
                cause, wait = f"HTTP {error.code}: {said or error.reason}", _retry_after(error.headers)
                if error.code not in _RETRIED:
                    break
            except ValueError as error:
                cause, wait = f"the answer is not JSON: {error}", None
            except OSError as error:  # no connection, or none in time
                cause, wait = str(getattr(error, "reason", None) or error or type(error).__name__), None
            if attempt < self._retries:
                time.sleep(min(_LONGEST_WAIT, 2.0**attempt if wait is None else wait))
        raise ValueError(
            f"{self.facts.name}: {url} gave no answer. {cause}\nScores of finished shards and all answers so far are "
            "kept: start the command again once that is mended."
        )


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirected POST would arrive as a GET without its content, and its key at another server."""

    def redirect_request(self, *_: Any) -> None:
        """Follow none: the status becomes an error."""


def _retry_after(headers: email.message.Message) -> float | None:
    """Return the seconds that a server asks to wait, given as a number or as a date."""
    value = headers.get("Retry-After")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _cache_folder() -> Path:
    from huggingface_hub import cached_assets_path

    return cached_assets_path("tgol_trainer", namespace="served", subfolder="answers")


class Judge(ServedReward):
    """
    Score images by a model that answers in words, at an address that speaks OpenAI's chat completions with images, as
    vLLM, SGLang and TGI do.

    Args:
        url (`str`): Address up to `/v1`, such as `"http://localhost:8000/v1"`.
        model (`str`): Name of the model at the server.
        template (`str`):
            The question, or the path of a text file that holds it. `{prompt}` in it becomes the prompt. The image
            goes before it.
        pattern (`str`, *optional*, defaults to `"score: <number>"`):
            Regular expression with one group around the number. The last match in the answer counts; an answer without
            one has no score.
        parameters (`dict`, *optional*): More fields of the request; `{"temperature": 0}` by default.
        options: Of [`ServedReward`].

    Raises:
        ValueError: for a pattern that is none or has another number of groups, and as [`ServedReward`].
    """

    name: ClassVar[str] = "judge"
    scale: ClassVar[str] = "the number in the answer of a judge"

    def __init__(
        self,
        url: str,
        model: str,
        template: str,
        pattern: str = r"(?i)score\W*(-?\d+(?:\.\d+)?)",
        parameters: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        file = Path(template)
        if len(template) < 500 and "\n" not in template and file.suffix and file.is_file():
            template = file.read_text(encoding="utf-8-sig")
        elif file.suffix and len(template.split()) == 1 and "{prompt}" not in template:
            raise ValueError(f"`template` is {template!r}, and there is no such file. Give the question or its file.")
        if not template.strip():
            raise ValueError("`template` is empty: write the question into it.")
        if "{prompt}" not in template:
            logger.warning("judge: `template` holds no {prompt}, so the judge does not see the prompts.")
        try:
            self._pattern = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"`pattern` is {pattern!r}, which is no regular expression: {error}.") from error
        if self._pattern.groups != 1:
            raise ValueError(f"`pattern` is {pattern!r}; it must have one group, (...), around the number.")
        self._model, self._template = model, template
        self._parameters = {"temperature": 0} if parameters is None else parameters
        facts = RewardFacts(self.name, model, None, f"{self.scale} by {pattern!r} to the question {template!r:.200}")
        super().__init__(url, facts, ["judge", model, template, self._parameters], **options)

    def _request(self, image: str, prompt: str) -> tuple[str, dict[str, Any]]:
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
            {"type": "text", "text": self._template.replace("{prompt}", prompt)},
        ]
        url = self.url.rstrip("/")
        url = url if url.endswith("/chat/completions") else f"{url}/chat/completions"
        return url, {"model": self._model, "messages": [{"role": "user", "content": content}], **self._parameters}

    def _read(self, answer: Any) -> str:
        text = answer["choices"][0]["message"]["content"]
        if isinstance(text, list):  # parts, as some servers return them
            text = "".join(part.get("text", "") for part in text)
        return text or ""

    def _score(self, kept: Any) -> float | None:
        found = self._pattern.findall(str(kept))
        try:
            number = float(found[-1])
        except (IndexError, ValueError):
            return None
        return number if math.isfinite(number) else None


class ServedScorer(ServedReward):
    """
    Score images by a scorer of one's own behind an HTTP address.

    It gets a POST of `{"image": <PNG file in base64>, "prompt": <text>}` and answers with a JSON number, or with
    `{"score": <number or null>}`.

    Args:
        url (`str`): Address that requests are posted to.
        version (`str`, *optional*): Name of the scorer's version: answers of another version are not used again.
        options: Of [`ServedReward`].

    Raises:
        ValueError: as [`ServedReward`].
    """

    name: ClassVar[str] = "http"
    scale: ClassVar[str] = "the number that a server answers"

    def __init__(self, url: str, version: str | None = None, **options: Any) -> None:
        super().__init__(url, RewardFacts(self.name, url, version, self.scale), ["http", url, version], **options)

    def _request(self, image: str, prompt: str) -> tuple[str, dict[str, Any]]:
        return self.url, {"image": image, "prompt": prompt}

    def _read(self, answer: Any) -> float | None:
        score = answer["score"] if isinstance(answer, dict) else answer
        if score is not None and (isinstance(score, bool) or not isinstance(score, int | float)):
            raise TypeError("a number is expected, or {'score': number}")
        return score

    def _score(self, kept: Any) -> float | None:
        return None if kept is None or not math.isfinite(kept) else float(kept)
