"""Hosts on one machine: network namespaces on a bridge, with links limited by tc. Needs root and iproute2."""

import contextlib
import os
import pathlib
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator

PREFIX = "effscale"
SUBNET = "10.77.0"


def why_not() -> str | None:
    """Return why such a network cannot be created here, or None."""
    if sys.platform != "linux":
        return f"it needs Linux, got {sys.platform}"
    if os.geteuid() != 0:
        return "it needs root, for network namespaces"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    return f"it needs iproute2 ({', '.join(missing)} not found)" if missing else None


def _run(*command: str, check: bool = True) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


def host_name(index: int) -> str:
    """Return the namespace of a host."""
    return f"{PREFIX}{index}"


def address(index: int) -> str:
    """Return the address of a host."""
    return f"{SUBNET}.{index + 1}"


def inside(index: int) -> list[str]:
    """Return the command prefix that runs a command on a host."""
    return ["ip", "netns", "exec", host_name(index)]


@contextlib.contextmanager
def hosts(count: int) -> Iterator[None]:
    """Create namespaces 0 to ``count`` - 1, each with one link, ``eth0``, to a bridge in a separate namespace."""
    _remove()
    bridge = f"{PREFIX}br"
    try:
        _run("ip", "netns", "add", bridge)
        _run("ip", "-n", bridge, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", bridge, "link", "set", "br0", "up")
        for i in range(count):
            name, port = host_name(i), f"port{i}"
            _run("ip", "netns", "add", name)
            _run("ip", "link", "add", port, "type", "veth", "peer", "name", f"{port}h")
            _run("ip", "link", "set", port, "netns", bridge)
            _run("ip", "link", "set", f"{port}h", "netns", name)
            _run("ip", "-n", name, "link", "set", f"{port}h", "name", "eth0")
            _run("ip", "-n", bridge, "link", "set", port, "master", "br0", "up")
            _run("ip", "-n", name, "addr", "add", f"{address(i)}/24", "dev", "eth0")
            _run("ip", "-n", name, "link", "set", "eth0", "up")
            _run("ip", "-n", name, "link", "set", "lo", "up")
            # gloo binds to the address that the hostname resolves to.
            folder = pathlib.Path("/etc/netns") / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "hosts").write_text(
                f"{address(i)} {socket.gethostname()}\n127.0.0.1 localhost\n"
            )
        yield
    finally:
        _remove()


def limit(count: int, rate: str | None) -> None:
    """Limit the rate at which each host sends, such as ``200mbit``; None removes the limit."""
    for i in range(count):
        tc = [*inside(i), "tc", "qdisc"]
        _run(*tc, "del", "dev", "eth0", "root", check=False)
        if rate is not None:
            bucket = ["tbf", "rate", rate, "burst", "256kb", "latency", "200ms"]
            _run(*tc, "add", "dev", "eth0", "root", *bucket)


def _remove() -> None:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False)
    for line in listed.stdout.splitlines():
        name = line.split()[0] if line.strip() else ""
        if name.startswith(PREFIX):
            _run("ip", "netns", "del", name, check=False)
            shutil.rmtree(pathlib.Path("/etc/netns") / name, ignore_errors=True)
