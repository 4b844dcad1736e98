-- The first generation of the store. Times are Unix milliseconds, sizes mebibytes.
-- A migration is never edited once released: add another file.

CREATE TABLE teams (
    id            TEXT PRIMARY KEY NOT NULL,
    slug          TEXT NOT NULL UNIQUE,
    created_at_ms INTEGER NOT NULL
) STRICT;

-- Only the hash of a key is kept, and what is needed to show which key it was.
CREATE TABLE api_keys (
    hash          TEXT PRIMARY KEY NOT NULL,
    team_id       TEXT NOT NULL REFERENCES teams (id) ON DELETE CASCADE,
    prefix        TEXT NOT NULL,
    value_length  INTEGER NOT NULL,
    masked_prefix TEXT NOT NULL,
    masked_suffix TEXT NOT NULL,
    created_at_ms INTEGER NOT NULL
) STRICT;

-- One row per run of a sandbox. `ended_at_ms` is null while it runs.
CREATE TABLE sandboxes (
    execution_id   TEXT PRIMARY KEY NOT NULL,
    sandbox_id     TEXT NOT NULL,
    team_id        TEXT NOT NULL REFERENCES teams (id),
    template_id    TEXT NOT NULL,
    build_id       TEXT NOT NULL,
    alias          TEXT,
    metadata       TEXT NOT NULL,
    secure         INTEGER NOT NULL,
    allow_internet INTEGER NOT NULL,
    started_at_ms  INTEGER NOT NULL,
    end_at_ms      INTEGER NOT NULL,
    ended_at_ms    INTEGER,
    end_reason     TEXT
) STRICT;

CREATE INDEX sandboxes_running ON sandboxes (started_at_ms) WHERE ended_at_ms IS NULL;
CREATE INDEX sandboxes_by_template ON sandboxes (template_id, started_at_ms);

CREATE TABLE settings (
    key   TEXT PRIMARY KEY NOT NULL,
    value TEXT NOT NULL
) STRICT;
