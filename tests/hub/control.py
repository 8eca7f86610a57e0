"""How a client process asks the loopback Hub for faults."""

from __future__ import annotations

import json
import os
import urllib.request
from typing import Any


def control(action: str, **options: Any) -> None:
    """Ask the Hub for a fault, or for none."""
    request = urllib.request.Request(f"{os.environ['HF_ENDPOINT']}/loopback/{action}", json.dumps(options).encode())
    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10).read()
