"""Keys of a cache of built files."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def request_key(request: Mapping[str, Any]) -> str:
    """A short name for a request of plain values; another request has another."""
    return hashlib.blake2b(json.dumps(request, sort_keys=True).encode(), digest_size=8).hexdigest()
