"""The loopback Hub answers the unmodified clients: both ways of transfer, datasets, pipelines, faults, two origins."""

import http.client
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from tests import ROOT
from tests.hub import LoopbackHub
from tests.hub.xet import ungroup, unlz4

CLIENT = """
import json, os, sys
from pathlib import Path
import numpy as np
from huggingface_hub import HfApi, ModelCard, get_token, snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

folder = Path(sys.argv[1])
name = f"{sys.argv[2]}-{'lfs' if os.environ.get('HF_HUB_DISABLE_XET') else 'xet'}"
api = HfApi()
rng = np.random.default_rng(0)
# Bytes that xet stores as they are, compresses, and compresses after grouping; one larger than a chunk.
contents = {
    "README.md": b"---\\ntags: [one]\\n---\\nText.\\n",
    "noise.bin": rng.bytes(300_000),
    "zeros.bin": bytes(200_000) + b"end",
    "weights.safetensors": rng.normal(0, 0.02, 60_000).astype("<f4").tobytes(),
    "part/config.json": b"{}",
}
for path, content in contents.items():
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_bytes(content)
api.create_repo(name)
api.create_repo(name, exist_ok=True)
api.upload_folder(repo_id=f"tester/{name}", folder_path=folder, commit_message="first")
copy = Path(snapshot_download(f"tester/{name}"))
found = {path: (copy / path).read_bytes() == content for path, content in contents.items()}
again = api.upload_folder(repo_id=f"tester/{name}", folder_path=folder, commit_message="again")
api.upload_file(path_or_fileobj=b"new" * 50_000, path_in_repo="new.bin", repo_id=f"tester/{name}")
api.create_branch(f"tester/{name}", branch="other", exist_ok=True)
api.delete_file("new.bin", f"tester/{name}", revision="other")
api.create_repo(f"{name}-closed", private=True)
api.update_repo_settings(f"tester/{name}", gated="manual")
outside = HfApi(token=False)
refused = []
for repository in (name, f"{name}-closed"):
    try:
        outside.list_repo_files(f"tester/{repository}")
        outside.hf_hub_download(f"tester/{repository}", "README.md", cache_dir=folder / "cache")
    except Exception as error:
        refused.append(type(error).__name__)
print(json.dumps({
    "equal": found,
    "commits": [commit.title for commit in api.list_repo_commits(f"tester/{name}")],
    "main": sorted(api.list_repo_files(f"tester/{name}")),
    "other": sorted(api.list_repo_files(f"tester/{name}", revision="other")),
    "private": api.repo_info(f"tester/{name}-closed").private,
    "gated": api.repo_info(f"tester/{name}").gated,
    "refused": refused,
    "user": api.whoami()["name"],
}))
"""


def run_client(hub, program, home, *arguments, **environment):
    """The last line of JSON that a fresh process prints, whose cache is empty and whose Hub is `hub`."""
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, **hub.environment(home), "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("way", ["xet", "lfs", "multipart"])
def test_the_client_uploads_and_downloads_the_same_bytes_either_way(tmp_path, way):
    with LoopbackHub(chunk=100_000 if way == "multipart" else None) as hub:
        options = {} if way == "xet" else {"HF_HUB_DISABLE_XET": "1"}
        said = run_client(hub, CLIENT, tmp_path / "home", tmp_path / "files", way, **options)
        used = {request.route for request in hub.requests}
    assert all(said["equal"].values()) and len(said["equal"]) == 5
    assert ({"xorb", "shard", "reconstruction"} <= used) == (way == "xet")
    assert {"lfs-put"} <= used if way == "lfs" else {"lfs-part"} <= used if way == "multipart" else True
    # What had not changed made no commit.
    assert said["commits"] == ["Upload new.bin with huggingface_hub", "first", "initial commit"]
    assert set(said["main"]) - set(said["other"]) == {"new.bin"}
    assert (said["private"], said["gated"], said["user"]) == (True, "manual", "tester")
    assert said["refused"] == ["GatedRepoError", "RepositoryNotFoundError"]


def test_an_unknown_route_and_a_token_at_the_storage_are_loud(tmp_path):
    hub = LoopbackHub()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with pytest.raises(urllib.error.HTTPError, match="501"):
        opener.open(f"{hub.endpoint}/api/collections/a/b", timeout=10)
    with pytest.raises(RuntimeError, match=r"no routes for .'GET /api/collections/a/b'"):
        hub.check()
    hub.requests.clear()
    with pytest.raises(urllib.error.HTTPError):
        request = urllib.request.Request(f"{hub.storage}/x", headers={"Authorization": f"Bearer {hub.token}"})
        opener.open(request, timeout=10)
    assert hub.leaks() == ["GET /x"]
    hub.stop()
    with pytest.raises(urllib.error.URLError):
        opener.open(f"{hub.endpoint}/api/whoami-v2", timeout=10)


def test_every_fault_does_what_its_name_says():
    """Over a bare socket, so that no client repairs what it should show."""
    with LoopbackHub() as hub:
        port = int(hub.endpoint.rpartition(":")[2])

        def ask():
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request("GET", "/api/whoami-v2", headers={"Authorization": f"Bearer {hub.token}"})
            answer = connection.getresponse()
            return answer.status, dict(answer.headers), answer.read()

        whole = ask()[2]
        hub.fail("whoami", status=429, headers={"Retry-After": "7"}, code="Slow", skip=1)
        assert ask()[0] == 200
        status, headers, _ = ask()
        assert (status, headers["Retry-After"], headers["X-Error-Code"]) == (429, "7", "Slow")
        assert ask()[0] == 200
        hub.fail("whoami", "html", 502)
        status, headers, body = ask()
        assert status == 502 and "text/html" in headers["Content-Type"] and b"<html>" in body
        hub.fail("whoami", "flip")
        assert sum(a != b for a, b in zip(ask()[2], whole, strict=True)) == 1
        for kind, error in (("reset", ConnectionResetError), ("lost", ConnectionResetError)):
            hub.fail("whoami", kind)
            with pytest.raises(error):
                ask()
        for kind, error in (("cut", ConnectionResetError), ("short", http.client.IncompleteRead)):
            hub.fail("whoami", kind)
            with pytest.raises((error, http.client.IncompleteRead)):
                ask()
        hub.fail("whoami", "stall", seconds=0.3)
        start = time.monotonic()
        assert ask()[0] == 200 and time.monotonic() - start >= 0.3


def test_the_decoders_of_xet_undo_what_the_formats_say():
    # An LZ4 frame by hand: 4 literals "abcd", then a match of 8 that overlaps itself, then the last literal "x".
    block = bytes([0x44]) + b"abcd" + (4).to_bytes(2, "little") + bytes([0x10]) + b"x"
    frame = (0x184D2204).to_bytes(4, "little") + bytes([0x40, 0x40, 0]) + len(block).to_bytes(4, "little") + block
    assert unlz4(frame + bytes(4)) == b"abcdabcdabcdx"
    # Groups of the positions 0 and 4, 1 and 5, 2 and 6, and 3.
    assert ungroup(b"aa" + b"db" + b"bc" + b"c") == b"adbcabc"
