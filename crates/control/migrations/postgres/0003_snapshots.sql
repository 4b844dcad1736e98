-- Snapshots: paused sandboxes, and those taken to start others from. A paused sandbox is a row of kind
-- `paused` and no run that is not over; a run that was resumed keeps the row it came from until its
-- next pause. Times are Unix milliseconds, sizes mebibytes unless a name says bytes.
-- The tables and columns of ../sqlite are the same; a test compares them.

-- `id` is that of the build sandboxes are started by. `template_id` is a snapshot's own, and a paused
-- sandbox's template. `terms` is what the node keeps of the sandbox too, environment included: a
-- secret, and shown to nobody.
CREATE TABLE snapshots (
    id                 TEXT PRIMARY KEY NOT NULL,
    kind               TEXT NOT NULL,
    team_id            TEXT NOT NULL REFERENCES teams (id) ON DELETE CASCADE,
    template_id        TEXT NOT NULL,
    name               TEXT,
    tag                TEXT NOT NULL,
    sandbox_id         TEXT NOT NULL,
    execution_id       TEXT NOT NULL,
    source_template_id TEXT NOT NULL,
    source_build_id    TEXT NOT NULL,
    filesystem_only    BOOLEAN NOT NULL,
    guest_unresponsive BOOLEAN NOT NULL,
    vcpus              BIGINT NOT NULL,
    memory_mib         BIGINT NOT NULL,
    disk_mib           BIGINT NOT NULL,
    own_bytes          BIGINT NOT NULL,
    envd_version       TEXT NOT NULL,
    terms              TEXT NOT NULL,
    started_at_ms      BIGINT NOT NULL,
    created_at_ms      BIGINT NOT NULL
);
-- A sandbox is paused once, and a name of a team's means one snapshot.
CREATE UNIQUE INDEX snapshots_paused ON snapshots (sandbox_id) WHERE kind = 'paused';
CREATE UNIQUE INDEX snapshots_named ON snapshots (team_id, name, tag) WHERE name IS NOT NULL;
CREATE UNIQUE INDEX snapshots_by_template ON snapshots (template_id) WHERE kind = 'snapshot';
CREATE INDEX snapshots_by_team ON snapshots (team_id, kind, created_at_ms, id);
CREATE INDEX sandboxes_by_id ON sandboxes (sandbox_id);
