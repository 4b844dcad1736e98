"""The API against its own OpenAPI document, by schemathesis: no 5xx, no answer the document does not
describe, nothing let through that it forbids.

Two passes with fixed seeds. In the first, ids in paths are made up, so most answers are refusals; in
the second every operation on a sandbox has a live one of its own. Needs a server on which a
sandbox costs nothing (`belljar up --runtime fake`, with a template `base`). See ../README.md.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

import raw
from checks import Suite, equal, true

suite = Suite("schema")
PASS_LIMIT_S = 40
METHODS = ("GET", "PUT", "POST", "DELETE", "PATCH")
# Not checked, and why:
LEFT_OUT = {
    # A body can be well formed and still ask for what is not there: a template, a page, a feature.
    "positive_data_acceptance",
}


def document():
    answer = raw.request(raw.setting("E2B_API_URL"), "GET", "/openapi.json")
    equal(answer.status, 200, "GET /openapi.json")
    true(answer.json()["openapi"].startswith("3.1"), "it is OpenAPI 3.1")
    return answer.json()


def operations(described):
    return [
        (method.upper(), path) for path, item in described["paths"].items() for method in item
    ]


def has_later_methods(described, path):
    """Whether the server has methods for this path that it does not describe, because they are not
    supported yet: the contract asks for 501 there, and not for 405."""
    concrete = "/".join("x" if part.startswith("{") else part for part in path.split("/"))
    others = [m for m in METHODS if m.lower() not in described["paths"][path]]
    return any(raw.api(m, concrete, b"{}").status == 501 for m in others)


def settings(described, live):
    """The configuration of one pass. `live` says whether operations get live sandboxes."""
    lines = []
    for method, path in operations(described):
        exempt = has_later_methods(described, path)
        own = live and path.startswith(("/sandboxes/{id}", "/v2/sandboxes/{id}"))
        if not (exempt or own):
            continue
        lines += ["[[operations]]", f"include-name = {json.dumps(f'{method} {path}')}"]
        if own:
            sandbox = raw.RawSandbox(suite.tag)
            lines.append(f'parameters = {{ "path.id" = "{sandbox.id}" }}')
        if exempt:
            lines.append("checks.unsupported_method.enabled = false")
            lines.append("checks.allow_header_conformance.enabled = false")
            lines.append('checks.not_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", 501]')
    return "\n".join(lines) + "\n"


def run(described, live):
    """One pass. Returns what schemathesis reports."""
    seed = "2" if live else "1"
    with tempfile.TemporaryDirectory() as folder:
        config = pathlib.Path(folder, "schemathesis.toml")
        report = pathlib.Path(folder, "report.json")
        config.write_text(settings(described, live))
        command = [
            *(os.path.join(os.path.dirname(sys.executable), "schemathesis"), "--config-file"),
            *(str(config), "run", raw.setting("E2B_API_URL") + "/openapi.json"),
            *("--header", "X-API-Key: " + raw.setting("E2B_API_KEY")),
            *("--seed", seed, "--max-examples", "10", "--max-time", str(PASS_LIMIT_S)),
            *("--phases", "coverage,fuzzing", "--continue-on-failure", "--no-shrink"),
            *("--exclude-checks", ",".join(sorted(LEFT_OUT)), "--warnings", "off"),
            *("--report", "json", "--report-json-path", str(report)),
        ]
        ended = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=PASS_LIMIT_S * 3
        )
        true(report.exists(), f"no report; it said {ended.stdout[-400:]} {ended.stderr[-400:]}")
        found = json.loads(report.read_text())
        if found["failures"] or found["errors"]:
            # What to send to see it again.
            for line in ended.stdout.splitlines():
                if line.strip().startswith(("- ST", "curl", "[", "`")):
                    suite.remark(line.strip()[:400])
        return found


def judge(report, method, path):
    wrong = {
        f"{finding.get('title')} ({finding.get('count')} times)"
        for finding in report["failures"] + report["errors"]
        if f"{method} {path}" in finding.get("operations", [])
    }
    true(not wrong, "; ".join(sorted(wrong)))


def main():
    with suite:
        described = suite.check("document", document)
        before = set(all_ids()) if described else set()
        for live in (False, True):
            name = "live" if live else "unknown"
            report = suite.check(f"run_{name}_ids", run, described, live, deadline_s=180)
            for method, path in operations(described) if report else []:
                suite.check(f"{name}_ids {method} {path}", judge, report, method, path)
            if report:
                suite.check(f"{name}_ids whole", whole, report)
        for sandbox_id in set(all_ids()) - before:
            raw.api("DELETE", f"/sandboxes/{sandbox_id}")


def whole(report):
    """Every operation was tried, and nothing was found: also not of methods that are not described."""
    tried = report["operations"]
    equal(tried["tested"], tried["selected"], f"operations tested; {report['stop_reason']}")
    true(report["test_cases"]["generated"] >= 200, f"only {report['test_cases']} requests")
    suite.remark(f"{report['test_cases']['generated']} requests in {report['running_time']:.0f} s")
    found = [(finding.get("title"), finding.get("operations")) for finding in report["failures"]]
    equal((report["exit_code"], found), (0, []), "exit code and findings")


def all_ids():
    ids, token = [], ""
    while True:
        page = raw.api("GET", f"/v2/sandboxes?limit=100&nextToken={token}")
        ids += [entry["sandboxID"] for entry in page.json()]
        token = page.headers.get("x-next-token", "")
        if not token:
            return ids


if __name__ == "__main__":
    main()
