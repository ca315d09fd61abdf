ALTER TABLE agent_status_log RESET (autovacuum_vacuum_insert_scale_factor);
ALTER TABLE agent_connection_history
    RESET (autovacuum_vacuum_scale_factor, autovacuum_vacuum_insert_scale_factor);
ALTER TABLE agents RESET (autovacuum_vacuum_scale_factor);
DROP INDEX agent_status_log_known;
DELETE FROM schema_versions WHERE version = 3;
