-- All at once: whoever reads agents at this moment and is about to write would wait for this, and this for them.
LOCK TABLE agents IN ACCESS EXCLUSIVE MODE;
-- A search by the beginning of a name is counted, and its page found, from the index alone, whatever else the list is
-- narrowed by. The name stands beside its small letters, as Postgres does not know one from the other. For the host there
-- would have to be both of both, which is more than an index entry may hold where they are as long as they may be.
DROP INDEX agents_name;
CREATE INDEX agents_name ON agents (lower(name) COLLATE "C") INCLUDE (name, status, healthy, connection_id, id);

-- Not breaking: an older binary works as before.
INSERT INTO schema_versions (version, breaking) VALUES (5, false);
