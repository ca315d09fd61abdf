-- An index goes only when nobody reads its table, and whoever comes later waits behind whoever waits for that. Rather than
-- have the whole fleet wait for somebody who reads long, a backup say, this gives up.
SET LOCAL lock_timeout = '5s';
-- A search by the beginning of a name is counted, and its page found, from the index alone, whatever else the list is
-- narrowed by. The name stands beside its lower form, as Postgres does not know one by the other. The hosts' index would need
-- name and host, each with its lower form: up to 4,080 bytes, and an entry may have 2,704.
DROP INDEX agents_name;
CREATE INDEX agents_name ON agents (lower(name) COLLATE "C") INCLUDE (name, status, healthy, connection_id, id);
SET LOCAL lock_timeout = DEFAULT;

-- Not breaking: an older binary works as before.
INSERT INTO schema_versions (version, breaking) VALUES (5, false);
