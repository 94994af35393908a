-- Warm sets: how many machines of which kind are kept ready. The rest of a row is the JSON of engine.warm.WarmRecord.
CREATE TABLE warm (
    id TEXT PRIMARY KEY,
    owner TEXT NOT NULL,
    created REAL NOT NULL,
    record TEXT NOT NULL
) STRICT;
