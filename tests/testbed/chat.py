"""Asks a deployed model, as any client of the OpenAI-compatible API does. Used by the end-to-end tests and the demo."""

from __future__ import annotations

import json
import urllib.request


def chat(base_url: str, model: str, messages: list[dict[str, str]], max_tokens: int = 16) -> str:
    """Continue one conversation through the OpenAI-compatible API and return the answer."""
    body = {
        "model": model,
        "messages": messages,
        "max_tokens": max_tokens,
        "temperature": 0,
    }
    url = f"{base_url}/v1/chat/completions"
    request = urllib.request.Request(url, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as response:
        answer: str = json.load(response)["choices"][0]["message"]["content"]
    return answer
