"""What an operator does over plain HTTP: teams and their keys. For suites that need a second team."""

import os
import uuid
from pathlib import Path

import raw
from checks import equal

TOKEN_FILE = "BELLJAR_ADMIN_TOKEN_FILE"


def token():
    """The admin token, or None when the suite was not told where it is."""
    path = os.environ.get(TOKEN_FILE)
    return Path(path).read_text().strip() if path else None


def admin(method, path, body=None, token_text=None):
    headers = {"X-Admin-Token": token() if token_text is None else token_text}
    return raw.api(method, path, body, headers=headers, key=False)


def done(answer, status):
    """The body of an answer that must have this status."""
    equal(answer.status, status, f"status of {answer}")
    return answer.json()


class Team:
    """A team with one key. Use as a context manager: with it everything of the team goes."""

    def __init__(self, **fields):
        self.name = f"suite-{uuid.uuid4().hex[:12]}"
        made = done(admin("POST", "/admin/teams", {"name": self.name, **fields}), 201)
        self.id = made["teamID"]
        self.key = self.new_key("first")["key"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        admin("POST", f"/admin/teams/{self.id}/sandboxes/kill")
        done(admin("DELETE", f"/admin/teams/{self.id}"), 204)

    def new_key(self, name):
        return done(admin("POST", f"/admin/teams/{self.id}/api-keys", {"name": name}), 201)

    def change(self, **fields):
        return done(admin("PATCH", f"/admin/teams/{self.id}", fields), 200)

    def api(self, method, path, body=None):
        return raw.api(method, path, body, key=self.key)

    def create(self, **fields):
        return self.api("POST", "/v2/sandboxes", {"templateID": "base", "timeout": 120, **fields})
