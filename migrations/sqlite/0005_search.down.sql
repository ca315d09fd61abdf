DROP INDEX agents_name;
DROP INDEX agents_host;
CREATE INDEX agents_name ON agents (lower(name), id);
CREATE INDEX agents_host ON agents (lower(host), id);
DELETE FROM schema_versions WHERE version = 5;
