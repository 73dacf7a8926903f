"""Cache keys for built files."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def request_key(request: Mapping[str, Any]) -> str:
    """Return a short cache key for a request made of plain values; different requests get different keys."""
    return hashlib.blake2b(json.dumps(request, sort_keys=True).encode(), digest_size=8).hexdigest()
