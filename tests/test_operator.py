"""The operator's commands, typed as he types them, on deployments that really run."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import sqlite3
import subprocess
import time
import tomllib
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import yaml
from harness import BOTLEASE, World, clean_env, until
from servers import PgBouncer, Postgres, has_pgbouncer

from botlease.platforms import EVERY, slug

DURATION = 20.0


def botlease(world: World | None, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    url = {"BOTLEASE_DATABASE_URL": world.url} if world is not None else {}
    return subprocess.run([*BOTLEASE, *args], env=clean_env(**(url | env)), capture_output=True, text=True, timeout=60)


def says(world: World, *args: str) -> str:
    done = botlease(world, *args)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(world: World, *args: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in says(world, *args, "--json").splitlines()]


def instance(world: World, deployment: str) -> str:
    (bot,) = rows(world, "status")
    return str(next(i["instance_id"] for i in bot["instances"] if i["deployment"] == deployment))


# Seeing ------------------------------------------------------------------------------------------------------------


def test_history_tells_each_term_and_why_it_ended(world: World) -> None:
    first = world.run("--name", "b", "--deployment", "v1")
    world.works(1)
    second = world.run("--name", "b", "--deployment", "v2")
    world.works(2)
    first.says("passive")
    second.signal(signal.SIGTERM)
    second.wait()
    world.works(3)
    shown = rows(world, "history")

    assert [(r["term"], r["deployment"], r["ended"]) for r in shown] == [
        (3, "v1", None),
        (2, "v2", "stopped"),
        (1, "v1", "superseded"),
    ]
    assert [r["probation"] for r in shown] == [None, "on", None]
    assert all(0 <= r["lasted"] < 60 for r in shown) and len(rows(world, "history", "--limit", "1")) == 1
    text = says(world, "history", "--name", "b")
    assert "still on" in text and "superseded" in text and text.count("\n") == 4
    assert botlease(world, "history", "--name", "nobody").returncode == 78


def test_verify_believes_what_really_happened_and_finds_what_is_planted(world: World) -> None:
    old = world.run("--name", "b", "--deployment", "v1")
    world.works(1)
    new = world.run("--name", "b", "--deployment", "v2")
    world.works(2)
    new.signal(signal.SIGKILL)
    world.works(3)
    world.freeze(old.pid)
    world.run("--name", "b", "--deployment", "v1")
    world.works(4)
    old.signal(signal.SIGCONT)
    assert says(world, "verify") == "b: 4 terms, no two overlap\n"
    assert world.overlap() == 0
    world.sql("UPDATE bot_terms SET acquired_at = (SELECT acquired_at FROM bot_terms WHERE term = 1) WHERE term = 2")
    done = botlease(world, "verify")
    assert done.returncode == 1 and "b: term 2 OVERLAPS term 1 by " in done.stdout
    (verdict,) = [json.loads(line) for line in botlease(world, "verify", "--json").stdout.splitlines()]
    assert verdict["findings"][0]["term"] == 2


def test_wait_returns_when_somebody_works_or_stands_by(world: World) -> None:
    first = world.run("--name", "b", "--deployment", "v1")
    world.works(1)
    who = says(world, "wait", "--active", "--name", "b").strip()
    assert who.startswith("b-")
    nobody = botlease(world, "wait", "--standby", "--timeout", "0.2")
    assert nobody.returncode == 75 and "nobody stands by after 0.2 s" in nobody.stderr
    with subprocess.Popen(
        [*BOTLEASE, "wait", "--active", "--deployment", "v2"],
        env=clean_env(BOTLEASE_DATABASE_URL=world.url),
        stdout=subprocess.PIPE,
        text=True,
    ) as waiting:
        world.run("--name", "b", "--deployment", "v2")
        assert waiting.wait(20) == 0 and waiting.stdout is not None
        assert waiting.stdout.read().strip() == instance(world, "v2")
    assert says(world, "wait", "--standby").strip() == who  # passive: it could take back
    assert first.process.poll() is None
    assert botlease(world, "wait").returncode == botlease(world, "wait", "--active", "--standby").returncode == 2


def test_wait_waits_for_a_database_that_is_not_there_yet(world: World) -> None:
    with subprocess.Popen(
        [*BOTLEASE, "wait", "--active", "--name", "b"], env=clean_env(BOTLEASE_DATABASE_URL=world.url)
    ) as waiting:
        world.run("--name", "b")
        assert waiting.wait(20) == 0


def test_pruning_does_not_lift_a_quarantine(world: World) -> None:
    world.run("--deployment", "v1")
    world.works(1)
    for n in (1, 2):
        world.run("--deployment", "v2", bot=world.bot(exit=1, **{"for": 0.05})).wait()
        until(lambda n=n: world.terms()[-1] == 1 + 2 * n)
    assert "deleted 2 instances and 2 terms" in says(world, "prune", "--older-than", "0m")
    world.run("--deployment", "v2").says("quarantined: ")


def test_status_shows_a_handover_on_its_way_and_a_deployment_in_quarantine(sqlite_world: World) -> None:
    world = sqlite_world
    old = world.run("--deployment", "v1", bot=world.bot(slow=9), ttl="10")
    world.works(1)
    warm = world.run("--deployment", "v2", "--warm", bot=world.bot(start=4.0, gate="fd"), ttl="10")
    seen = []

    def step() -> bool:
        (bot,) = rows(world, "status")
        now = bot["handover"]["step"] if bot["handover"] else "done"
        if not seen or seen[-1] != now:
            seen.append(now)
            if now == "in progress":
                os.kill(old.children()[-1], signal.SIGKILL)  # long enough for a slow machine to look, and no longer
        return now == "done" and len(seen) > 1

    warm.says("warming up")
    until(step)
    assert [step for step in seen if step not in ("done", "ready")] == ["requested", "in progress"]
    for _ in range(2):
        world.run("--deployment", "v3", bot=world.bot(exit=1, **{"for": 0.05}), ttl="3").wait()
    assert "in quarantine, did not pass their probation: v3" in says(world, "status")


def test_watching_shows_changes_until_it_is_interrupted(sqlite_world: World) -> None:
    world = sqlite_world
    world.run("--name", "b", "--deployment", "v1")
    world.works(1)
    with subprocess.Popen(
        [*BOTLEASE, "status", "--watch", "--json", "--interval", "0.1"],
        env=clean_env(BOTLEASE_DATABASE_URL=world.url),
        stdout=subprocess.PIPE,
        text=True,
    ) as watching:
        assert watching.stdout is not None
        assert json.loads(watching.stdout.readline())["paused"] is False
        says(world, "pause")
        until(lambda: json.loads(watching.stdout.readline())["paused"])  # type: ignore[union-attr]
        watching.send_signal(signal.SIGINT)
        watching.stdout.read()
        assert watching.wait(10) == 0


# Changing ----------------------------------------------------------------------------------------------------------


def test_whoever_was_killed_with_everything_is_not_waited_for_for_days(world: World) -> None:
    one = world.run("--name", "b", "--deployment", "v1", ttl="1")
    world.works(1)
    two = world.run("--name", "b", "--deployment", "v1", ttl="1")
    two.says("standby: ")
    assert botlease(world, "wait", "--active", "--timeout", "5").returncode == 0
    assert botlease(world, "wait", "--standby", "--timeout", "5").returncode == 0
    for run in (one, two):
        run.signal(signal.SIGSTOP)
    for run in (two, one):
        for pid in [run.pid, *run.children()]:
            os.kill(pid, signal.SIGKILL)
    until(lambda: rows(world, "status")[0]["instances"][0]["silent"])
    for which in ("--active", "--standby"):
        assert botlease(world, "wait", which, "--timeout", "0.3").returncode == 75


def test_deactivate_stops_the_bot_until_one_is_promoted(world: World) -> None:
    world.run("--name", "b", "--deployment", "v1", "--when-superseded", "stay")
    world.works(1)
    world.run("--name", "b", "--deployment", "v1").says("standby: ")
    who = instance(world, "v1")
    assert "b: deactivated" in says(world, "deactivate")
    until(lambda: rows(world, "status")[0]["lease"]["holder"] is None)
    assert "nobody had the assignment" in says(world, "deactivate", "--name", "b")
    says(world, "promote", who)
    until(lambda: rows(world, "status")[0]["lease"]["holder"] == who)
    assert "deactivated" in says(world, "deactivate", who)
    until(lambda: rows(world, "status")[0]["lease"]["holder"] is None)
    assert "0 bots: nobody had the assignment" in says(world, "deactivate", "--all")
    assert [r["ended"] for r in rows(world, "history")] == ["deactivated", "deactivated"]
    assert botlease(world, "deactivate", "no-such-one").returncode == 78
    assert botlease(world, "deactivate", "x", "--all").returncode == 2


def test_a_damaged_file_of_what_waits_keeps_no_operator_from_a_pause(tmp_path: Path) -> None:
    world = World(tmp_path, f"sqlite:///{tmp_path}/lease.db")
    try:
        world.run("--name", "b")
        world.works(1)
        (tmp_path / "lease.db-updates").write_bytes(b"")
        done = botlease(world, "status")
        assert done.returncode == 0 and "b: term 1" in done.stdout and "cannot be read" in done.stderr
        assert "paused" in says(world, "pause")
    finally:
        world.close()


def test_the_doctor_refuses_a_file_that_a_start_would_refuse(tmp_path: Path) -> None:
    (tmp_path / "real.db").touch()
    (tmp_path / "link.db").symlink_to(tmp_path / "real.db")
    done = botlease(None, "doctor", "--no-telegram", BOTLEASE_DATABASE_URL=f"sqlite:///{tmp_path}/link.db")
    assert done.returncode == 1 and "symbolic link" in done.stdout
    missing = botlease(None, "doctor", "--no-telegram", BOTLEASE_DATABASE_URL=f"sqlite:///{tmp_path}/none/x.db")
    assert "the first start makes them" in missing.stdout and not (tmp_path / "none").exists()


def test_who_has_followed_a_dead_one_can_be_chosen_by_hand_as_well(world: World) -> None:
    """It has the assignment already. Until now a restart of the newer deployment took it away again."""
    world.run("--name", "b", "--deployment", "v1", "--when-superseded", "stay")
    world.works(1)
    new = world.run("--name", "b", "--deployment", "v2", "--probation", "0")
    world.works(2)
    for pid in [new.pid, *new.children()]:
        os.kill(pid, signal.SIGKILL)
    world.works(3)
    says(world, "promote", instance(world, "v1"))
    again = world.run("--name", "b", "--deployment", "v2", "--probation", "0")
    again.says("standby: ")
    until(lambda: [i["state"] for i in rows(world, "status")[0]["instances"]].count("standby") == 1)
    assert world.terms() == [1, 2, 3] and rows(world, "status")[0]["lease"]["term"] == 3


def test_a_file_with_a_parameter_or_a_blank_in_its_url_is_found(tmp_path: Path) -> None:
    for url in (f"sqlite:///{tmp_path}/a.db?timeout=30", f"sqlite:///{tmp_path}/my%20bot.db"):
        world = World(tmp_path, url)
        try:
            world.run("--name", "b")
            until(lambda w=world: botlease(w, "status").returncode == 0)
        finally:
            world.close()


def test_a_pause_holds_for_new_deployments_too_and_a_resume_lets_the_assigned_one_go_on(world: World) -> None:
    world.run("--name", "b", "--deployment", "v1")
    world.works(1)
    holder = instance(world, "v1")
    assert "paused; nobody works" in says(world, "pause")
    until(lambda: rows(world, "status")[0]["lease"]["holder"] is None)
    world.run("--name", "b", "--deployment", "v2")
    until(lambda: len(rows(world, "status")[0]["instances"]) == 2)
    assert "PAUSED (botlease resume)" in says(world, "status")
    assert "was paused already" in says(world, "pause")
    assert botlease(world, "wait", "--active", "--timeout", "2").returncode == 75
    assert "resumed" in says(world, "resume", "--name", "b")
    # either goes on first; in the end it is the newer one
    until(lambda: rows(world, "status")[0]["lease"]["holder"] == instance(world, "v2"))
    ended = [r["ended"] for r in rows(world, "history")]
    assert ended[-1] == "paused" and rows(world, "history")[-1]["instance_id"] == holder
    assert world.overlap() == 0


def test_pause_in_plain_sql(world: World) -> None:
    run = world.run("--name", "b")
    world.works(1)
    world.sql("UPDATE bot_leases SET paused = TRUE WHERE bot = 'b'")
    run.says("the operator paused the bot")
    run.says("passive: ")
    world.sql("UPDATE bot_leases SET paused = FALSE WHERE bot = 'b'")
    world.works(2)


def test_prune_deletes_what_is_old_and_nothing_that_lives(sqlite_world: World) -> None:
    world = sqlite_world
    for _ in range(2):
        run = world.run("--name", "b", "--deployment", "v1")
        world.works(1)
        run.says("active: ")
        run.signal(signal.SIGTERM)
        run.wait()
    world.run("--name", "b", "--deployment", "v1").says("active: ")
    assert says(world, "prune") == "deleted 0 instances and 0 terms\n"
    assert says(world, "prune", "--older-than", "0m") == "deleted 2 instances and 2 terms\n"
    assert len(rows(world, "status", "--all")[0]["instances"]) == 1
    bad = botlease(world, "prune", "--older-than", "long ago")
    assert bad.returncode == 2 and "30d, 12h or 90m" in bad.stderr


def test_with_several_bots_the_one_that_is_meant_must_be_named(sqlite_world: World) -> None:
    world = sqlite_world
    for name in ("one", "two"):
        world.run("--name", name)
    until(lambda: Path(world.url.removeprefix("sqlite:///")).exists() and len(rows(world, "status")) == 2)
    done = botlease(world, "pause")
    assert done.returncode == 78 and "which bot? Name it with --name: there are one, two" in done.stderr
    assert "one: paused" in botlease(world, "pause", BOTLEASE_NAME="one").stdout
    assert says(world, "pause", "--all").startswith("1 bots: paused")


def test_another_bots_name_in_the_environment_stops_nobody(sqlite_world: World) -> None:
    world = sqlite_world
    world.run("--name", "b", ttl="10")
    world.works(1)
    for env in ({"BOTLEASE_NAME": "typo"}, {"TELEGRAM_BOT_TOKEN": "777:AA-the-token-of-another-bot"}):
        for args in (["pause"], ["deactivate"], ["history"], ["wait", "--active", "--timeout", "1"]):
            done = botlease(world, *args, **env)
            assert done.returncode == 78 and "there are b" in done.stderr, (args, done)
    for args in (["status"], ["verify"]):
        assert botlease(world, *args, "--name", "typo").returncode == 78
    (bot,) = rows(world, "status")
    assert not bot["paused"] and bot["lease"]["holder"]


# Doctor ------------------------------------------------------------------------------------------------------------


def lines(done: subprocess.CompletedProcess[str]) -> list[tuple[str, str]]:
    return [(json.loads(line)["level"], json.loads(line)["what"]) for line in done.stdout.splitlines()]


def test_the_doctor_finds_a_healthy_patient_healthy_and_changes_nothing(tmp_path: Path, any_url: str) -> None:
    done = botlease(None, "doctor", "--json", BOTLEASE_DATABASE_URL=any_url, HOME=str(tmp_path))
    assert done.returncode == 0, done.stdout
    assert all(level == "ok" for level, _ in lines(done)), done.stdout
    what = " ".join(text for _, text in lines(done))
    assert "kernel fence" in what and "tables: none yet" in what and "clock" in what and "platform plain" in what
    if any_url.startswith("sqlite"):
        assert not Path(any_url.removeprefix("sqlite:///")).exists()


def test_the_doctor_names_what_a_platform_would_do_to_the_bot(tmp_path: Path) -> None:
    env = {"RAILWAY_DEPLOYMENT_ID": "d", "RAILWAY_ENVIRONMENT_NAME": "production", "HOME": str(tmp_path)}
    done = botlease(None, "doctor", **env)
    assert done.returncode == 1
    assert "Railway kills 0 s after its SIGTERM, as far as can be told, and the bot may take 10 s" in done.stdout
    assert "-> set the service variable RAILWAY_DEPLOYMENT_DRAINING_SECONDS; 11 s are needed" in done.stdout
    assert "-> set BOTLEASE_ENVIRONMENT=production" in done.stdout
    assert "problem  SQLite guards one machine" in done.stdout
    assert "/health waits up to 120 s for handover and probation" in done.stdout
    better = {"RAILWAY_DEPLOYMENT_DRAINING_SECONDS": "45", "BOTLEASE_ENVIRONMENT": "production"}
    assert "45 s from SIGTERM to SIGKILL, 11 s are needed" in botlease(None, "doctor", **(env | better)).stdout
    assert "would refuse to become active" in botlease(None, "doctor", **env, BOTLEASE_ENVIRONMENT="x").stdout
    pm2 = botlease(None, "doctor", pm_id="0", BOTLEASE_PLATFORM_GRACE="60", HOME=str(tmp_path))
    assert "it does not name deployments: a new one stands by" in pm2.stdout and "60 s from SIGINT" in pm2.stdout
    heroku = botlease(None, "doctor", DYNO="worker.1", HOME=str(tmp_path))
    assert "-> heroku labs:enable runtime-dyno-metadata" in heroku.stdout


def test_the_doctor_names_a_database_that_cannot_be_used(tmp_path: Path) -> None:
    for url, text in (
        ("postgresql://u:secret@127.0.0.1:1/d", "cannot reach PostgreSQL at 127.0.0.1:1"),
        ("mysql://u:secret@h/d", "use postgresql://"),
    ):
        done = botlease(None, "doctor", BOTLEASE_DATABASE_URL=url, HOME=str(tmp_path))
        assert done.returncode == 1 and text in done.stdout and "secret" not in done.stdout + done.stderr
    done = botlease(None, "doctor", BOTLEASE_TTL="abc", HOME=str(tmp_path))
    assert done.returncode == 1 and "is not a number" in done.stdout


async def test_the_doctor_names_missing_privileges(postgres_server: Postgres, postgres_url: str) -> None:
    from botlease.stores import open_store

    store = open_store(postgres_url)
    await store.open(5)
    await store.aclose()
    admin = await asyncpg.connect(postgres_url)
    role = f"poor_{os.getpid()}"
    await admin.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'x'; GRANT SELECT, INSERT, UPDATE ON bot_leases TO {role}")
    try:
        database = postgres_url.rsplit("/", 1)[1]
        port = postgres_url.rsplit("/", 1)[0].rsplit(":", 1)[1]
        poor = f"postgresql://{role}:x@127.0.0.1:{port}/{database}"
        done = botlease(None, "doctor", BOTLEASE_DATABASE_URL=poor, HOME="/nowhere")
        assert done.returncode == 1 and "the role lacks " in done.stdout
        assert "DELETE ON bot_instances" in done.stdout and "ON bot_leases" not in done.stdout
    finally:
        await admin.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")
        await admin.close()


@pytest.mark.skipif(not has_pgbouncer(), reason="pgbouncer is not installed")
def test_the_doctor_sees_a_transaction_pooler(postgres_url: str, tmp_path: Path) -> None:
    port = int(postgres_url.split(":")[-1].split("/")[0])
    pooler = PgBouncer(port, 1)
    try:
        url = postgres_url.replace(f":{port}/", f":{pooler.port}/")
        done = botlease(None, "doctor", BOTLEASE_DATABASE_URL=url, HOME=str(tmp_path))
    finally:
        pooler.stop()
    assert "a transaction pooler is in between" in done.stdout and done.returncode == 0


def test_the_doctor_asks_telegram_about_token_and_webhook_and_shows_neither_secret(tmp_path: Path) -> None:
    token = "424242:AA-secret-of-the-doctors-test"
    with subprocess.Popen(
        [*BOTLEASE, "simulator", "--port", "0", "--users", "0"], env=clean_env(), stdout=subprocess.PIPE, text=True
    ) as simulator:
        try:
            assert simulator.stdout is not None
            line = simulator.stdout.readline()
            api = next(word for word in line.split() if word.startswith("http://")).partition("/bot")[0]
            env = {"TELEGRAM_API_URL": api, "TELEGRAM_BOT_TOKEN": token, "HOME": str(tmp_path)}
            done = botlease(None, "doctor", **env)
            assert "Telegram: the token is that of @" in done.stdout and "(424242)" in done.stdout, done.stdout
            assert "no webhook" in done.stdout
            own = {**env, "BOTLEASE_BOT_API": api, "TELEGRAM_API_URL": "http://127.0.0.1:1"}
            assert "(424242)" in botlease(None, "doctor", **own).stdout  # the gateway's goes before the bot's
            import urllib.request

            hook = f"{api}/bot{token}/setWebhook?url=https://hooks.example.org/{token}"
            urllib.request.urlopen(hook, timeout=5).close()
            done = botlease(None, "doctor", **env)
            assert "a webhook is set, to hooks.example.org" in done.stdout
        finally:
            simulator.send_signal(signal.SIGINT)
            assert simulator.stdout is not None
            simulator.stdout.read()
    assert token not in done.stdout + done.stderr and "secret" not in done.stdout
    done = botlease(None, "doctor", **(env | {"TELEGRAM_API_URL": "http://127.0.0.1:1"}))
    assert "127.0.0.1 cannot be reached" in done.stdout and "secret" not in done.stdout + done.stderr
    assert "Telegram" not in botlease(None, "doctor", "--no-telegram", **env).stdout


# Init, completion --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [slug(p) for p in EVERY])
def test_init_writes_files_that_their_readers_can_read_and_never_touches_what_is_there(
    name: str, tmp_path: Path
) -> None:
    done = botlease(None, "init", name, "--dir", str(tmp_path), "--app", "my-bot", "--command", "python main.py -v")
    assert done.returncode == 0, done.stderr
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert files
    for file in files:
        text = file.read_text()
        assert "@" not in text.replace("@sha256", "") or "postgresql://" in text, text
        if file.suffix in (".yaml", ".yml"):
            yaml.safe_load(text)
        elif file.suffix == ".toml":
            tomllib.loads(text)
        elif file.suffix == ".sh":
            assert subprocess.run(["sh", "-n", str(file)], check=False).returncode == 0
        elif file.name == "captain-definition":
            json.loads(text)
    said = "".join(f.read_text() for f in files)
    assert "botlease" in said and ("main.py" in said or name == "docker")
    before = {p: p.read_bytes() for p in files}
    again = botlease(None, "init", name, "--dir", str(tmp_path), "--app", "my-bot", "--command", "python main.py -v")
    assert again.returncode == 0 and "wrote" not in again.stdout and again.stdout.count("same") == len(files)
    files[0].write_text("mine")
    kept = botlease(None, "init", name, "--dir", str(tmp_path), "--app", "my-bot", "--command", "python main.py -v")
    assert kept.returncode == 1 and f"kept     {files[0].relative_to(tmp_path)}" in kept.stdout
    assert {p: p.read_bytes() for p in files} == before | {files[0]: b"mine"}


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["nowhere"], "no platform 'nowhere'"),
        (["docker", "--app", "../../x"], "take up to 30 small letters"),
        (["docker", "--command", 'sh -c "a b"'], "put anything else into a script"),
        (["docker", "--command", ""], "take plain words"),
    ],
)
def test_init_refuses_what_would_not_work_before_it_writes(args: list[str], text: str, tmp_path: Path) -> None:
    done = botlease(None, "init", *args, "--dir", str(tmp_path / "x"))
    assert done.returncode == 78 and text in done.stderr and not (tmp_path / "x").exists()


def test_init_does_not_write_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "Procfile").symlink_to(tmp_path / "elsewhere")
    assert botlease(None, "init", "heroku", "--dir", str(tmp_path)).returncode == 1
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_completes_commands_options_and_instances(shell: str, sqlite_world: World) -> None:
    script = botlease(None, "completion", shell)
    assert script.returncode == 0 and "_BOTLEASE_COMPLETE" in script.stdout
    if shell != "bash":
        return
    world = sqlite_world
    world.run("--name", "b", "--deployment", "v1")
    world.works(1)

    def complete(*words: str) -> str:
        env = {"_BOTLEASE_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
        return botlease(world, **env).stdout

    assert "plain,history" in complete("botlease", "hi")
    assert "plain,--probation" in complete("botlease", "run", "--prob")
    assert f"plain,{instance(world, 'v1')}" in complete("botlease", "promote", "b-")


def test_at_a_terminal_watching_repaints(sqlite_world: World) -> None:
    world = sqlite_world
    world.run("--name", "b")
    world.works(1)
    master, slave = pty.openpty()
    with subprocess.Popen(
        [*BOTLEASE, "status", "--watch", "--interval", "0.1"],
        env=clean_env(BOTLEASE_DATABASE_URL=world.url),
        stdout=slave,
        stdin=subprocess.DEVNULL,
    ) as watching:
        os.close(slave)
        shown = b""
        end = time.monotonic() + DURATION
        while shown.count(b"\x1b[H\x1b[J") < 2 and time.monotonic() < end:
            if select.select([master], [], [], 0.5)[0]:
                shown += os.read(master, 65_536)
        watching.send_signal(signal.SIGINT)
        assert watching.wait(10) == 0
    os.close(master)
    assert shown.count(b"\x1b[H\x1b[J") >= 2 and b"Ctrl-C ends" in shown


def test_the_doctor_warns_of_a_database_whose_certificate_is_not_checked() -> None:
    from botlease.doctor import tls_lines

    for url in ("postgresql://u@db.example/x", "postgres://u@db.example/x?sslmode=require"):
        (line,) = tls_lines(url, {})
        assert line.level == "warning" and "verify-full" in line.cure
    quiet = ("sqlite:///x.db", "postgresql://u@localhost/x", "postgresql://u@db.railway.internal/x")
    for url in (*quiet, "postgresql://u@db.example/x?sslmode=verify-full"):
        assert tls_lines(url, {}) == []
    assert tls_lines("postgresql://u@db.example/x", {"PGSSLMODE": "verify-full"}) == []


def test_status_says_of_whom_nothing_is_heard_and_nobody_is_moved_to_the_dead(world: World) -> None:
    world.run("--name", "b", "--deployment", "v1", "--when-superseded", "stay", ttl="1")
    world.works(1)
    dead = world.run("--name", "b", "--deployment", "v1", ttl="1")
    dead.says("standby: ")
    (bot,) = rows(world, "status")
    who = next(i["instance_id"] for i in bot["instances"] if i["instance_id"] != bot["lease"]["holder"])
    dead.process.kill()
    dead.process.wait()
    until(lambda: "silent (standby)" in says(world, "status"))
    done = botlease(world, "promote", who)
    assert done.returncode == 78 and "no sign of life" in done.stderr and "SQL" in done.stderr
    assert rows(world, "status")[0]["lease"]["holder"] == bot["lease"]["holder"]


def test_whoever_stands_by_because_nobody_may_work_says_so(world: World) -> None:
    """As the seed's own steps have it: all FALSE, then a restart of the same deployment. It starts nothing, by design,
    and it looked like one that is well."""
    first = world.run("--name", "b", "--deployment", "v1")
    world.works(1)
    world.sql("UPDATE bot_instances SET is_active = FALSE")
    first.says("nobody has the assignment (deactivated, or its row was deleted): `botlease promote` one, or deploy")
    again = world.run("--name", "b", "--deployment", "v1")
    again.says("nobody has the assignment")
    assert "nobody has the assignment (botlease promote INSTANCE" in says(world, "status")
    says(world, "pause", "--name", "b")
    world.run("--name", "b", "--deployment", "v2").says("the bot is paused (`botlease resume`)")
    assert world.terms() == [1]


def test_pruning_what_is_young_leaves_a_standby_that_gives_a_sign_once_in_its_ttl(world: World) -> None:
    world.run("--name", "b", "--deployment", "v1", ttl="10")
    world.works(1)
    world.run("--name", "b", "--deployment", "v1", ttl="10").says("standby: ")
    time.sleep(0.1)  # older than the age below
    assert says(world, "prune", "--older-than", "0m") == "deleted 0 instances and 0 terms\n"
    assert botlease(world, "prune", "--older-than", "1000000000000d").returncode == 2


def test_a_time_that_is_no_number_is_refused(sqlite_world: World) -> None:
    for words in (
        ("wait", "--active", "--timeout", "nan"),
        ("check", "--grace", "nan"),
        ("status", "--interval", "nan"),
    ):
        done = botlease(sqlite_world, *words)
        assert done.returncode == 2 and "not a number of seconds" in done.stderr


def test_the_doctor_names_a_table_of_somebody_else(tmp_path: Path) -> None:
    for create in (
        "CREATE TABLE botlease_schema (version TEXT)",
        "CREATE TABLE botlease_schema (version TEXT); INSERT INTO botlease_schema VALUES ('x')",
    ):
        file = tmp_path / f"{len(create)}.db"
        with contextlib.closing(sqlite3.connect(file)) as db:
            db.executescript(create)
        done = botlease(None, "doctor", "--no-telegram", BOTLEASE_DATABASE_URL=f"sqlite:///{file}")
        assert done.returncode == 1 and "is not ours" in done.stdout and "Traceback" not in done.stderr
