-- Questions about the past: which history is whole, and what an agent was at a moment.

-- The greatest moment before which history was ever deleted; no row where nothing was. Kept as a fact, because the
-- setting that deleted it may change. One row at most.
CREATE TABLE history_horizon (
    only_one integer PRIMARY KEY CHECK (only_one = 1),
    forgotten_before integer NOT NULL
);
-- What was deleted before there was this table is not on record: the oldest end that is still there bounds it, because
-- the oldest go first.
INSERT INTO history_horizon (only_one, forgotten_before)
SELECT true, max(
    coalesce((SELECT min(disconnected_at) FROM agent_connection_history WHERE disconnected_at IS NOT NULL), CAST(unixepoch('subsec') * 1000000 AS integer)),
    coalesce((SELECT min(at) FROM agent_status_log), CAST(unixepoch('subsec') * 1000000 AS integer))
)
WHERE EXISTS (SELECT 1 FROM agents);

-- An agent's row at a moment, and all that decides what is known of it then.
CREATE INDEX agent_connection_history_past ON agent_connection_history (agent_id, connected_at, id,
    disconnected_at, disconnected_by, transport);
-- The connections of all agents that began in a span.
CREATE INDEX agent_connection_history_connected ON agent_connection_history (connected_at, id);
-- An agent's first change of status after a moment, and what it was before.
CREATE INDEX agent_status_log_past ON agent_status_log (agent_id, at, id, from_status);

-- Breaking: an older binary would delete history and not say so.
INSERT INTO schema_versions (version, breaking) VALUES (2, true);
