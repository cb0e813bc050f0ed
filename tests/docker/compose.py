"""One Compose project, driven through `docker compose` or `docker-compose`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.docker.command import Failed, run

_UP_LIMIT_S = 300.0
_DOWN_LIMIT_S = 400.0
_QUERY_LIMIT_S = 150.0
"""An engine on a busy machine may take very long to answer; it only must not hang."""
_LOOK_EVERY_S = 0.25


@dataclass
class Compose:
    """The project `name` from the compose files of `folder`."""

    command: Sequence[str]
    """How this Compose is called: ["docker", "compose"] or ["docker-compose"]."""
    docker: str
    address: str
    folder: Path
    name: str
    settings: dict[str, str] = field(default_factory=dict)
    """Variables of docker/README.md's table."""
    profiles: Sequence[str] = ()

    def compose(
        self, *arguments: str, limit_s: float = _UP_LIMIT_S, check: bool = True,
        settings: Mapping[str, str] | None = None,
        watch: Callable[[str], None] | None = None,
    ) -> str:  # fmt: skip
        """Run one command of Compose; its output, which `watch` sees meanwhile. Raises Failed."""
        profiles = [word for name in self.profiles for word in ("--profile", name)]
        done = run(
            *self.command, "-p", self.name, "-f", self.folder / "compose.yaml", *profiles,
            *arguments, limit_s=limit_s, check=check, watch=watch,
            env={**self.environment(), **(settings or {})},
        )  # fmt: skip
        return done.stdout

    def engine(self, *arguments: str, limit_s: float = _QUERY_LIMIT_S, check: bool = True) -> str:
        """Run one command of the Docker client; its output. Raises Failed."""
        return run(self.docker, "-H", self.address, *arguments, limit_s=limit_s, check=check).stdout

    def up(self, *services: str, options: Sequence[str] = (), **settings: str) -> str:
        """`up -d` with the images that are there."""
        arguments = ["up", "-d", "--no-build", *options, *services]
        return self.compose(*arguments, settings=settings)

    def down(self, *, volumes: bool = False) -> str:
        options = ["-v"] if volumes else []
        return self.compose("down", "--remove-orphans", *options, limit_s=_DOWN_LIMIT_S)

    def container(self, service: str) -> str:
        """The id of the service's container. Raises Failed without one."""
        wanted = ["--filter", f"label=com.docker.compose.project={self.name}",
                  "--filter", f"label=com.docker.compose.service={service}"]  # fmt: skip
        found = self.engine("ps", "-aq", "--no-trunc", *wanted).split()
        if not found:
            raise Failed(f"{service} has no container")
        return found[0]

    def inspect(self, service: str) -> dict[str, Any]:
        """What the engine knows about the service's container."""
        found: dict[str, Any] = json.loads(self.engine("inspect", self.container(service)))[0]
        return found

    def health(self, service: str) -> str:
        """starting, healthy or unhealthy; the state when it is not running."""
        state = self.inspect(service)["State"]
        return str(state["Health"]["Status"] if state["Running"] else state["Status"])

    def wait_health(self, service: str, wanted: str, limit_s: float) -> float:
        """Wait until the service is `wanted`; the seconds it took. Raises Failed."""
        began_s = time.monotonic()
        while (health := self.health(service)) != wanted:
            if time.monotonic() - began_s > limit_s:
                raise Failed(
                    f"{service} is {health}, not {wanted}, after {limit_s:.0f} s; its log ends\n"
                    f"{self.logs(service)[-1500:]}"
                )
            time.sleep(_LOOK_EVERY_S)
        return time.monotonic() - began_s

    def logs(self, service: str) -> str:
        """Everything the service's container has said."""
        return self.engine("logs", self.container(service))

    def wait_log(self, service: str, text: str, limit_s: float) -> str:
        """Wait for a line with `text`; the line. Raises Failed."""
        deadline = time.monotonic() + limit_s
        while True:
            for line in self.logs(service).splitlines():
                if text in line:
                    return line
            if time.monotonic() > deadline:
                raise Failed(
                    f"{service} has not said {text!r} after {limit_s:.0f} s; its log ends\n"
                    f"{self.logs(service)[-1500:]}"
                )
            time.sleep(_LOOK_EVERY_S)

    def kill(self, service: str) -> None:
        """kill -9 everything in the container, as a crash would end it.

        `docker kill` would not do: Docker takes that for an operator's wish and restarts nothing.
        """
        self.engine("exec", self.container(service), "sh", "-c", "kill -9 -1", check=False)

    def environment(self) -> dict[str, str]:
        """The variables that Compose runs with: the project's settings, none of the caller's."""
        return {
            # The caller's environment must not change what is tested.
            **{
                name: ""
                for name in os.environ
                if name.startswith(("NBD_", "BRIDGE_", "GUEST_", "EXPORTER_"))
            },
            "DOCKER_HOST": self.address,
            "COMPOSE_PARALLEL_LIMIT": "4",
            **self.settings,
        }
