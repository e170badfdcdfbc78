"""Each platform's row: recognised by its own variables, and what it says is read as it means it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from botlease import settings
from botlease.model import Mode
from botlease.platforms import EVERY, PLAIN, deployment_key, detect, environment_name, grace, instance_name, named, slug
from botlease.settings import ConfigurationError

CONTAINER = "3f1c0de2a9b4"
POD = "bot-6d4cf56db6-x8k2p"


@dataclass(frozen=True)
class Row:
    """What a process of this platform finds in its environment, and what is to come of it."""

    env: dict[str, str]
    key: str | None
    instance: str | None = None
    environment: str | None = None
    signal: str = "SIGTERM"
    grace: float = 30
    health: str = "none"
    window: float = 0
    restarts: bool = True
    pid: int = 0


ROWS = {
    "Railway": Row(
        {
            "RAILWAY_ENVIRONMENT_ID": "e",
            "RAILWAY_ENVIRONMENT_NAME": "production",
            "RAILWAY_DEPLOYMENT_ID": "7c1f",
            "RAILWAY_REPLICA_ID": "r1",
            "HOSTNAME": CONTAINER,
        },
        "railway:7c1f",
        "r1",
        "production",
        grace=0,
        health="optional",
        window=120,
        restarts=False,
    ),
    "Heroku": Row(
        {"DYNO": "worker.1", "HEROKU_RELEASE_VERSION": "v42", "HEROKU_DYNO_ID": "d-9", "HEROKU_APP_NAME": "prod"},
        "heroku:v42",
        "d-9",
        "prod",
    ),
    "Render": Row(
        {"RENDER": "true", "RENDER_GIT_COMMIT": "abc", "RENDER_INSTANCE_ID": "srv-1", "RENDER_SERVICE_NAME": "bot"},
        "render:abc",
        "srv-1",
        "bot",
        health="optional",
    ),
    "Fly.io": Row(
        {"FLY_APP_NAME": "bot", "FLY_MACHINE_ID": "m1", "FLY_MACHINE_VERSION": "01J08P60K8NK33K9P5MQ5M4QN8"},
        "fly:01J08P60K8NK33K9P5MQ5M4QN8",
        "m1",
        "bot",
        signal="SIGINT",
        grace=5,
        health="optional",
        restarts=False,
    ),
    "Kubernetes": Row(
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "HOSTNAME": POD, "POD_NAMESPACE": "prod"},
        "kubernetes:6d4cf56db6",
        POD,
        "prod",
        health="optional",
    ),
    "Cloud Run": Row(
        {"K_SERVICE": "bot", "K_REVISION": "bot-00007-abc"},
        "cloud-run:bot-00007-abc",
        None,
        "bot",
        grace=10,
        health="optional",
    ),
    "Koyeb": Row(
        {
            "KOYEB_SERVICE_ID": "s",
            "KOYEB_REGIONAL_DEPLOYMENT_ID": "d1",
            "KOYEB_INSTANCE_ID": "i1",
            "KOYEB_APP_NAME": "a",
        },
        "koyeb:d1",
        "i1",
        "a",
        grace=0,  # not documented: the worst
        health="optional",
    ),
    "DigitalOcean": Row(
        {"BOTLEASE_PLATFORM": "digitalocean", "HOSTNAME": "bot-5f7d8c-abcde"},
        "digitalocean:bot-5f7d8c-abcde",
        "bot-5f7d8c-abcde",
        grace=120,
    ),
    "Dokku": Row(
        {"DYNO": "worker.1", "GIT_REV": "abc", "HOSTNAME": CONTAINER},
        f"dokku:{CONTAINER}",
        "worker.1",
        restarts=False,
    ),
    "Coolify": Row(
        {"COOLIFY_CONTAINER_NAME": "app-123456", "COOLIFY_BRANCH": "main", "HOSTNAME": CONTAINER},
        "coolify:app-123456",
        "app-123456",
        "main",
        health="optional",
    ),
    "CapRover": Row(
        {"CAPROVER_GIT_COMMIT_SHA": "abc", "HOSTNAME": CONTAINER}, f"caprover:{CONTAINER}", CONTAINER, grace=10
    ),
    "Docker": Row({"HOSTNAME": CONTAINER}, f"docker:{CONTAINER}", CONTAINER, grace=10),
    "systemd": Row({"SYSTEMD_EXEC_PID": "77", "INVOCATION_ID": "ff00"}, None, "ff00", grace=90, pid=77),
    "pm2": Row({"pm_id": "3", "unique_id": "u", "pm_uptime": "1"}, None, "u", signal="SIGINT", grace=1.6),
    "Northflank": Row(
        {"NF_OBJECT_ID": "o", "NF_DEPLOYMENT_SHA": "abc", "NF_PROJECT_ID": "p"},
        "northflank:abc",
        None,
        "p",
        health="optional",
    ),
    "plain": Row({}, None, None, "local", grace=10, restarts=False),
}


def test_every_platform_has_its_test() -> None:
    assert sorted(ROWS) == sorted(p.name for p in EVERY)


@pytest.mark.parametrize("name", ROWS)
def test_the_row(name: str) -> None:
    row = ROWS[name]
    p = detect(row.env, row.pid)
    assert p.name == name
    assert deployment_key(p, row.env) == row.key
    assert instance_name(p, row.env) == row.instance
    assert environment_name(p, row.env) == row.environment
    assert (p.stop_signal, grace(p, row.env), p.health, p.health_window) == (
        row.signal,
        row.grace,
        row.health,
        row.window,
    )
    assert p.restarts is row.restarts and p.grace_cure
    assert named(p.name) is p and named(slug(p)) is p


@pytest.mark.parametrize(
    ("env", "name"),
    [
        ({"RAILWAY_TOKEN": "t"}, "plain"),  # the command line's, on a laptop
        ({"INVOCATION_ID": "x", "SYSTEMD_EXEC_PID": "1"}, "plain"),  # inherited by a desktop's terminal
        ({"HOSTNAME": "thinkpad"}, "plain"),
        ({"HOSTNAME": "deadbeef"}, "plain"),
        ({"DYNO": "worker.1"}, "Heroku"),
        ({"GIT_REV": "abc"}, "plain"),
        ({"BOTLEASE_PLATFORM": "compose"}, "Docker"),
        ({"BOTLEASE_PLATFORM": "k8s", "RENDER": "true"}, "Kubernetes"),
    ],
)
def test_what_only_looks_like_a_platform(env: dict[str, str], name: str) -> None:
    assert detect(env, 77).name == name


def test_a_container_with_somebody_at_the_terminal_is_a_workplace() -> None:
    assert detect({"HOSTNAME": CONTAINER}, terminal=True) is PLAIN
    assert detect({"HOSTNAME": CONTAINER, "RAILWAY_DEPLOYMENT_ID": "d"}, terminal=True).name == "Railway"


@pytest.mark.parametrize(
    ("hostname", "key"),
    [
        (POD, "kubernetes:6d4cf56db6"),
        ("my-bot-7b9f8c6d5f-zxcvb", "kubernetes:7b9f8c6d5f"),
        ("bot-0", None),  # of a StatefulSet
        ("bot", None),
    ],
)
def test_a_pod_of_a_deployment_is_keyed_by_its_template(hostname: str, key: str | None) -> None:
    env = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "HOSTNAME": hostname}
    assert deployment_key(detect(env), env) == key
    assert deployment_key(detect(env), env | {"POD_TEMPLATE_HASH": "abc"}) == "kubernetes:abc"


AT_A_RESTART = {"INVOCATION_ID": "other", "pm_uptime": "2", "unique_id": "v", "SYSTEMD_EXEC_PID": "77"}


@pytest.mark.parametrize("name", ROWS)
def test_a_restart_is_no_new_deployment(name: str) -> None:
    """What a platform hands out anew when it restarts a process that crashed must not be part of the key."""
    row = ROWS[name]
    again = {k: AT_A_RESTART.get(k, v) for k, v in row.env.items()}
    p = detect(again, row.pid)
    assert p.name == name and deployment_key(p, again) == row.key


@pytest.mark.parametrize("env", [{"SYSTEMD_EXEC_PID": "77", "INVOCATION_ID": "x"}, {"pm_id": "0", "pm_uptime": "1"}])
def test_where_no_key_is_named_a_new_start_waits_unless_it_is_told_its_deployment(env: dict[str, str]) -> None:
    env = {"HOME": "/nowhere"} | env
    assert settings.make(env, pid=77).mode is Mode.WAIT
    told = settings.make(env | {"BOTLEASE_DEPLOYMENT": "v2"}, pid=77)
    assert (told.mode, told.deployment) == (Mode.PREEMPT, "v2")


def test_what_the_platform_was_set_to_counts() -> None:
    env = {"RAILWAY_DEPLOYMENT_ID": "d", "RAILWAY_DEPLOYMENT_DRAINING_SECONDS": "45"}
    assert grace(detect(env), env) == 45
    assert grace(detect(env), env | {"RAILWAY_DEPLOYMENT_DRAINING_SECONDS": "many"}) == 0
    assert grace(detect({"pm_id": "0"}), {"pm_id": "0", "BOTLEASE_PLATFORM_GRACE": "60"}) == 60


@pytest.mark.parametrize(
    ("env", "mode", "leaves"),
    [
        ({"RAILWAY_DEPLOYMENT_ID": "d"}, Mode.PREEMPT, True),
        ({"DYNO": "worker.1"}, Mode.WAIT, False),
        ({"KUBERNETES_SERVICE_HOST": "h", "HOSTNAME": POD}, Mode.PREEMPT, False),
        ({}, Mode.REFUSE, True),
    ],
)
def test_what_an_instance_may_do_there(env: dict[str, str], mode: Mode, leaves: bool) -> None:
    made = settings.make({"HOME": "/nowhere"} | env)
    assert (made.mode, made.leaves) == (mode, leaves)
    assert settings.make({"HOME": "/nowhere"} | env, when_superseded="stay").leaves is False


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"RAILWAY_DEPLOYMENT_ID": "d", "RAILWAY_ENVIRONMENT_NAME": "pr-7"}, ""),
        (
            {"RAILWAY_DEPLOYMENT_ID": "d", "RAILWAY_ENVIRONMENT_NAME": "pr-7", "BOTLEASE_ENVIRONMENT": "production"},
            "'pr-7'",
        ),
        ({"RAILWAY_DEPLOYMENT_ID": "d", "RAILWAY_ENVIRONMENT_NAME": "pr-7", "BOTLEASE_ENVIRONMENT": "a, pr-7"}, ""),
        ({"RAILWAY_DEPLOYMENT_ID": "d", "BOTLEASE_ENVIRONMENT": "production"}, "does not say which environment"),
        ({"RENDER": "true", "IS_PULL_REQUEST": "true"}, "a preview of a change"),
        ({"RENDER": "true", "IS_PULL_REQUEST": "true", "BOTLEASE_ENVIRONMENT": "preview"}, ""),
        ({"RENDER": "true", "IS_PULL_REQUEST": "false"}, ""),
        ({"DYNO": "web.1", "HEROKU_PR_NUMBER": "7", "HEROKU_APP_NAME": "x"}, "a preview of a change"),
        ({"BOTLEASE_ENVIRONMENT": "production"}, "'local'"),
        ({"BOTLEASE_ENVIRONMENT": "production,local"}, ""),
        ({"pm_id": "0", "BOTLEASE_ENVIRONMENT": "production"}, "set BOTLEASE_ENVIRONMENT_NAME"),
        ({"pm_id": "0", "BOTLEASE_ENVIRONMENT": "production", "BOTLEASE_ENVIRONMENT_NAME": "production"}, ""),
        ({"BOTLEASE_ENVIRONMENT": " , "}, ""),
    ],
)
def test_an_environment_that_is_not_on_the_list_is_barred(env: dict[str, str], says: str) -> None:
    reason = settings.make({"HOME": "/nowhere"} | env).barred
    assert says in reason and bool(says) is bool(reason)


def test_an_unknown_platform_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ConfigurationError, match="'webscale', which is not known: use one of Railway, "):
        settings.make({"HOME": "/nowhere", "BOTLEASE_PLATFORM": "webscale"})


def test_the_documented_table_has_every_platform_and_its_variables() -> None:
    text = (Path(__file__).parent.parent / "docs" / "platforms.md").read_text()
    for p in EVERY:
        row = next(line for line in text.splitlines() if line.startswith(f"| {p.name}"))
        assert row.rstrip(" |").endswith("stays" if p.restarts else "ends")
        assert p.stop_signal in row or p is PLAIN
        for name, pattern in p.deployment:
            assert name in row or pattern or name == "HOSTNAME", (p.name, name)
        assert all(name in text for name in p.environment)
