"""The page of `tgol rate` served in a thread, and a browser."""

import socket
import threading

import pytest
import uvicorn

from tests.browser import Browser
from tgol_trainer.rating.server import make_app
from tgol_trainer.sources.ratings import Journal


@pytest.fixture
def serving():
    """Serve a session; returns the address."""
    running = []

    def start(session):
        app = make_app(session, Journal(session.folder), ("127.0.0.1", "localhost"))
        listener = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        running.append((server, thread))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(timeout=20)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()
