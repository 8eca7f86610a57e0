"""A loopback Hub: what the unmodified clients ask of huggingface.co, answered on 127.0.0.1 by the standard library.

It is a stand-in for the *client contract* of `huggingface_hub`, `hf_xet`, `datasets` and `diffusers`: which requests
they send, in which order, and which answers and failures they understand. It is never the real Hub: the rules for
metadata, quotas, rate limits, gating, regions and deduplication are not here, and that a push works against it does
not prove that one works against huggingface.co. Of spaces there are files and secrets, and nothing runs.
Not built: pull requests, buckets, paging of trees.

A client process may ask for faults itself: POST `/loopback/fail` with the arguments of `LoopbackHub.fail` as JSON, and
`/loopback/clear`. `python -m tests.hub` serves for trials by hand.

Two servers on two ports, of two names, stand for two origins, the Hub and its storage, so that a test can see that a
token never reaches the second. An unknown route is answered with 501 and remembered; `check()` raises for it. Bodies,
the store and the life of a server are bounded, and the threads end with the process.
"""

from .faults import Fault
from .server import LoopbackHub

__all__ = ["Fault", "LoopbackHub"]
