-- Snapshots: what a sandbox was at a moment. The rest of a row is the JSON of engine.state.SnapshotRecord.
CREATE TABLE snapshots (
    id TEXT PRIMARY KEY,
    owner TEXT NOT NULL,
    name TEXT,
    created REAL NOT NULL,
    record TEXT NOT NULL
) STRICT;

CREATE UNIQUE INDEX snapshots_name ON snapshots (owner, name) WHERE name IS NOT NULL;
