-- Templates: names that sandboxes are created from. The rest of a row is the JSON of engine.templates.TemplateRecord;
-- log is the end of what the build said, a JSON list of lines.
CREATE TABLE templates (
    id TEXT PRIMARY KEY,
    owner TEXT NOT NULL,
    name TEXT NOT NULL,
    created REAL NOT NULL,
    record TEXT NOT NULL,
    log TEXT NOT NULL DEFAULT '[]',
    UNIQUE (owner, name)
) STRICT;
