-- Teams with people and limits, events and who hears of them, and what usage is counted from.
-- Times are Unix milliseconds, sizes mebibytes, lists and maps JSON text. Booleans are 0 and 1.
-- The tables and columns of ../postgres are the same; a test compares them.

CREATE TABLE tiers (
    id                       TEXT PRIMARY KEY NOT NULL,
    max_concurrent_sandboxes INTEGER NOT NULL,
    max_length_seconds       INTEGER NOT NULL,
    max_vcpus                INTEGER NOT NULL,
    max_memory_mib           INTEGER NOT NULL,
    max_disk_mib             INTEGER NOT NULL,
    creates_per_second       INTEGER NOT NULL,
    max_concurrent_builds    INTEGER NOT NULL,
    events_ttl_days          INTEGER NOT NULL
) STRICT;

-- Source of the numbers: contract section 9. `local` is what a single machine's own team has; the
-- server writes its flags there at every start.
INSERT INTO tiers VALUES
    ('base', 20, 3600, 8, 8192, 25600, 1, 20, 7),
    ('pro', 100, 86400, 32, 65536, 51200, 5, 20, 7),
    ('local', 100, 86400, 32, 65536, 51200, 10000, 20, 7);

ALTER TABLE teams ADD COLUMN name TEXT NOT NULL DEFAULT '';
ALTER TABLE teams ADD COLUMN tier_id TEXT NOT NULL DEFAULT 'local';
-- What differs from the tier: a JSON object with the tier's column names.
ALTER TABLE teams ADD COLUMN limits TEXT NOT NULL DEFAULT '{}';
-- Address blocks requests must come from: a JSON list; empty lets everybody in.
ALTER TABLE teams ADD COLUMN allowed_addresses TEXT NOT NULL DEFAULT '[]';
-- Why nobody may act for the team at the moment; null when everybody may.
ALTER TABLE teams ADD COLUMN blocked_reason TEXT;
UPDATE teams SET name = slug;

CREATE TABLE users (
    id            TEXT PRIMARY KEY NOT NULL,
    email         TEXT NOT NULL UNIQUE,
    created_at_ms INTEGER NOT NULL
) STRICT;

-- Whom an identity provider means by a subject.
CREATE TABLE user_identities (
    issuer        TEXT NOT NULL,
    subject       TEXT NOT NULL,
    user_id       TEXT NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    created_at_ms INTEGER NOT NULL,
    PRIMARY KEY (issuer, subject)
) STRICT;

CREATE TABLE memberships (
    user_id       TEXT NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    team_id       TEXT NOT NULL REFERENCES teams (id) ON DELETE CASCADE,
    is_default    INTEGER NOT NULL,
    created_at_ms INTEGER NOT NULL,
    PRIMARY KEY (user_id, team_id)
) STRICT;
CREATE INDEX memberships_by_team ON memberships (team_id);

-- Keys get an id to be named by, a name to be known by, and who made them.
CREATE TABLE api_keys_2 (
    id            TEXT PRIMARY KEY NOT NULL,
    hash          TEXT NOT NULL UNIQUE,
    team_id       TEXT NOT NULL REFERENCES teams (id) ON DELETE CASCADE,
    name          TEXT NOT NULL,
    prefix        TEXT NOT NULL,
    value_length  INTEGER NOT NULL,
    masked_prefix TEXT NOT NULL,
    masked_suffix TEXT NOT NULL,
    created_by    TEXT REFERENCES users (id) ON DELETE SET NULL,
    created_at_ms INTEGER NOT NULL,
    last_used_ms  INTEGER
) STRICT;
INSERT INTO api_keys_2
    SELECT lower(hex(randomblob(4)) || '-' || hex(randomblob(2)) || '-4' || substr(hex(randomblob(2)), 2)
                 || '-8' || substr(hex(randomblob(2)), 2) || '-' || hex(randomblob(6))),
           hash, team_id, 'default', prefix, value_length, masked_prefix, masked_suffix, NULL,
           created_at_ms, NULL
    FROM api_keys;
DROP TABLE api_keys;
ALTER TABLE api_keys_2 RENAME TO api_keys;
CREATE INDEX api_keys_by_team ON api_keys (team_id);

CREATE TABLE access_tokens (
    id            TEXT PRIMARY KEY NOT NULL,
    hash          TEXT NOT NULL UNIQUE,
    user_id       TEXT NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    name          TEXT NOT NULL,
    prefix        TEXT NOT NULL,
    value_length  INTEGER NOT NULL,
    masked_prefix TEXT NOT NULL,
    masked_suffix TEXT NOT NULL,
    created_at_ms INTEGER NOT NULL,
    last_used_ms  INTEGER
) STRICT;
CREATE INDEX access_tokens_by_user ON access_tokens (user_id);

ALTER TABLE sandboxes ADD COLUMN node_id TEXT NOT NULL DEFAULT '';
ALTER TABLE sandboxes ADD COLUMN vcpus INTEGER NOT NULL DEFAULT 0;
ALTER TABLE sandboxes ADD COLUMN memory_mib INTEGER NOT NULL DEFAULT 0;
ALTER TABLE sandboxes ADD COLUMN disk_mib INTEGER NOT NULL DEFAULT 0;
CREATE INDEX sandboxes_ended ON sandboxes (ended_at_ms) WHERE ended_at_ms IS NOT NULL;
CREATE INDEX sandboxes_by_team ON sandboxes (team_id, started_at_ms);

-- How often templates were used by runs whose rows are gone.
CREATE TABLE template_spawns (
    template_id  TEXT PRIMARY KEY NOT NULL,
    spawn_count  INTEGER NOT NULL,
    last_ms      INTEGER NOT NULL
) STRICT;

-- `seq` is the order of writing, and so the order of delivery.
CREATE TABLE events (
    seq          INTEGER PRIMARY KEY AUTOINCREMENT,
    id           TEXT NOT NULL UNIQUE,
    type         TEXT NOT NULL,
    team_id      TEXT NOT NULL REFERENCES teams (id) ON DELETE CASCADE,
    sandbox_id   TEXT NOT NULL,
    execution_id TEXT NOT NULL,
    template_id  TEXT NOT NULL,
    build_id     TEXT NOT NULL,
    at_ms        INTEGER NOT NULL,
    data         TEXT NOT NULL
) STRICT;
CREATE INDEX events_by_team ON events (team_id, at_ms, seq);
CREATE INDEX events_by_sandbox ON events (sandbox_id, at_ms, seq);
CREATE INDEX events_by_time ON events (at_ms);

-- The secret signs what is sent, so it is kept as it is; no answer ever shows it.
CREATE TABLE webhooks (
    id               TEXT PRIMARY KEY NOT NULL,
    team_id          TEXT NOT NULL REFERENCES teams (id) ON DELETE CASCADE,
    name             TEXT NOT NULL,
    url              TEXT NOT NULL,
    enabled          INTEGER NOT NULL,
    event_types      TEXT NOT NULL,
    signature_secret TEXT NOT NULL,
    created_at_ms    INTEGER NOT NULL,
    updated_at_ms    INTEGER NOT NULL
) STRICT;
CREATE INDEX webhooks_by_team ON webhooks (team_id, created_at_ms);

-- One event on its way to one webhook. `state` is pending, delivered or dead; a row is worked on until
-- `leased_until_ms` by whoever took it last.
CREATE TABLE deliveries (
    id              TEXT PRIMARY KEY NOT NULL,
    webhook_id      TEXT NOT NULL REFERENCES webhooks (id) ON DELETE CASCADE,
    event_seq       INTEGER NOT NULL REFERENCES events (seq) ON DELETE CASCADE,
    state           TEXT NOT NULL,
    attempts        INTEGER NOT NULL,
    next_at_ms      INTEGER NOT NULL,
    leased_until_ms INTEGER NOT NULL,
    last_status     INTEGER,
    last_error      TEXT,
    created_at_ms   INTEGER NOT NULL,
    updated_at_ms   INTEGER NOT NULL,
    UNIQUE (webhook_id, event_seq)
) STRICT;
CREATE INDEX deliveries_due ON deliveries (webhook_id, event_seq) WHERE state = 'pending';
CREATE INDEX deliveries_by_webhook ON deliveries (webhook_id, state, created_at_ms);
CREATE INDEX deliveries_by_event ON deliveries (event_seq);

-- What a team used at a moment. `started` counts sandboxes begun since the sample before.
CREATE TABLE usage_samples (
    team_id    TEXT NOT NULL REFERENCES teams (id) ON DELETE CASCADE,
    at_ms      INTEGER NOT NULL,
    concurrent INTEGER NOT NULL,
    started    INTEGER NOT NULL,
    span_ms    INTEGER NOT NULL,
    PRIMARY KEY (team_id, at_ms)
) STRICT;
CREATE INDEX usage_samples_by_time ON usage_samples (at_ms);
