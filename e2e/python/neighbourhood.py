"""What lies around a sandbox on this machine: the addresses it must not reach.

Works where the suite runs on the server's own machine and `ip` (iproute2) is there.
"""

import ipaddress
import json
import os
import shutil
import socket
import subprocess
import threading
import urllib.parse
from concurrent.futures import ThreadPoolExecutor

import raw
from checks import Skip, true

MOST_ADDRESSES = 16  # a pool of slots has many; some of each kind are enough
NARROW_PREFIX = 30  # an interface this narrow is one end of a link to one sandbox


class Bait:
    """A server on every address of the host that answers anyone, and counts who came."""

    def __enter__(self):
        self._listener = socket.create_server(("0.0.0.0", 0), backlog=64)
        self.port = self._listener.getsockname()[1]
        self.visitors = 0
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        return self

    def _serve(self):
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            self.visitors += 1
            peer.close()

    def __exit__(self, *_):
        # shutdown wakes the thread out of accept; close alone would leave it there.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)


def server_is_here():
    """Whether the API's address is one of this machine's."""
    host = urllib.parse.urlsplit(raw.setting("E2B_API_URL")).hostname
    return ipaddress.ip_address(socket.gethostbyname(host)).is_loopback


def _ip(*arguments):
    if not shutil.which("ip"):
        raise Skip("the program ip (package iproute2) is missing")
    answer = subprocess.run(
        ["ip", "-j", "-4", *arguments], capture_output=True, timeout=20, check=True
    )
    return json.loads(answer.stdout or b"[]")


def _interfaces():
    for link in _ip("addr"):
        for address in link.get("addr_info", []):
            yield ipaddress.ip_interface(f"{address['local']}/{address['prefixlen']}")


def host_addresses():
    """The host's own addresses that are not loopback: first those of real networks, then ends of
    links to sandboxes."""
    found = sorted(
        (i for i in _interfaces() if not i.is_loopback), key=lambda i: i.network.prefixlen
    )
    return [str(i.ip) for i in found][:MOST_ADDRESSES]


def sandbox_addresses():
    """Addresses next to the host at which a sandbox's daemon answers right now."""
    own = {i.ip for i in _interfaces()}
    near = {a for i in _interfaces() if i.network.prefixlen >= NARROW_PREFIX for a in i.network}
    for route in _ip("route"):
        network = ipaddress.ip_network("0.0.0.0/0" if route["dst"] == "default" else route["dst"])
        if network.prefixlen >= NARROW_PREFIX:
            near.update(network)
    near = sorted(near - own)
    with ThreadPoolExecutor(32) as pool:
        return [str(a) for a, alive in zip(near, pool.map(_has_daemon, near)) if alive]


def _has_daemon(address):
    try:
        return (
            raw.request(f"http://{address}:{raw.ENVD_PORT}", "GET", "/health", timeout_s=2).status
            == 204
        )
    except OSError:
        return False


def is_at(address, token):
    """Whether the sandbox with this access token is the one at an address."""
    url = f"http://{address}:{raw.ENVD_PORT}"
    return raw.request(url, "GET", "/envs", headers={"X-Access-Token": token}).status == 200


def forbidden_targets(own_token, bait):
    """What the sandbox with `own_token` must not reach, as `address:port`. Fails when a bait that
    must be reachable from the host is not."""
    if not server_is_here():
        raise Skip("the server runs on another machine; its addresses are not known here")
    host = host_addresses()
    if host:
        with socket.create_connection((host[0], bait.port), timeout=5) as visit:
            visit.recv(1)  # the bait hangs up, so it has counted
        true(bait.visitors == 1, "the host cannot reach the bait itself")
        bait.visitors = 0
    others = [a for a in sandbox_addresses() if not is_at(a, own_token)]
    if os.geteuid() == 0:
        true(others, "no other sandbox's address answers the host, so nothing would be proved")
    services = {
        urllib.parse.urlsplit(raw.setting(n)).port for n in ("E2B_API_URL", "E2B_SANDBOX_URL")
    }
    ports = sorted(services | {bait.port})
    targets = [f"{address}:{bait.port}" for address in host]
    targets += [f"{address}:{port}" for address in ["gateway", *host[:1]] for port in ports]
    targets += [f"{address}:{raw.ENVD_PORT}" for address in others[:MOST_ADDRESSES]]
    return sorted({*targets, "169.254.169.254:80"})
