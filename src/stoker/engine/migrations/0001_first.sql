-- One row per sandbox. What is searched or must be unique is a column; the rest is the JSON of engine.record.Record.
CREATE TABLE sandboxes (
    id TEXT PRIMARY KEY,
    owner TEXT NOT NULL,
    name TEXT,
    state TEXT NOT NULL,
    created REAL NOT NULL,
    record TEXT NOT NULL
) STRICT;

CREATE UNIQUE INDEX sandboxes_name ON sandboxes (owner, name) WHERE name IS NOT NULL;

-- The ledger: everything on the host that exists because of us, written down before it is made.
CREATE TABLE owned (
    number INTEGER PRIMARY KEY,
    kind TEXT NOT NULL,
    name TEXT NOT NULL,
    owner TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('intent', 'live')),
    detail TEXT NOT NULL DEFAULT '{}',
    UNIQUE (kind, name)
) STRICT;

CREATE INDEX owned_owner ON owned (owner);

CREATE TABLE events (
    sandbox TEXT NOT NULL,
    number INTEGER NOT NULL,
    event TEXT NOT NULL,
    PRIMARY KEY (sandbox, number)
) STRICT, WITHOUT ROWID;

CREATE TABLE idempotency (
    owner TEXT NOT NULL,
    key TEXT NOT NULL,
    digest TEXT NOT NULL,
    sandbox TEXT NOT NULL,
    created REAL NOT NULL,
    PRIMARY KEY (owner, key)
) STRICT, WITHOUT ROWID;

CREATE TABLE keys (
    id TEXT PRIMARY KEY,
    digest TEXT NOT NULL UNIQUE,
    created REAL NOT NULL,
    record TEXT NOT NULL
) STRICT;

CREATE TABLE numbers (
    name TEXT PRIMARY KEY,
    value INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- Processes started in the background: what the guest does not know about them.
CREATE TABLE processes (
    sandbox TEXT NOT NULL,
    number INTEGER NOT NULL,
    started TEXT NOT NULL,
    PRIMARY KEY (sandbox, number)
) STRICT, WITHOUT ROWID;
