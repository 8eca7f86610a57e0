"""`python -m tests.hub [FOLDER]`: serve until interrupted, at most ten minutes; prints what a client's shell needs."""

import shlex
import sys
import tempfile

from .server import LIFE, LoopbackHub

if __name__ == "__main__":
    with LoopbackHub() as hub:
        home = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
        for name, value in hub.environment(home).items():
            sys.stdout.write(f"export {name}={shlex.quote(value)}\n")
        sys.stdout.flush()
        hub.wait(LIFE)
