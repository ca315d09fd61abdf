-- Who was known at a moment, without a look at everybody's history: the changes of status that made an agent known, or
-- ended its retirement. One or two for each agent, whatever became of it.
CREATE INDEX agent_status_log_known ON agent_status_log (at, agent_id, from_status)
    WHERE from_status IS NULL OR from_status = 'retired';

-- Not breaking: an older binary works as before.
INSERT INTO schema_versions (version, breaking) VALUES (3, false);
