-- Moments are microseconds since the Unix epoch, UTC; uids are blobs of 16 bytes, `hex(id)` shows them.
-- The fleet: agents, their signs of life, their connections, their status over time, and the nodes that watch them.

CREATE TABLE schema_versions (
    version integer PRIMARY KEY,
    -- True where a binary that does not know this migration must not run on it.
    breaking boolean NOT NULL,
    applied_at integer NOT NULL DEFAULT (CAST(unixepoch('subsec') * 1000000 AS integer))
);

-- One row per server process. `renewed_at` is its lease; `ended_at` is set once, by itself or by who finds it gone.
CREATE TABLE nodes (
    id blob PRIMARY KEY,
    name text NOT NULL,
    version text NOT NULL,
    lease_ms integer NOT NULL,
    started_at integer NOT NULL,
    renewed_at integer NOT NULL,
    ended_at integer,
    ended_by blob REFERENCES nodes (id)
);
CREATE INDEX nodes_living ON nodes (name) WHERE ended_at IS NULL;

-- The record of an agent. `connection_id` is the fence: null = not connected.
CREATE TABLE agents (
    id blob PRIMARY KEY,
    name text,
    host text,
    status text NOT NULL CHECK (status IN ('online', 'offline', 'error', 'retired')),
    status_since integer NOT NULL,
    -- A pending verdict: `offline` at this moment unless the agent returns before.
    offline_at integer,
    -- The moment from which `sweep.stale_after` counts; moved on by the time in which no node was alive.
    stale_from integer,
    connection_id integer,
    -- An operator's order: this connection is to end, for this reason. Whoever holds it hears of it; its end clears it.
    close_connection integer,
    close_reason text,
    previous_id blob REFERENCES agents (id),
    -- Two agents that share one uid: when and at which number the last connection was displaced, how often
    -- in a row the displaced one returned, and the uid that the second agent was given instead, with how often it was told so.
    displaced_at integer,
    displaced_number integer,
    swaps integer NOT NULL DEFAULT 0,
    rival_id blob,
    rival_offers integer NOT NULL DEFAULT 0,
    groups text NOT NULL DEFAULT '[]',
    healthy boolean,
    ephemeral boolean NOT NULL DEFAULT false,
    last_connected_at integer,
    last_disconnected_at integer,
    disconnect_reason text,
    clients_count integer NOT NULL DEFAULT 0,
    sync_revision text,
    capabilities integer NOT NULL DEFAULT 0,
    retired_at integer,
    created_at integer NOT NULL,
    updated_at integer NOT NULL,
    components_hash text,
    -- What is large comes last: lists read the columns before it and never come by.
    description text,
    health text,
    effective_config text,
    remote_config_status text,
    package_statuses text,
    custom_capabilities text,
    connection_settings_status text
);
-- The filters of lists meet in one index each, so that a count reads no row.
CREATE INDEX agents_status ON agents (status, id, healthy, connection_id);
CREATE INDEX agents_healthy ON agents (healthy, status, id);
CREATE INDEX agents_connected ON agents (id, status, healthy, connection_id) WHERE connection_id IS NOT NULL;
CREATE INDEX agents_name ON agents (lower(name), id);
CREATE INDEX agents_host ON agents (lower(host), id);
CREATE INDEX agents_pending_verdict ON agents (offline_at) WHERE offline_at IS NOT NULL;
CREATE INDEX agents_stale ON agents (stale_from) WHERE stale_from IS NOT NULL;
CREATE INDEX agents_close_ordered ON agents (close_connection) WHERE close_connection IS NOT NULL;
CREATE INDEX agents_previous ON agents (previous_id) WHERE previous_id IS NOT NULL;

-- Signs of life: narrow and without a second index, so that a flush touches few pages.
CREATE TABLE agent_liveness (
    agent_id blob PRIMARY KEY REFERENCES agents (id),
    last_seen_at integer NOT NULL,
    sequence_num integer,
    -- The fence once more: a flush that waited for this row must find here that a newer connection took over.
    connection_id integer,
    -- How long a poller may be silent, by its last gaps; null where its pace is not known, and on a WebSocket.
    poll_silence_ms integer
) WITHOUT ROWID;

CREATE TABLE agent_attributes (
    agent_id blob NOT NULL REFERENCES agents (id),
    key text NOT NULL,
    value text NOT NULL,
    PRIMARY KEY (agent_id, key)
);
CREATE INDEX agent_attributes_value ON agent_attributes (key, value, agent_id);

-- Inventories as agents report them, once per hash, shared by all agents with that hash.
CREATE TABLE component_inventories (
    hash text PRIMARY KEY,
    components text NOT NULL,
    created_at integer NOT NULL
);

-- One row per connection. For one agent rows never overlap and at most one is open.
CREATE TABLE agent_connection_history (
    id integer PRIMARY KEY AUTOINCREMENT,
    agent_id blob NOT NULL REFERENCES agents (id),
    connected_at integer NOT NULL,
    disconnected_at integer,
    disconnected_by integer,
    duration_seconds integer,
    disconnect_reason text,
    remote_addr text,
    transport text NOT NULL CHECK (transport IN ('websocket', 'http')),
    node_id blob REFERENCES nodes (id),
    node_seq integer NOT NULL,
    created_at integer NOT NULL,
    CHECK (connected_at <= disconnected_at),
    CHECK (disconnected_at <= disconnected_by)
);
CREATE UNIQUE INDEX agent_connection_history_open ON agent_connection_history (agent_id) WHERE disconnected_at IS NULL;
CREATE UNIQUE INDEX agent_connection_history_opening ON agent_connection_history (node_id, node_seq);
-- An agent's rows in the order of its list, with all that `from` and `to` look at.
CREATE INDEX agent_connection_history_agent ON agent_connection_history (agent_id, id, connected_at, disconnected_at, disconnected_by);
CREATE INDEX agent_connection_history_node ON agent_connection_history (node_id) WHERE disconnected_at IS NULL;
CREATE INDEX agent_connection_history_transport ON agent_connection_history (transport, agent_id)
    WHERE disconnected_at IS NULL;
CREATE INDEX agent_connection_history_retention ON agent_connection_history (disconnected_at);

CREATE TABLE agent_status_log (
    id integer PRIMARY KEY AUTOINCREMENT,
    agent_id blob NOT NULL REFERENCES agents (id),
    at integer NOT NULL,
    from_status text,
    to_status text NOT NULL,
    reason text NOT NULL,
    connection_id integer,
    node_id blob
);
CREATE INDEX agent_status_log_agent ON agent_status_log (agent_id, id);
CREATE INDEX agent_status_log_at ON agent_status_log (at);

-- The view operators query by hand.
CREATE VIEW agent_nodes AS
SELECT a.id, a.healthy, strftime('%Y-%m-%dT%H:%M:%fZ', l.last_seen_at / 1e6, 'unixepoch') AS last_heartbeat, a.clients_count, a.sync_revision
FROM agents a
LEFT JOIN agent_liveness l ON l.agent_id = a.id
WHERE a.status <> 'retired';

INSERT INTO schema_versions (version, breaking) VALUES (1, true);
