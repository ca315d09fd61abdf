DROP INDEX agent_status_log_past;
DROP INDEX agent_connection_history_connected;
DROP INDEX agent_connection_history_past;
DROP TABLE history_horizon;
DELETE FROM schema_versions WHERE version = 2;
