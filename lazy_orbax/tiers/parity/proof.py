"""Who knows the secret of a job? A message carries a code (HMAC, SHA-256) that only they can make.

The code of an answer is over the code of its question too, so that neither can be put elsewhere.
"""

from __future__ import annotations

import hmac
import json
import secrets
from typing import Any

CODE_BYTES = 32


class NotProvenError(ValueError):
    """A message was not made by one who knows the secret, or was changed on its way."""


def new_secret() -> str:
    """Returns a secret that nobody can guess."""
    return secrets.token_hex(32)


def sealed(secret: str, context: bytes, told: dict[str, Any]) -> bytes:
    """Returns a message with its code.

    Args:
        secret: what only the processes of the job know.
        context: what the message is about; whoever opens it must give the same.
        told: what it says.
    """
    content = json.dumps(told).encode()
    return _code(secret, context, content) + content


def opened(secret: str, context: bytes, message: bytes) -> dict[str, Any]:
    """Returns what a message says.

    Raises:
        NotProvenError: its code is wrong, or it makes no sense.
    """
    code, content = message[:CODE_BYTES], message[CODE_BYTES:]
    if not hmac.compare_digest(code, _code(secret, context, content)):
        raise NotProvenError("who sent this does not know the secret of the job")
    try:
        told = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise NotProvenError(f"a message is no JSON: {error}") from error
    if not isinstance(told, dict):
        raise NotProvenError(f"a message is {type(told).__name__}, wanted an object")
    return told


def code_of(message: bytes) -> bytes:
    """Returns the code of a message."""
    return message[:CODE_BYTES]


def _code(secret: str, context: bytes, content: bytes) -> bytes:
    return hmac.digest(secret.encode(), context + b"\0" + content, "sha256")
