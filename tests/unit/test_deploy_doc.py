"""The commands in docs/howto/deploy.md are ones that compose and qbatch take, for services and profiles that exist."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.command_line import parse_qbatch

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "howto" / "deploy.md").read_text(encoding="utf-8")
IN_BLOCKS = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL) for line in block.splitlines()]
COMPOSE = [line for line in (*IN_BLOCKS, *re.findall(r"`(docker compose [^`]+)`", PAGE)) if line.startswith("docker")]
# What a host has anyway.
SHELL = ("cp", "sed", "sudo", "git")
DETACHED = ("--build", "--detach", "--no-deps")


def compose_parser() -> argparse.ArgumentParser:
    """As far as the page uses it, by the reference of docker compose 2."""
    parser = argparse.ArgumentParser(prog="docker compose", exit_on_error=False)
    parser.add_argument("-f", "--file", action="append", default=[])
    parser.add_argument("--profile", action="append", default=[])
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up")
    for flag in DETACHED:
        up.add_argument(flag, action="store_true")
    up.add_argument("services", nargs="*")
    for name in ("logs", "stop", "ps"):
        commands.add_parser(name).add_argument("services", nargs="*")
    execute = commands.add_parser("exec")
    execute.add_argument("-T", action="store_true")
    execute.add_argument("services", nargs=1)
    execute.add_argument("words", nargs=argparse.REMAINDER)
    return parser


def services_of(files: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for file in files or ["docker-compose.yml"]:
        for name, service in yaml.safe_load((ROOT / file).read_text())["services"].items():
            found[name] = found.get(name, {}) | service
    return found


def words(line: str) -> list[str]:
    """Of the command, without what the shell takes."""
    return shlex.split(line.partition(" <")[0])


@pytest.mark.parametrize("line", COMPOSE)
def test_compose_and_qbatch_take_the_command(line: str) -> None:
    docker, compose, *arguments = words(line)
    assert (docker, compose) == ("docker", "compose")
    asked = compose_parser().parse_args(arguments)
    services = services_of(asked.file)
    assert set(asked.services) <= set(services)
    assert set(asked.profile) <= {profile for one in services.values() for profile in one.get("profiles", [])}
    if asked.command == "exec" and asked.words[0] == "qbatch":
        assert services[asked.services[0]]["image"] == "qbatch"
        parse_qbatch(asked.words[1:])


def test_there_are_no_other_commands_than_those_of_a_plain_host() -> None:
    others = [words(line)[0] for line in IN_BLOCKS if not line.startswith("docker compose ")]
    assert set(others) <= set(SHELL)


def test_the_passwords_land_where_compose_reads_them(tmp_path: Path) -> None:
    (tmp_path / ".env.example").write_text((ROOT / ".env.example").read_text())
    script = "\n".join(line for line in IN_BLOCKS if line.startswith(("cp", "sed")))
    subprocess.run(["bash", "-ec", script], cwd=tmp_path, check=True)
    env = dict(
        line.split("=", 1) for line in (tmp_path / ".env").read_text().splitlines() if re.match(r"[A-Z_]+=", line)
    )
    for name in ("REDIS_PASSWORD", "POSTGRES_PASSWORD", "FLOWER_PASSWORD"):
        assert re.fullmatch(r"[0-9a-f]{48}", env[name])
    assert len({env["REDIS_PASSWORD"], env["POSTGRES_PASSWORD"], env["FLOWER_PASSWORD"]}) == 3
    assert env["FLOWER_USER"] == "me"


def test_three_lines_submit() -> None:
    section = PAGE.partition("## Submit")[2].partition("```sh\n")[2].partition("```")[0]
    assert len(section.splitlines()) == 3
