from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts background jobs so, and every program that a test stops with Ctrl-C would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored under nohup, which each supervisor would heed

_numbers = itertools.count()


@pytest.fixture(scope="session", autouse=True)
def runtime_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where instances leave their notes: not in the user's own folder."""
    folder = tmp_path_factory.mktemp("runtime")
    before = os.environ.get("XDG_RUNTIME_DIR")
    os.environ["XDG_RUNTIME_DIR"] = str(folder)
    yield folder
    if before is None:
        del os.environ["XDG_RUNTIME_DIR"]
    else:
        os.environ["XDG_RUNTIME_DIR"] = before


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[object]:
    from servers import Postgres

    server = Postgres()
    try:
        yield server.start()
    finally:
        server.stop()


@pytest.fixture
async def postgres_url(postgres_server: object) -> AsyncIterator[str]:
    """A new, empty database on the session's server."""
    import asyncpg
    from servers import Postgres

    assert isinstance(postgres_server, Postgres)
    name = f"test_{os.getpid()}_{next(_numbers)}"
    admin = await asyncpg.connect(postgres_server.url())
    await admin.execute(f"CREATE DATABASE {name}")
    await admin.close()
    yield postgres_server.url(name)
    admin = await asyncpg.connect(postgres_server.url())
    await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await admin.close()


@pytest.fixture
def worlds() -> Iterator[contextlib.ExitStack]:
    """Closed with the test: those of the simulation that are not run to their end, which closes them itself."""
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/lease.db"


@pytest.fixture(params=["sqlite", "postgres"])
def any_url(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(f"{request.param}_url"))


@pytest.fixture
def world(tmp_path: Path, any_url: str) -> Iterator[object]:
    """Real deployments on each store in turn."""
    import harness

    yield from harness.world(tmp_path, any_url)


@pytest.fixture
def sqlite_world(tmp_path: Path, sqlite_url: str) -> Iterator[object]:
    import harness

    yield from harness.world(tmp_path, sqlite_url)
