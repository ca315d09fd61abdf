DROP INDEX agent_status_log_known;
DELETE FROM schema_versions WHERE version = 3;
