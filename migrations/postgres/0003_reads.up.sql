-- What a count reads from an index it must look up in the table where vacuum was not yet. By default that is after a
-- fifth of the rows changed, which may take a history many days, and what is asked for is what happened last night.
ALTER TABLE agents SET (autovacuum_vacuum_scale_factor = 0.02);
ALTER TABLE agent_connection_history
    SET (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_insert_scale_factor = 0.02);
ALTER TABLE agent_status_log SET (autovacuum_vacuum_insert_scale_factor = 0.02);

-- Who was known at a moment, without a look at everybody's history: the changes of status that made an agent known, or
-- ended its retirement. One or two for each agent, whatever became of it. Last, as it keeps changes of status waiting.
CREATE INDEX agent_status_log_known ON agent_status_log (at, agent_id, from_status)
    WHERE from_status IS NULL OR from_status = 'retired';

-- Not breaking: an older binary works as before.
INSERT INTO schema_versions (version, breaking) VALUES (3, false);
