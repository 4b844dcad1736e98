"""Several teams on one server, over plain HTTP: keys, limits, and nothing of one seen by another.

Needs the admin token: the variable BELLJAR_ADMIN_TOKEN_FILE names its file. See ../README.md.
"""

import re
import time
from concurrent.futures import ThreadPoolExecutor

import raw
from checks import Suite, equal, say, true, until
from operator_api import TOKEN_FILE, Team, admin, done, token

suite = Suite("platform")
CONCURRENCY = "you have reached the maximum number of concurrent E2B sandboxes (2)"


def create(**fields):
    body = {"templateID": "base", "timeout": 120, "metadata": suite.metadata, **fields}
    return done(raw.api("POST", "/v2/sandboxes", body), 201)["sandboxID"]


def admin_token():
    for wrong in ("", "x" * 40, token()[:-1], token() + "x"):
        equal(admin("GET", "/admin/teams", token_text=wrong).status, 401, f"with {wrong[:4]}…")
    equal(raw.api("GET", "/admin/teams").status, 401, "with an API key")
    true(done(admin("GET", "/admin/teams"), 200), "no team at all")


def other_team_sees_nothing():
    """Every route that names a sandbox answers the stranger as if there were none."""
    mine = create()
    with Team() as other:
        theirs = done(other.create(), 201)["sandboxID"]
        paths = [
            ("GET", "", None),
            ("GET", "/logs", None),
            ("GET", "/metrics", None),
            ("POST", "/timeout", {"timeout": 1}),
            ("POST", "/refreshes", {"duration": 60}),
            ("POST", "/connect", {"timeout": 60}),
            ("DELETE", "", None),
        ]
        for method, tail, body in paths:
            answer = other.api(method, f"/sandboxes/{mine}{tail}", body)
            equal(answer.status, 404, f"{method} {tail} of a stranger: {answer}")
            missing = other.api(method, f"/sandboxes/{'i' + '0' * 20}{tail}", body)
            same = answer.message.replace(mine, "X") == missing.message.replace("i" + "0" * 20, "X")
            true(same, f"told apart from what is not there: {answer} and {missing}")
        for path in ("/sandboxes", "/v2/sandboxes"):
            found = [entry["sandboxID"] for entry in done(other.api("GET", path), 200)]
            equal(found, [theirs], f"{path} of the other team")
        metrics = done(other.api("GET", f"/sandboxes/metrics?sandbox_ids={mine},{theirs}"), 200)
        true(mine not in metrics["sandboxes"], "metrics of a stranger's sandbox")
        equal(raw.api("GET", f"/sandboxes/{theirs}").status, 404, "the other way round")
    left = done(raw.api("GET", f"/sandboxes/{mine}"), 200)
    equal(left["state"], "running", "after all of that")
    equal(raw.api("DELETE", f"/sandboxes/{mine}").status, 204, "kill by its own team")


def keys():
    with Team() as team:
        made = team.new_key("second")
        key, mask = made["key"], made["mask"]
        true(re.fullmatch(r"e2b_[0-9a-f]{40}", key), "form of a key")
        equal((mask["prefix"], mask["valueLength"]), ("e2b_", 40), "mask")
        shown = mask["maskedValuePrefix"], mask["maskedValueSuffix"]
        true(key[4:].startswith(shown[0]) and key.endswith(shown[1]), f"mask {mask}")
        true(len("".join(shown)) <= 10, f"the mask shows most of the key: {mask}")
        equal(raw.api("GET", "/v2/sandboxes", key=key).status, 200, "with the key")
        listed = admin("GET", f"/admin/teams/{team.id}/api-keys")
        equal(sorted(entry["name"] for entry in done(listed, 200)), ["first", "second"], "keys")
        true(key not in listed.body.decode(), "a whole key in the list")
        path = f"/admin/teams/{team.id}/api-keys/{made['id']}"
        equal(admin("DELETE", path).status, 204, "revoking")
        equal(raw.api("GET", "/v2/sandboxes", key=key).status, 401, "with the revoked key")
        equal(team.api("GET", "/v2/sandboxes").status, 200, "with the other key")
        equal(admin("DELETE", path).status, 404, "revoking twice")


def concurrency():
    """Counted over running and starting ones: of ten at once exactly two get through."""
    with Team(limitOverrides={"maxConcurrentSandboxes": 2, "createsPerSecond": 1000}) as team:
        with ThreadPoolExecutor(10) as pool:
            answers = list(pool.map(lambda _: team.create(), range(10)))
        statuses = sorted(answer.status for answer in answers)
        equal(statuses, [201] * 2 + [429] * 8, "ten at once")
        refused = [answer for answer in answers if answer.status == 429]
        for answer in refused:
            true(answer.message.startswith(CONCURRENCY), f"text: {answer}")
            equal(answer.json()["code"], 429, "code in the body")
        made = next(answer.json()["sandboxID"] for answer in answers if answer.status == 201)
        equal(team.api("DELETE", f"/sandboxes/{made}").status, 204, "kill")
        done(team.create(), 201)
        team.change(limitOverrides={"maxConcurrentSandboxes": 3, "createsPerSecond": 1000})
        done(team.create(), 201)
        equal(team.create().status, 429, "beyond the raised limit")


def time_to_live():
    with Team(limitOverrides={"maxLengthSeconds": 3600}) as team:
        answer = team.create(timeout=3601)
        equal((answer.status, answer.message), (400, "Timeout cannot be greater than 1 hours"), "create")
        made = done(team.create(timeout=3600), 201)["sandboxID"]
        answer = team.api("POST", f"/sandboxes/{made}/timeout", {"timeout": 3601})
        equal(answer.status, 400, f"timeout: {answer}")


def blocked():
    with Team() as team:
        made = done(team.create(), 201)["sandboxID"]
        team.change(blocked=True, blockedReason="has not paid")
        answer = team.api("GET", f"/sandboxes/{made}")
        equal(answer.status, 403, f"of a blocked team: {answer}")
        true("has not paid" in answer.message, f"no reason in {answer}")
        team.change(blocked=False)
        equal(team.api("GET", f"/sandboxes/{made}").status, 200, "after that")


def addresses():
    """We come from 127.0.0.1 or ::1."""
    with Team(allowedAddresses=["203.0.113.0/24"]) as team:
        answer = team.api("GET", "/v2/sandboxes")
        equal(answer.status, 403, f"from elsewhere: {answer}")
        true("127.0.0.1" in answer.message or "::1" in answer.message, f"no address in {answer}")
        team.change(allowedAddresses=["127.0.0.0/8", "::1/128"])
        equal(team.api("GET", "/v2/sandboxes").status, 200, "from an allowed one")


def operator_kills():
    with Team() as team:
        for _ in range(3):
            done(team.create(), 201)
        counts = done(admin("GET", "/admin/sandboxes/running-counts"), 200)
        equal(counts.get(team.id), 3, "running")
        equal(admin("DELETE", f"/admin/teams/{team.id}").status, 409, "removal with sandboxes")
        equal(team.api("GET", "/v2/sandboxes").status, 200, "after the refused removal")
        killed = done(admin("POST", f"/admin/teams/{team.id}/sandboxes/kill"), 200)
        equal(killed, {"killedCount": 3, "failedCount": 0}, "killed")
        equal(done(team.api("GET", "/v2/sandboxes"), 200), [], "left")
        counts = done(admin("GET", "/admin/sandboxes/running-counts"), 200)
        true(team.id not in counts, f"still counted: {counts}")


def team_metrics():
    """How many ran at once and how many began: a sandbox shows within seconds."""
    with Team() as team:
        start = int(time.time()) - 1
        for _ in range(2):
            done(team.create(), 201)

        def seen():
            found = done(team.api("GET", f"/teams/{team.id}/metrics?start={start}"), 200)
            return any(sample["concurrentSandboxes"] == 2 for sample in found)

        until(60, "two at once in the team's metrics", seen, pause_s=1)
        path = f"/teams/{team.id}/metrics/max?start={start}&metric=concurrent_sandboxes"
        equal(done(team.api("GET", path), 200)["value"], 2, "most at once")
        stranger = raw.api("GET", f"/teams/{team.id}/metrics")
        true(stranger.status in (403, 404), f"a stranger's question: {stranger}")


def main():
    if token() is None:
        say(f"skip platform.all: {TOKEN_FILE} is not set; it names a file of the server's data folder")
        return
    with suite:
        for body in (admin_token, other_team_sees_nothing, keys, concurrency, time_to_live, blocked):
            suite.check(body.__name__, body)
        for body in (addresses, operator_kills, team_metrics):
            suite.check(body.__name__, body)


if __name__ == "__main__":
    main()
