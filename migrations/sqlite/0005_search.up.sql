-- A search by the beginning of a name or host is counted, and its page found, from the index alone, whatever else the list
-- is narrowed by. The name is in the hosts' index to leave out whom the name has found already.
DROP INDEX agents_name;
DROP INDEX agents_host;
CREATE INDEX agents_name ON agents (lower(name), status, healthy, connection_id, id);
CREATE INDEX agents_host ON agents (lower(host), status, healthy, connection_id, id, lower(name));

-- Not breaking: an older binary works as before.
INSERT INTO schema_versions (version, breaking) VALUES (5, false);
