"""A chat endpoint that speaks OpenAI's protocol, by the standard library alone."""

import http.client
import json
import time
import urllib.error
import urllib.request
from typing import Dict, List, NamedTuple, Optional

_TRIES, _WAIT = 4, 2.0  # number of tries of a request, and seconds before the second; doubled before each further one
_PASSING = (408, 409, 429, 500, 502, 503, 504)  # HTTP statuses of a server that is busy


class Endpoint(NamedTuple):
    """An endpoint and the model that answers there.

    Attributes:
        url: Address up to the version, such as ``http://localhost:8000/v1``.
        model: Name of the model.
        key: Key that is sent with each request; None for none.
        timeout: Number of seconds to wait for an answer.
    """

    url: str
    model: str
    key: Optional[str] = None
    timeout: float = 120.0

    def answer(self, messages: List[Dict[str, str]]) -> str:
        """Return the model's answer to messages, at temperature 0; a busy server is asked again.

        Args:
            messages: Messages of ``role`` and ``content``.

        Raises:
            OSError: The endpoint cannot be reached, or refuses the request.
            ValueError: Its answer is not one of the protocol.
        """
        body = json.dumps({"model": self.model, "messages": messages, "temperature": 0}).encode()
        headers = {"Content-Type": "application/json"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", body, headers)
        content = self._content(request)
        try:
            return str(json.loads(content)["choices"][0]["message"]["content"])
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{self.url} does not answer in OpenAI's protocol: {content[:80]!r}") from error

    def _content(self, request: urllib.request.Request) -> bytes:
        wait = _WAIT
        for attempt in range(1, _TRIES + 1):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return response.read()
            except urllib.error.HTTPError as error:
                problem = f"status {error.code} ({error.read()[:200].decode('utf-8', 'replace').strip()})"
                passes = error.code in _PASSING
            except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
                problem, passes = str(getattr(error, "reason", error)), True
            if not passes or attempt == _TRIES:
                raise OSError(f"--endpoint {self.url} does not answer: {problem}")
            time.sleep(wait)
            wait *= 2
        raise AssertionError("every try returns or raises")
