-- Volumes: file systems that outlive sandboxes. The rest of a row is the JSON of engine.volumes.VolumeRecord.
CREATE TABLE volumes (
    id TEXT PRIMARY KEY,
    owner TEXT NOT NULL,
    name TEXT NOT NULL,
    created REAL NOT NULL,
    record TEXT NOT NULL,
    UNIQUE (owner, name)
) STRICT;

-- Who uses a volume: a sandbox from its first row to its last, or a job (an import, an export) while it lasts.
CREATE TABLE claims (
    volume TEXT NOT NULL REFERENCES volumes (id),
    user TEXT NOT NULL,
    label TEXT NOT NULL,
    read_only INTEGER NOT NULL CHECK (read_only IN (0, 1)),
    PRIMARY KEY (volume, user)
) STRICT, WITHOUT ROWID;

CREATE INDEX claims_user ON claims (user);

-- App archives: who has uploaded which. The file systems made from them are shared.
CREATE TABLE apps (
    owner TEXT NOT NULL,
    digest TEXT NOT NULL,
    created REAL NOT NULL,
    size INTEGER NOT NULL,
    PRIMARY KEY (owner, digest)
) STRICT, WITHOUT ROWID;
