-- As on the way up.
LOCK TABLE agents IN ACCESS EXCLUSIVE MODE;
DROP INDEX agents_name;
CREATE INDEX agents_name ON agents (lower(name) COLLATE "C", id);
DELETE FROM schema_versions WHERE version = 5;
