-- As on the way up.
SET LOCAL lock_timeout = '5s';
DROP INDEX agents_name;
CREATE INDEX agents_name ON agents (lower(name) COLLATE "C", id);
SET LOCAL lock_timeout = DEFAULT;
DELETE FROM schema_versions WHERE version = 5;
